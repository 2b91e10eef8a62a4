//! The clouds. Each is a [`broker`] that uses [`http`]. [`clouds`] queries several of them at
//! once, [`market`] filters their offers and ranks them by the expected cost of a run
//! ([`estimate`]), and [`gpu`] identifies GPUs by name.

pub mod broker;
pub mod broker_error;
pub mod clouds;
pub mod estimate;
pub mod gpu;
pub mod http;
pub mod market;
pub mod offer;
