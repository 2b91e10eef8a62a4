//! What people read. [`report`] makes sentences, bars and tables of everything that happens;
//! [`status`] collects where everything stands, and [`handoff`] writes it down for whoever carries
//! on.

pub mod handoff;
pub mod report;
pub mod status;
