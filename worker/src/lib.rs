//! Skeleton.

pub mod error;
pub mod safetensors;
pub mod source;
