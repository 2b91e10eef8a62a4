//! Results side by side: what was counted, how sure it is, how it was defined, and what others published.
//!
//! [`folder`] reads result folders and refuses what is not whole; [`predecessor`] makes results of the predecessor's files; [`tally`] says
//! how sure a figure is.

#[cfg(test)]
mod fixture;
pub mod folder;
pub mod predecessor;
pub mod statistics;
pub mod tally;
