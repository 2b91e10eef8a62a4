//! Compares results: counts, confidence intervals, definitions, and published figures.
//!
//! [`folder`] reads result folders and refuses incomplete ones; [`predecessor`] converts the
//! predecessor's files; [`bootstrap`] computes confidence intervals, for unique features from
//! other [`samples`] of the sequences; [`published`] contains published figures. [`comparison`]
//! makes one list of all figures, and [`difference`] finds those that differ only by definition or
//! provenance. [`table`] makes tables, which [`print`] writes; [`page`] is an HTML page with
//! [`plots`] (each drawn by [`plot`], converted by [`pixels`] and [`pdf`]), tables of every model
//! ([`detail`], [`measured`]) and thresholds ([`threshold_sweep`]). [`recount`] applies other
//! shares of layers and positions to stored counts.

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
