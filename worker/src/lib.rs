//! Skeleton.

pub mod corpus;
pub mod demo;
pub mod error;
pub mod files;
pub mod safetensors;
pub mod source;
