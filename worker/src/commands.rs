//! The command line: arguments ([`cli`]) and commands ([`app`]). [`bench`] measures this machine,
//! and [`demo`] writes a checkpoint with planted features.

pub mod app;
pub mod bench;
pub mod cli;
pub mod demo;
