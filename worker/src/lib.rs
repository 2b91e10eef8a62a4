//! The worker: streams a decoder-only language model over text, one layer's weights at a time, and counts outlier features.
//!
//! From the job to the numbers: [`run`] finds the checkpoint ([`source`], [`hub`]), [`arch`] turns its configuration into a
//! [`decoder`] spec, [`model`] compares every tensor with it, [`corpus`] makes token ids, [`stream`] passes all of them through
//! one unit of weights after another ([`weights`], [`attention`], [`ffn`], [`rope`], [`fused`]), [`stats`] counts and judges, [`output`] writes.

pub mod ablation;
pub mod app;
pub mod arch;
pub mod attention;
pub mod bench;
pub mod budget;
mod caught;
pub mod cli;
pub mod corpus;
pub mod decoder;
pub mod delta_net;
pub mod demo;
pub mod device;
pub mod dtype;
pub mod error;
pub mod export;
pub mod ffn;
pub mod files;
pub mod fused;
pub mod gpu;
pub mod hub;
pub mod inspect;
pub mod loader;
pub mod mamba;
pub mod meter;
pub mod mla;
pub mod model;
mod noise;
pub mod norm;
pub mod output;
pub mod product;
pub mod progress;
pub mod rope;
pub mod run;
pub mod safetensors;
pub mod savepoint;
pub mod source;
pub mod stand_in;
pub mod stats;
pub mod stream;
pub mod tap;
pub mod taps;
pub mod torch;
pub mod trace;
pub mod watch;
pub mod weights;
