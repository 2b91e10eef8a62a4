//! What was typed ([`cli`]) and which command does it ([`app`]). [`bench`] measures this machine,
//! and [`demo`] makes a checkpoint with planted features.

pub mod app;
pub mod bench;
pub mod cli;
pub mod demo;
