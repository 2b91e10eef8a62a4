//! Skeleton.

pub mod error;
