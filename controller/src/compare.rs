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

pub(crate) mod bootstrap;
pub(crate) mod comparison;
pub(crate) mod detail;
pub(crate) mod difference;
#[cfg(test)]
pub(crate) mod fixture;
pub(crate) mod folder;
pub(crate) mod measured;
pub(crate) mod page;
pub(crate) mod pdf;
pub(crate) mod pixels;
pub(crate) mod plot;
pub(crate) mod plots;
pub(crate) mod predecessor;
pub(crate) mod print;
pub(crate) mod published;
pub(crate) mod recount;
pub(crate) mod samples;
pub(crate) mod statistics;
pub(crate) mod table;
pub(crate) mod threshold_sweep;

pub(crate) use comparison::Comparison;
