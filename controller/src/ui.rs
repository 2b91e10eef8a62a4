//! Output for people: [`report`] prints sentences, bars and tables of all events, [`status`]
//! collects the state of all runs, and [`handoff`] writes it as a document.

pub mod handoff;
pub mod report;
pub mod status;
