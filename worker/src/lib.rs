//! Skeleton.

pub mod corpus;
pub mod demo;
pub mod error;
pub mod files;
pub mod hub;
pub mod safetensors;
pub mod source;
