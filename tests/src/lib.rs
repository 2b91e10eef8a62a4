//! The servers and machines the end-to-end tests run against.

pub mod sshd;
