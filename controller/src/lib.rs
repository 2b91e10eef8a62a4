//! The controller: rents, pushes, follows, brings home, ends.

pub mod broker;
pub mod deploy;
pub mod gpu;
pub mod host;
pub mod keys;
pub mod ledger;
pub mod market;
pub mod reconcile;
pub mod run;
pub mod secret;
pub mod text;
pub mod transport;
pub mod units;
