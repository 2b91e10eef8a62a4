//! Clouds that are not there, for tests.
//!
//! A [`FakeCloud`] is an HTTP server on a loopback port with a [`World`] behind it: stock, instances, a clock, a bill, and
//! [`Fault`]s to come. What it says and understands is a [`Dialect`], one per real cloud; everything that is the same for all
//! clouds, faults above all, is done once, here. The real brokers are tested against it.

pub mod conformance;
pub mod dialect;
mod exchange;
mod fault;
mod server;
mod world;

pub use dialect::Dialect;
pub use exchange::{Answer, Request};
pub use fault::{Fault, How, Op, Refusal};
pub use server::{FakeCloud, KEY, limits};
pub use world::{FakeInstance, Gpu, Host, Life, Moment, Odd, Order, Rented, SshKey, Stock, Watch, World};
