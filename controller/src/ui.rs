//! Output for people: [`report`] prints sentences, bars and tables of all events, [`status`]
//! collects the state of all runs, and [`handoff`] writes it as a document.

pub(crate) mod handoff;
pub(crate) mod report;
pub(crate) mod status;
