//! The operations that blocks use, on the CPU and on a GPU: fused elementwise work ([`fused`]) and
//! products with weights ([`product`]). [`tap`] and [`taps`] sum the inputs of these products.

pub mod fused;
pub mod product;
pub mod tap;
pub mod taps;
