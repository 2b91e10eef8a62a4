//! Fake clouds for tests.
//!
//! A [`FakeCloud`] is an HTTP server on a loopback port with a [`CloudState`]: stock, instances, a
//! clock, a bill and [`Fault`]s. Its API is a [`Dialect`], one per real cloud; all other code is
//! shared. The real brokers are tested against it.

pub mod conformance;
pub mod dialect;
mod exchange;
mod fault;
mod server;
mod state;

pub use dialect::Dialect;
pub use exchange::{ApiResponse, Request};
pub use fault::{Fault, How, Op, Refusal};
pub use server::{FakeCloud, KEY, limits};
pub use state::{
    CloudState, FakeInstance, Gpu, Host, InstanceStatus, Moment, Odd, Order, Rented, SshKey, Stock, Watch,
};
