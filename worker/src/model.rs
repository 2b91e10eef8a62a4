//! Descriptions of models. [`arch`] reads a published configuration into a [`decoder`] spec:
//! shapes and switches of every block, and the tensors they need. [`rope`] computes the
//! frequencies of rotary position embeddings. No module here computes with weights.

pub mod arch;
pub mod decoder;
pub mod rope;
