//! The clouds: each is a [`broker`], spoken to over [`http`]. [`clouds`] asks several of them side
//! by side, [`market`] filters and ranks their offers by what a run is expected to cost
//! ([`estimate`]), and [`gpu`] knows the names of GPUs.

pub mod broker;
pub mod broker_error;
pub mod clouds;
pub mod estimate;
pub mod gpu;
pub mod http;
pub mod market;
pub mod offer;
