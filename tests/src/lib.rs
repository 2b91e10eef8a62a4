//! Servers that the end-to-end tests run against.

pub mod hub;
