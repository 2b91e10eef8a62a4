//! The parts of a layer: the token mixers ([`attention`], [`mla`], [`delta_net`], [`mamba`]), the
//! feed-forward blocks with their experts and routers ([`ffn`]), and [`norm`]. [`weights`] turns
//! the decoded tensors of a layer into the weights of its blocks.

pub mod attention;
pub mod delta_net;
pub mod ffn;
pub mod mamba;
pub mod mla;
pub mod norm;
pub mod weights;
