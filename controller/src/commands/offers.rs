//! `offers`: lists offers by the cost of a run.

use serde::Serialize;

use super::{Context, SCHEMA};
use crate::cli::settings::OffersRequest;
use crate::cloud::broker::{Dropped, Offer};
use crate::cloud::estimate::{Estimate, Work};
use crate::cloud::market::{self, FilterStep};
use crate::run::local_worker::InspectScope;
use crate::ui::report::tables::{self, TOP};
use crate::ui::report::{CliError, ExitStatus};
use crate::units::Bytes;

/// The run for ranking without a model: 32,768 tokens of a model with 50 billion parameters.
const USUAL: (Bytes, f64) = (Bytes::from_gib(100), 1e15);
const USUAL_IN_WORDS: &str = "takes, costs: a run of 32,768 tokens through a model of 50 billion parameters; \
    --model ID estimates yours\n";
/// Maximum offers of a complete table.
const ALL: usize = 10_000;

#[derive(Serialize)]
struct OffersReport<'a> {
    schema: u32,
    /// The work that determines the ranking.
    work: Work,
    considered: usize,
    steps: Vec<FilterStep>,
    /// Offers left out before any filter.
    dropped: Vec<DroppedOffers<'a>>,
    /// Errors of the clouds that did not answer.
    silent: Vec<String>,
    offers: Vec<PricedOffer<'a>>,
}

#[derive(Serialize)]
struct DroppedOffers<'a> {
    broker: &'a str,
    #[serde(flatten)]
    dropped: &'a Dropped,
}

#[derive(Serialize)]
struct PricedOffer<'a> {
    #[serde(flatten)]
    offer: &'a Offer,
    estimate: Estimate,
    /// Whether the run exceeds the time limit of the settings.
    over_limit: bool,
}

pub(super) async fn command(context: &Context, asked: &OffersRequest) -> Result<ExitStatus, CliError> {
    let want = market::for_the_worker(asked.request.clone());
    let work = work(context, asked).await?;
    let clouds = context.clouds(&asked.brokers)?;
    let offered = context.reporter.waiting("the clouds' offers", clouds.offers(&want)).await?;
    context.reporter.offered(&offered);
    let selection = market::select(offered.offers, &want, &work)?;
    let limit = context.settings.max_duration;
    let priced = |offer| {
        let estimate = work.on(offer);
        PricedOffer { offer, over_limit: estimate.is_over(limit), estimate }
    };
    let document = OffersReport {
        schema: SCHEMA,
        work,
        considered: selection.considered,
        steps: selection.steps,
        dropped: offered.dropped.iter().map(|(broker, dropped)| DroppedOffers { broker, dropped }).collect(),
        silent: offered.silent.iter().map(ToString::to_string).collect(),
        offers: selection.offers.iter().map(priced).collect(),
    };
    let most = if asked.all { ALL } else { TOP };
    context.reporter.result(&document, || {
        let steps = tables::steps(document.considered, &document.steps);
        let usual = if asked.job.is_none() { USUAL_IN_WORDS } else { "" };
        tables::paragraphs(&(tables::offers(&selection.offers, &work, limit, None, most) + &steps + usual))
    });
    Ok(ExitStatus::Done)
}

async fn work(context: &Context, asked: &OffersRequest) -> Result<Work, CliError> {
    let Some(job) = &asked.job else {
        let (read, operations) = USUAL;
        let settings = &context.settings;
        let (read_rate, efficiency) = (settings.read_rate, settings.efficiency);
        return Ok(Work { read, operations, read_rate, efficiency, ..Work::default() });
    };
    let inspection = context.worker().await?.inspect(&super::job::job(job)?, InspectScope::Model).await?;
    Ok(context.work(&inspection.plan))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn default_run_estimate_takes_minutes() {
        let (read, operations) = USUAL;
        let work = Work { read, operations, read_rate: Bytes::from_gib(1), efficiency: 0.3, ..Work::default() };
        let took = work.at(Duration::ZERO, work.read_rate, Some(work.reached(312e12)), None).seconds;
        assert!((60.0..600.0).contains(&took), "{took}");
    }
}
