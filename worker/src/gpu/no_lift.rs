//! Where no GPUs are used.

use std::convert::Infallible;

use candle_core::{DType, Device, Tensor};

use crate::dtype::Encoded;
use crate::error::Result;

/// There is none.
pub struct Lift(Infallible);

impl Lift {
    /// None.
    ///
    /// # Errors
    /// None.
    pub fn to(_device: &Device) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn arrival(&self) -> Result<Arrival> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn decode(&mut self, _: &Encoded<'_>, _: &[usize], _: DType, _: &str) -> Result<Tensor> {
        match self.0 {}
    }
}

/// There is none.
pub struct Arrival(Infallible);

impl Arrival {
    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn wait(self) -> Result<()> {
        match self.0 {}
    }
}

/// When the memory is free again of all that was dropped so far: at once.
///
/// # Errors
/// None.
pub fn departure(_device: &Device) -> Result<Option<Departure>> {
    Ok(None)
}

/// There is none.
pub struct Departure(Infallible);

impl Departure {
    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn wait(self) -> Result<()> {
        match self.0 {}
    }
}
