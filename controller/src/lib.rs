//! The controller: rents, pushes, follows, brings home, ends.

pub mod broker;
pub mod host;
pub mod run;
pub mod transport;
pub mod units;
