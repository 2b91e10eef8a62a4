//! The operations that blocks use, on the CPU and on a GPU: fused elementwise work ([`fused`]) and
//! products with weights ([`product`]). [`input_collector`] and [`input_collectors`] sum the
//! inputs of these products.

pub mod fused;
pub mod input_collector;
pub mod input_collectors;
pub mod product;
