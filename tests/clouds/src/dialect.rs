//! What a cloud understands and how it speaks.

pub mod lambda;
pub mod prime;
pub mod runpod;
pub mod vast;

use outliers::cloud::broker::CloudKind;
use outliers::units::UsdPerHour;

use crate::{Answer, Op, Refusal, Request, Stock, World};

/// Every dialect.
pub fn all() -> Vec<Box<dyn Dialect>> {
    vec![Box::new(lambda::Lambda), Box::new(prime::Prime), Box::new(runpod::RunPod::default()), Box::new(vast::Vast)]
}

/// A cloud's own description of its API: a file of OpenAPI.
#[derive(Clone, Copy, Debug)]
pub struct Document {
    /// Name of the file.
    pub file: &'static str,
    /// Paths that it does not describe.
    pub elsewhere: &'static [&'static str],
    /// Places in request bodies where it is known to be wrong, as JSON pointers: `/env`.
    pub wrong: &'static [&'static str],
}

/// One cloud's API over a [`World`]: state in, reply out.
///
/// Strict: what the real cloud would refuse (an unknown field, a wrong type, a missing key, a
/// wrong path) is refused here too. The core has checked the key and the account's funds, and
/// injects faults, before a dialect sees a request.
pub trait Dialect: Send + Sync + 'static {
    /// The cloud that speaks it.
    fn cloud(&self) -> &'static CloudKind;

    /// The cloud's own description of its API, if there is one.
    fn document(&self) -> Option<Document> {
        None
    }

    /// What the request is for; `None`: the API has no such call.
    fn operation(&self, request: &Request) -> Option<Op>;

    /// Does what the request asks and answers.
    ///
    /// # Errors
    /// A refusal, which [`Dialect::refuse`] puts into words.
    fn answer(&self, world: &mut World, request: &Request) -> Result<Answer, Refusal>;

    /// A refusal in the cloud's own words.
    fn refuse(&self, refusal: &Refusal, on: Op) -> Answer;

    /// The stock as far as this cloud tells of it (what it does not tell is `None`, or rounded as
    /// it rounds); `None`: it cannot offer such a thing at all.
    fn shows(&self, stock: &Stock) -> Option<Stock> {
        Some(stock.clone())
    }

    /// What `stock` costs with this much disk.
    fn price(&self, stock: &Stock, disk_gib: u64) -> UsdPerHour {
        let _ = disk_gib;
        stock.price
    }

    /// Whether its listings say how much there is in all, so that one that ends too early can be
    /// told ([`World::truncates`]).
    fn tells_totals(&self) -> bool {
        false
    }
}
