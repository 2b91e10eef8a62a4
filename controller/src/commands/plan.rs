//! `plan`: what a run would need, take and cost. Arithmetic over the headers, with every assumption said.

use std::time::Duration;

use outliers_protocol::Inspection;
use serde::Serialize;

use super::{Context, SCHEMA};
use crate::broker::Offer;
use crate::cli::PlanArgs;
use crate::estimate::{Estimate, Work};
use crate::local_worker::InspectScope;
use crate::market;
use crate::output;
use crate::report::tables::{self, TOP};
use crate::report::{CliError, ExitStatus};
use crate::units::{Bytes, UsdPerHour};

/// What a run would need, take and cost.
#[derive(Debug, Serialize)]
struct PlanReport<'a> {
    schema: u32,
    inspection: &'a Inspection,
    /// Largest size of the results on this machine.
    results: Bytes,
    estimate: Estimate,
    /// Matching offers, best first.
    offers: &'a [Offer],
    /// Why there are none.
    no_offers: Option<String>,
}

/// By the figures that were typed, else by the best offer.
fn estimate(work: &Work, args: &PlanArgs, best: Option<&Offer>) -> Estimate {
    let price = args.price.map(|usd| UsdPerHour::from_dollars(usd.get()));
    match (best, args.tflops) {
        (Some(offer), None) => work.on(&Offer { price: price.unwrap_or(offer.price), ..offer.clone() }),
        (best, tflops) => {
            let price = price.or_else(|| best.map(|offer| offer.price));
            work.at(Duration::ZERO, work.read_rate, tflops.map(|peak| work.reached(peak.get() * 1e12)), price)
        }
    }
}

/// Runs `plan`.
pub(super) async fn command(context: &Context, args: &PlanArgs) -> Result<ExitStatus, CliError> {
    let worker = context.worker().await?;
    let job = super::job::job(&args.model, &args.job, context.settings.thresholds, &context.here)?;
    let what = format!("the headers of {}", job.model.name());
    let inspection = context.reporter.waiting(&what, worker.inspect(&job, InspectScope::Model)).await?;
    let want = market::for_the_worker(args.want.request.clone());
    let mut work = context.work(&inspection.plan);
    if let Some(gib) = args.bandwidth {
        work.read_rate = Bytes((gib.get() * (1u64 << 30) as f64) as u64);
    }
    let clouds = context.clouds(&args.want.broker)?;
    let offered = context.reporter.waiting("the clouds' offers", clouds.offers(&want)).await?;
    context.reporter.offered(&offered);
    let (offers, no_offers) = match market::select(offered.offers, &want, &work) {
        Ok(selection) => (selection.offers, None),
        Err(none) => (Vec::new(), Some(none.to_string())),
    };
    let estimate = estimate(&work, args, offers.first());
    let limit = context.settings.max_duration;
    let results = output::bytes(&output::planned(&job, &inspection));
    let document =
        PlanReport { schema: SCHEMA, inspection: &inspection, results, estimate, offers: &offers, no_offers };
    context.reporter.result(&document, || {
        let market = document.no_offers.clone().unwrap_or_else(|| tables::offers(&offers, &work, limit, None, TOP));
        let home = format!("results: {results} at most, on this machine\n");
        tables::needs(&inspection) + &home + &tables::estimate(&document.estimate) + &market
    });
    Ok(ExitStatus::Done)
}
