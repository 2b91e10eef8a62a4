//! The unit as Linux gives it to programs on x86-64.

mod pack;
mod product;
mod tiles;

pub(crate) use pack::Real;
pub(crate) use product::product;
pub(crate) use tiles::are_there;
