//! A cloud with given responses, and the real broker.

use std::sync::Arc;

use outliers::cloud::broker::{
    ApiAccess, Broker, BrokerError, CLOUDS, GpuRequest, Instance, InstanceId, InstanceState, Lease, Offer,
};
use outliers::cloud::http::{Http, HttpLimits};
use outliers::secret::Secret;
use outliers::units::{Bytes, UsdPerHour};
use tokio::runtime::Runtime;

use crate::assert_harmless;
use crate::responses::Responses;

/// The account's key. A cloud that repeats it must not get it into an error.
const KEY: &str = "sk-fuzz-7d1e";
/// Most offers of one answer that are ordered.
const MAX_ORDERS: usize = 3;
/// A price per hour above every limit.
const HIGHEST: f64 = 100_000.0;

/// A broker and its cloud.
pub struct Cloud {
    runtime: Runtime,
    broker: Box<dyn Broker>,
    responses: Responses,
    /// An order.
    offer: Offer,
}

impl Cloud {
    /// The cloud called `name`; `stock` are good responses to a query for offers.
    pub fn new(name: &str, stock: &[u8]) -> Self {
        let kind = CLOUDS.iter().find(|kind| kind.name == name).expect("it is built in");
        let responses = Responses::default();
        let http = Http::new(kind.name, kind.base_url, Some(Secret::new(KEY)), HttpLimits::default());
        let http = http.expect("the base URL is one").over(Arc::new(responses.clone()));
        let runtime = crate::impatient();
        let access = ApiAccess { http, image: kind.image.to_owned(), ssh_user: None, ssh_port: None };
        // Rate limits start now and need the runtime's clock.
        let broker = runtime.block_on(async { (kind.connect)(access) });
        responses.say(stock);
        let found = runtime.block_on(broker.offers(&want())).expect("good answers are understood");
        let offer = found.offers.into_iter().next().expect("there is an offer in good answers");
        Self { runtime, broker, responses, offer }
    }

    /// Makes every request of a broker. Each is answered by `script` (see [`Responses::say`]) from
    /// its start.
    pub fn run_script(&self, script: &[u8]) {
        let id = InstanceId("17".to_owned());
        self.runtime.block_on(async {
            let again = || self.responses.say(script);
            again();
            let found = good(self.broker.offers(&want()).await).map(|found| found.offers).unwrap_or_default();
            for offer in found.into_iter().take(MAX_ORDERS) {
                check_offer(&offer);
                again();
                good(self.broker.create(&offer, &lease()).await).iter().for_each(check_instance);
            }
            again();
            good(self.broker.create(&self.offer, &lease()).await).iter().for_each(check_instance);
            again();
            good(self.broker.list().await).iter().flatten().for_each(check_instance);
            again();
            good(self.broker.get(&id).await).iter().flatten().for_each(check_instance);
            again();
            good(self.broker.terminate(&id).await);
            again();
            good(self.broker.check().await);
        });
    }
}

/// A request with all filters.
fn want() -> GpuRequest {
    GpuRequest {
        gpu_count: Some(1),
        min_cpu_ram: Some(Bytes::from_gib(8)),
        min_disk: Some(Bytes::from_gib(60)),
        spot: true,
        ..GpuRequest::default()
    }
}

fn lease() -> Lease {
    Lease {
        tag: "outliers-me-r1-n1-4102444800".parse().expect("it is a tag"),
        ssh_public_key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey me".to_owned(),
        disk: Bytes::from_gib(60),
        stage: None,
    }
}

/// The result of a call, or `None` after an error, which must be safe to show.
fn good<T>(result: Result<T, BrokerError>) -> Option<T> {
    let error = match result {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    assert_harmless(&error.message);
    assert!(!error.message.contains(KEY), "the key is in an error: {error}");
    assert!(error.message.len() < 8192, "an error of {} bytes", error.message.len());
    None
}

fn check_offer(offer: &Offer) {
    check_price(offer.price);
    assert!(serde_json::to_string(offer).is_ok(), "a ledger has to hold it");
}

fn check_instance(instance: &Instance) {
    instance.price.into_iter().for_each(check_price);
    match &instance.state {
        InstanceState::Failed(words)
        | InstanceState::Queued(words)
        | InstanceState::Unknown(words)
        | InstanceState::Unreadable(words) => assert_harmless(words),
        InstanceState::Ready(at) => {
            let word =
                |text: &str| !text.is_empty() && !text.starts_with('-') && text.chars().all(|c| c.is_ascii_graphic());
            assert!(word(&at.host) && word(&at.user) && at.port > 0, "{at:?}");
        }
        InstanceState::Booting | InstanceState::Stopped | InstanceState::Terminating => {}
    }
}

fn check_price(price: UsdPerHour) {
    assert!((0.0..=HIGHEST).contains(&price.0.dollars()), "{price:?}");
}
