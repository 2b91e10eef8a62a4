//! The worker: streams a decoder-only language model over text, one layer's weights at a time, and
//! counts outlier features.
//!
//! Its rooms, which use each other in no circle:
//!
//! - [`model`]: what a model is. [`arch`](model::arch) turns a configuration into a
//!   [`decoder`](model::decoder) spec.
//! - [`checkpoint`]: weight files. They come from a [`source`](checkpoint::source) or the
//!   [`hub`](checkpoint::hub), every tensor is compared with the spec, and
//!   [`dtype`](checkpoint::dtype) decodes them.
//! - [`device`]: CPUs and GPUs.
//! - [`kernels`]: the operations that blocks are made of.
//! - [`blocks`]: the parts of a layer.
//! - [`corpus`]: documents to token ids.
//! - [`stats`]: counting and judging.
//! - [`pass`]: all tokens through one layer's weights after the other.
//! - [`run`]: one run from job to files.
//! - [`commands`]: what was typed, and which command does it.
//!
//! Beside them lie helpers that every room may use.

pub mod blocks;
mod caught;
pub mod checkpoint;
pub mod commands;
pub mod corpus;
pub mod device;
pub mod error;
pub mod files;
pub mod kernels;
pub mod model;
mod noise;
pub mod pass;
pub mod run;
pub mod stats;
