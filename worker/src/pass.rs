//! The forward pass, layer by layer over all tokens. [`stream`] runs it, [`loader`] reads weights
//! ahead within a [`budget`], [`savepoint`] stores its state so that another process can resume
//! it, and [`ablation`] adds arms without some features. [`progress`], [`meter`] and [`trace`]
//! report progress and times.

pub mod ablation;
pub mod budget;
pub mod loader;
pub mod meter;
pub mod progress;
pub mod savepoint;
pub mod stream;
pub mod trace;
