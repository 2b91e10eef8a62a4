//! The worker: streams a decoder-only language model over text, one layer's weights at a time, and
//! counts outlier features.
//!
//! Its rooms, without circular dependencies:
//!
//! - [`model`]: descriptions of models. [`arch`](model::arch) turns a configuration into a
//!   [`decoder`](model::decoder) spec.
//! - [`checkpoint`]: weight files, from a [`source`](checkpoint::source) or the
//!   [`hub`](checkpoint::hub). Every tensor is checked against the spec, and
//!   [`dtype`](checkpoint::dtype) decodes it.
//! - [`device`]: CPUs and GPUs.
//! - [`kernels`]: the operations that blocks are made of.
//! - [`blocks`]: the parts of a layer.
//! - [`corpus`]: documents to token ids.
//! - [`stats`]: counts and results.
//! - [`pass`]: the forward pass, layer by layer over all tokens.
//! - [`run`]: executes a job and writes its files.
//! - [`commands`]: the command line.
//!
//! The other modules are helpers for all rooms.

pub mod blocks;
mod catch_panic;
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
