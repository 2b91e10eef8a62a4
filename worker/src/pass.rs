//! The pass: all tokens through one layer's weights after the other. [`stream`] runs it, [`loader`]
//! reads weights ahead within a [`budget`], [`savepoint`] lets it go on after its process died, and
//! [`ablation`] adds copies of the tokens without some features. [`progress`], [`meter`] and
//! [`trace`] tell how far it is and where its time goes.

pub mod ablation;
pub mod budget;
pub mod loader;
pub mod meter;
pub mod progress;
pub mod savepoint;
pub mod stream;
pub mod trace;
