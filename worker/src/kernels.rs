//! The operations that blocks are made of, on the CPU and on a GPU: elementwise work in one pass
//! ([`fused`]) and hidden states times weights ([`product`]). [`tap`] and [`taps`] sum what enters
//! these products.

pub mod fused;
pub mod product;
pub mod tap;
pub mod taps;
