//! Skeleton.

pub mod corpus;
pub mod error;
pub mod safetensors;
pub mod source;
