//! Results side by side: what was counted, how sure it is, how it was defined, and what others published.
//!
//! [`folder`] reads result folders and refuses what is not whole; [`predecessor`] makes results of
//! the predecessor's files; [`bootstrap`] says how sure a figure is, of unique features by other
//! [`samples`] of the sequences; [`published`] holds what others found. [`comparison`] makes one
//! list of figures of them all, and [`difference`] says which of them differ by definition or
//! provenance alone. [`table`] makes tables of it, which [`print`] writes; [`page`] is all of it
//! with [`plots`] (each drawn by [`plot`], made a picture by [`pixels`] and a page by [`pdf`]),
//! the tables of every model ([`detail`], [`measured`]) and its thresholds ([`threshold_sweep`]).
//! [`recount`] applies other shares of layers and positions to what a run stored.

pub mod bootstrap;
pub mod comparison;
pub mod detail;
pub mod difference;
#[cfg(test)]
pub(crate) mod fixture;
pub mod folder;
pub mod measured;
pub mod page;
pub mod pdf;
pub mod pixels;
pub mod plot;
pub mod plots;
pub mod predecessor;
pub mod print;
pub mod published;
pub mod recount;
pub mod samples;
pub mod statistics;
pub mod table;
pub mod threshold_sweep;

pub use comparison::Comparison;
