//! Conformance tests of brokers: one function per property, for every cloud.
//!
//! [`life`] needs only a broker, so it also runs against the local one. The others need a cloud
//! with injected faults. A function panics with the difference it found.

use std::sync::atomic::{AtomicU32, Ordering};

use outliers::cloud::broker::{
    Broker, BrokerError, BrokerErrorKind, GpuRequest, Instance, InstanceId, Lease, LeaseTag, Offer, Offers,
};
use outliers::units::Bytes;

use crate::{FakeCloud, Stock};

pub mod creation;
pub mod life;
pub mod listing;
pub mod offers;
pub mod responses;

/// Disk of every lease in these tests.
pub(crate) const DISK_GIB: u64 = 100;
/// Most polls until an instance of any fake is up.
const LOOKS: u32 = 20;

/// A lease with a unique id.
pub fn lease() -> Lease {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let tag = LeaseTag {
        owner: "a1b2c3".to_owned(),
        run: "r7f3c".to_owned(),
        nonce: format!("n{}", NEXT.fetch_add(1, Ordering::Relaxed)),
        deadline: now + 3600,
    };
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T run";
    Lease { tag, ssh_public_key: key.to_owned(), disk: Bytes::from_gib(DISK_GIB), stage: None }
}

/// Requirements of a run on one A100.
pub fn want() -> GpuRequest {
    GpuRequest { gpu_count: Some(1), min_disk: Some(Bytes::from_gib(DISK_GIB)), ..GpuRequest::default() }
}

/// The offer of this stock, if there is one.
fn find<'a>(offers: &'a Offers, stock: &Stock) -> Option<&'a Offer> {
    offers.offers.iter().find(|offer| {
        offer.gpu.as_deref() == Some(stock.gpu.canonical())
            && offer.gpu_count == stock.gpus
            && offer.spot == stock.spot
            // Stocks of the same kind are in different places here.
            && offer.region.as_deref().is_none_or(|region| {
                region.contains(stock.region) || region.contains(stock.country)
            })
    })
}

/// The offer of all creations here: the first stock.
async fn first_offer(broker: &dyn Broker) -> Offer {
    let offers = broker.offers(&want()).await.expect("a cloud that works shows its offers");
    let stock = &Stock::mixed()[0];
    find(&offers, stock).unwrap_or_else(|| panic!("an A100 is offered: {offers:?}")).clone()
}

/// Rents the first offer under a fresh lease.
async fn rent(broker: &dyn Broker) -> (Lease, Instance) {
    let (offer, lease) = (first_offer(broker).await, lease());
    let instance = broker.create(&offer, &lease).await.expect("a cloud that works rents");
    (lease, instance)
}

/// Instances under this lease, as the cloud lists them.
async fn found(broker: &dyn Broker, lease: &Lease) -> Vec<Instance> {
    let listed = broker.list().await.expect("a cloud that works lists");
    listed.into_iter().filter(|instance| instance.tag().as_ref() == Some(&lease.tag)).collect()
}

/// Ids of instances that bill.
fn live(cloud: &FakeCloud) -> Vec<InstanceId> {
    cloud.state().live().map(|instance| InstanceId(instance.id.clone())).collect()
}

fn kind<T>(result: &Result<T, BrokerError>) -> Option<BrokerErrorKind> {
    result.as_ref().err().map(|error| error.kind)
}
