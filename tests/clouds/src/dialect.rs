//! The API of a cloud: requests, answers, errors.

pub mod lambda;
pub mod prime;
pub mod runpod;
pub mod vast;

use outliers::cloud::broker::CloudKind;
use outliers::units::UsdPerHour;

use crate::{ApiResponse, CloudState, Op, Refusal, Request, Stock};

/// Every dialect.
pub fn all() -> Vec<Box<dyn Dialect>> {
    vec![Box::new(lambda::Lambda), Box::new(prime::Prime), Box::new(runpod::RunPod::default()), Box::new(vast::Vast)]
}

/// A cloud's published OpenAPI description.
#[derive(Clone, Copy, Debug)]
pub struct Document {
    /// Name of the file.
    pub file: &'static str,
    /// Paths that it does not describe.
    pub elsewhere: &'static [&'static str],
    /// Places in request bodies where it is known to be wrong, as JSON pointers: `/env`.
    pub wrong: &'static [&'static str],
}

/// One cloud's API over a [`CloudState`]: state in, reply out.
///
/// Strict: it refuses what the real cloud refuses (an unknown field, a wrong type, a missing key,
/// a wrong path). The server has checked the key and the funds, and injected faults, before it
/// calls a dialect.
pub trait Dialect: Send + Sync + 'static {
    /// The cloud with this API.
    fn cloud(&self) -> &'static CloudKind;

    /// The cloud's published API description, if there is one.
    fn document(&self) -> Option<Document> {
        None
    }

    /// The kind of the request; `None`: the API has no such call.
    fn operation(&self, request: &Request) -> Option<Op>;

    /// Executes the request and returns the answer.
    ///
    /// # Errors
    /// A refusal; [`Dialect::refuse`] makes an answer of it.
    fn answer(&self, state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal>;

    /// The cloud's answer for a refusal.
    fn refuse(&self, refusal: &Refusal, on: Op) -> ApiResponse;

    /// The stock as this cloud reports it: unreported values are `None`, others are rounded as the
    /// cloud does. `None`: the cloud cannot offer such stock.
    fn shows(&self, stock: &Stock) -> Option<Stock> {
        Some(stock.clone())
    }

    /// Price of `stock` with this much disk.
    fn price(&self, stock: &Stock, disk_gib: u64) -> UsdPerHour {
        let _ = disk_gib;
        stock.price
    }

    /// Whether its lists have a total count, so that truncated ones are detected
    /// ([`CloudState::truncates`]).
    fn tells_totals(&self) -> bool {
        false
    }
}
