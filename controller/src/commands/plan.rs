//! `plan`: estimates the needs, time and cost of a run from headers, with all assumptions.

use std::time::Duration;

use outliers_protocol::Inspection;
use serde::Serialize;

use super::{Context, SCHEMA};
use crate::cli::settings::PlanRequest;
use crate::cloud::broker::Offer;
use crate::cloud::estimate::{Estimate, Work};
use crate::cloud::market;
use crate::run::local_worker::InspectScope;
use crate::run::output;
use crate::ui::report::tables::{self, TOP};
use crate::ui::report::{CliError, ExitStatus};
use crate::units::Bytes;

/// Estimated needs, time and cost of a run.
#[derive(Debug, Serialize)]
struct PlanReport<'a> {
    schema: u32,
    inspection: &'a Inspection,
    /// Maximum size of the results on this machine.
    results: Bytes,
    estimate: Estimate,
    /// Matching offers, best first.
    offers: &'a [Offer],
    /// Why there are none.
    no_offers: Option<String>,
}

/// Estimate by the given figures, else for the best offer.
fn estimate(work: &Work, asked: &PlanRequest, best: Option<&Offer>) -> Estimate {
    match (best, asked.peak) {
        (Some(offer), None) => work.on(&Offer { price: asked.price.unwrap_or(offer.price), ..offer.clone() }),
        (best, peak) => {
            let price = asked.price.or_else(|| best.map(|offer| offer.price));
            let reached = peak.map(|peak| work.reached(peak));
            // A given peak is a GPU's.
            work.with_gpus(work.at(Duration::ZERO, work.read_rate, reached, price), u32::from(reached.is_some()))
        }
    }
}

pub(super) async fn command(context: &Context, asked: &PlanRequest) -> Result<ExitStatus, CliError> {
    let worker = context.worker().await?;
    let job = super::job::job(&asked.job)?;
    let what = format!("the headers of {}", job.model.name());
    let inspection = context.reporter.waiting(&what, worker.inspect(&job, InspectScope::Model)).await?;
    let want = market::for_the_worker(asked.request.clone());
    let work = Work { read_rate: asked.read_rate, ..context.work(&inspection.plan) };
    let clouds = context.clouds(&asked.brokers)?;
    let offered = context.reporter.waiting("the clouds' offers", clouds.offers(&want)).await?;
    context.reporter.offered(&offered);
    let (offers, no_offers) = match market::select(offered.offers, &want, &work) {
        Ok(selection) => (selection.offers, None),
        Err(none) => (Vec::new(), Some(none.to_string())),
    };
    let estimate = estimate(&work, asked, offers.first());
    let limit = context.settings.max_duration;
    let results = output::bytes(&output::planned(&job, &inspection));
    let document =
        PlanReport { schema: SCHEMA, inspection: &inspection, results, estimate, offers: &offers, no_offers };
    context.reporter.result(&document, || {
        let market = document.no_offers.clone().unwrap_or_else(|| tables::offers(&offers, &work, limit, None, TOP));
        let home = format!("\nresults: {results} at most, on this machine\n");
        tables::needs(&inspection) + &home + &tables::estimate(&document.estimate) + "\n" + &market
    });
    Ok(ExitStatus::Done)
}
