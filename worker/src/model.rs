//! What a model is, as data. [`arch`] reads a published configuration into a [`decoder`] spec:
//! shapes and switches of every block, and which tensors they need. [`rope`] holds the frequencies
//! of rotary position embeddings. Nothing here computes with weights.

pub mod arch;
pub mod decoder;
pub mod rope;
