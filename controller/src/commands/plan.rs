//! `plan`: what a run would need, take and cost. Arithmetic over the headers, with every assumption said.

use std::time::Duration;

use outliers_protocol::{Inspection, PlanFigures};
use serde::Serialize;

use super::{Context, SCHEMA, request};
use crate::broker::Offer;
use crate::cli::PlanArgs;
use crate::local_worker::Check;
use crate::market;
use crate::report::{Complaint, ExitStatus, tables};
use crate::settings::Span;
use crate::units::{Bytes, Usd, UsdPerHour};

/// What a run would need, take and cost.
#[derive(Debug, Serialize)]
struct Document<'a> {
    schema: u32,
    inspection: &'a Inspection,
    estimate: Estimate,
    /// Matching offers, cheapest first.
    offers: &'a [Offer],
    /// Why there are none.
    no_offers: Option<String>,
}

/// How long it takes, under its assumptions.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Estimate {
    /// Assumed: weight bytes read per second.
    read_bytes_per_second: u64,
    /// Assumed: operations per second that are reached; `None`: arithmetic was left out.
    operations_per_second: Option<f64>,
    /// Seconds to read the weights.
    read_seconds: f64,
    /// Seconds to compute.
    compute_seconds: Option<f64>,
    /// The longer of the two: they overlap.
    seconds: f64,
    /// Assumed price.
    price: Option<UsdPerHour>,
    /// Price times time. The start of the instance is not in it.
    cost: Option<Usd>,
}

impl Estimate {
    fn new(plan: &PlanFigures, read: Bytes, operations: Option<f64>, price: Option<UsdPerHour>) -> Self {
        // Up to what a clock can hold; nobody rents for longer.
        let seconds_of = |amount: f64, rate: f64| (amount / rate).min(1e9);
        let read_seconds = seconds_of(plan.bytes_to_read as f64, read.0.max(1) as f64);
        let compute_seconds = operations.filter(|rate| *rate > 0.0).map(|rate| seconds_of(plan.flops, rate));
        let seconds = compute_seconds.map_or(read_seconds, |compute| compute.max(read_seconds));
        Self {
            read_bytes_per_second: read.0,
            operations_per_second: operations,
            read_seconds,
            compute_seconds,
            seconds,
            price,
            cost: price.map(|price| price.cost(Duration::from_secs_f64(seconds))),
        }
    }

    fn in_words(&self) -> String {
        let span = |seconds: f64| Span(Duration::from_secs_f64(seconds)).to_string();
        let mut out = format!("reading: {} at {}/s\n", span(self.read_seconds), Bytes(self.read_bytes_per_second));
        out += &match (self.compute_seconds, self.operations_per_second) {
            (Some(seconds), Some(rate)) => {
                format!("computing: {} at {:.1} x 10^12 operations/s\n", span(seconds), rate / 1e12)
            }
            _ => "computing: left out (give the device's peak with --tflops)\n".to_owned(),
        };
        out += &format!("together: {} (they overlap; the start of the instance comes on top)\n", span(self.seconds));
        if let (Some(price), Some(cost)) = (self.price, self.cost) {
            out += &format!("cost: {cost} at {price}\n");
        }
        out
    }
}

/// Does it.
pub(super) async fn command(context: &Context, args: &PlanArgs) -> Result<ExitStatus, Complaint> {
    let worker = context.worker().await?;
    let job = super::job::job(&args.model, &args.job, context.settings.thresholds, &context.here)?;
    let inspection = worker.inspect(&job, Check::Model).await?;
    let cloud = context.cloud(args.want.broker.as_deref())?;
    let want = request(&args.want);
    let (offers, no_offers) = match market::select(cloud.broker.offers(&want).await?.offers, &want) {
        Ok(selection) => (selection.offers, None),
        Err(none) => (Vec::new(), Some(none.to_string())),
    };
    let typed = args.price.map(UsdPerHour::from_dollars);
    let price = typed.or_else(|| offers.first().map(|offer| offer.price));
    let read = args.bandwidth.map_or(context.settings.read_rate, |gib| Bytes((gib * (1u64 << 30) as f64) as u64));
    let operations = args.tflops.map(|peak| peak * 1e12 * context.settings.efficiency);
    let estimate = Estimate::new(&inspection.plan, read, operations, price);
    let limit = context.settings.max_duration;
    let document = Document { schema: SCHEMA, inspection: &inspection, estimate, offers: &offers, no_offers };
    context.reporter.result(&document, || {
        let market = document.no_offers.clone().unwrap_or_else(|| tables::offers(&offers, limit));
        tables::needs(&inspection) + &document.estimate.in_words() + &market
    });
    Ok(ExitStatus::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures() -> PlanFigures {
        PlanFigures {
            sequences: 1,
            tokens_per_sequence: 1,
            compute_bytes_per_value: 4,
            flops: 3e14,
            streamed_memory_bytes: 1,
            resident_memory_bytes: 1,
            hidden_state_bytes: 1,
            disk_bytes: 1,
            bytes_to_read: 100 << 30,
        }
    }

    #[test]
    fn reading_and_computing_overlap() {
        let rate = Bytes::from_gib(1);
        let price = Some(UsdPerHour::from_dollars(3.6));
        let reading = Estimate::new(&figures(), rate, None, price);
        assert_eq!((reading.seconds, reading.cost), (100.0, Some(Usd::from_dollars(0.1))));
        let computing = Estimate::new(&figures(), rate, Some(1e12), None);
        assert_eq!((computing.seconds, computing.cost), (300.0, None));
        assert_eq!(Estimate::new(&figures(), rate, Some(1e15), None).seconds, 100.0);
        let absurd = Estimate::new(&figures(), Bytes(0), Some(1e-300), price);
        assert!(absurd.seconds <= 1e9 && absurd.in_words().contains("together"), "no division ends the program");
        assert!(reading.in_words().contains("left out"));
    }
}
