//! The operations that blocks use, on the CPU and on a GPU: fused elementwise work ([`fused`]),
//! products with weights ([`product`]) and recurrences over tokens ([`recurrence`]).
//! [`input_collector`] and [`input_collectors`] sum the inputs of these products.

pub mod fused;
pub mod input_collector;
pub mod input_collectors;
pub mod product;
pub mod recurrence;
