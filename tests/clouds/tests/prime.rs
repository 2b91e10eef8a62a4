//! Properties of Prime Intellect only.

use outliers::cloud::broker::{BrokerErrorKind, Dropped, GpuRequest, InstanceId, InstanceState, Lease, Offer};
use outliers::units::{Bytes, UsdPerHour};
use outliers_clouds::dialect::prime::Prime;
use outliers_clouds::{ApiResponse, FakeCloud, Fault, How, Op, Refusal, SshKey};
use serde_json::json;

const DISK: Bytes = Bytes(100_000_000_000);

fn want() -> GpuRequest {
    GpuRequest { gpu_count: Some(1), min_disk: Some(DISK), gpu_filter: None, ..GpuRequest::default() }
}

fn lease() -> Lease {
    Lease {
        tag: "outliers-me-r1-n1-4102444800".parse().expect("it is a tag"),
        ssh_public_key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey me".to_owned(),
        disk: DISK,
        stage: None,
    }
}

async fn a100(cloud: &FakeCloud) -> Offer {
    let offers = cloud.broker().offers(&want()).await.expect("there are offers").offers;
    offers.into_iter().find(|offer| offer.gpu.as_deref() == Some("A100-80GB")).expect("there is one")
}

fn key_names(cloud: &FakeCloud) -> Vec<String> {
    cloud.state().keys.iter().map(|key| key.name.clone()).collect()
}

fn plant_key(cloud: &FakeCloud, name: &str) {
    let key =
        SshKey { id: format!("key-{}", name.len()), name: name.to_owned(), public_key: "ssh-ed25519 A".to_owned() };
    cloud.state().keys.push(key);
}

#[tokio::test]
async fn instance_goes_from_offer_to_termination() {
    let cloud = FakeCloud::start(Prime);
    let broker = cloud.broker();
    let offer = a100(&cloud).await;
    // 80 GB beyond the 20 that the price contains.
    assert_eq!(offer.price, UsdPerHour::from_dollars(1.89 + 80.0 * 0.00014));
    assert_eq!((offer.cpu_ram, offer.cpu_cores), (Some(Bytes::from_gib(117)), Some(16)));

    let created = broker.create(&offer, &lease()).await.unwrap();
    assert_eq!((created.tag(), created.price), (Some(lease().tag), Some(offer.price)));
    let made = cloud.state().instances[0].clone();
    assert_eq!(made.public_key.as_deref(), Some("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey me"));
    let seen = broker.get(&created.id).await.unwrap().unwrap();
    let expected = InstanceState::Ready(made.ssh);
    let seen = if seen.state == expected { seen } else { broker.get(&created.id).await.unwrap().unwrap() };
    assert_eq!(seen.state, expected);

    broker.terminate(&created.id).await.unwrap();
    broker.terminate(&created.id).await.unwrap();
    assert_eq!(cloud.state().live().count(), 0);
}

#[tokio::test]
async fn termination_deletes_its_key_and_leftover_keys() {
    let cloud = FakeCloud::start(Prime);
    let other_lease = "outliers-me-r2-n2-4102444800";
    for name in ["somebody's own", "outliers-me-r0-n0-1700000000", other_lease] {
        plant_key(&cloud, name);
    }
    let created = cloud.broker().create(&a100(&cloud).await, &lease()).await.unwrap();
    assert_eq!(key_names(&cloud).last(), Some(&lease().tag.to_string()));
    cloud.broker().terminate(&created.id).await.unwrap();
    assert_eq!(key_names(&cloud), ["somebody's own", other_lease]);
}

#[tokio::test]
async fn refused_create_deletes_its_key() {
    let cloud = FakeCloud::start(Prime);
    let offer = a100(&cloud).await;
    cloud.state().funds = false;
    assert_eq!(cloud.broker().create(&offer, &lease()).await.unwrap_err().kind, BrokerErrorKind::Budget);
    assert_eq!(key_names(&cloud), [""; 0]);
}

#[tokio::test]
async fn ambiguous_create_keeps_its_key() {
    let cloud = FakeCloud::start(Prime);
    let offer = a100(&cloud).await;
    let how = How::Refuse(Refusal::Broken(502));
    cloud.state().faults.push(Fault { on: Op::Create, applied: true, how, times: 1 });
    assert_eq!(cloud.broker().create(&offer, &lease()).await.unwrap_err().kind, BrokerErrorKind::Maybe);
    assert_eq!(key_names(&cloud), [lease().tag.to_string()]);
    assert_eq!(cloud.state().live().count(), 1);
}

#[tokio::test]
async fn key_with_an_unconfirmed_registration_is_found() {
    let cloud = FakeCloud::start(Prime);
    let offer = a100(&cloud).await;
    for how in [How::Refuse(Refusal::Broken(500)), How::Refuse(Refusal::Invalid("it exists".to_owned()))] {
        cloud.state().faults.push(Fault { on: Op::Keys, applied: true, how, times: 1 });
        let created = cloud.broker().create(&offer, &lease()).await.unwrap();
        cloud.broker().terminate(&created.id).await.unwrap();
        assert_eq!(key_names(&cloud), [""; 0]);
    }
    let how = How::Refuse(Refusal::Invalid("no".to_owned()));
    cloud.state().faults.push(Fault { on: Op::Keys, applied: false, how, times: 1 });
    assert_eq!(cloud.broker().create(&offer, &lease()).await.unwrap_err().kind, BrokerErrorKind::Rejected);
}

#[tokio::test]
async fn risen_price_is_not_paid() {
    let cloud = FakeCloud::start(Prime);
    let offer = a100(&cloud).await;
    cloud.state().stock[0].price = UsdPerHour::from_dollars(1.95);
    assert_eq!(cloud.broker().create(&offer, &lease()).await.unwrap_err().kind, BrokerErrorKind::NoCapacity);
    assert!(cloud.state().instances.is_empty());
}

#[tokio::test]
async fn skipped_offers_are_reported() {
    let cloud = FakeCloud::start(Prime);
    let all = GpuRequest { gpu_count: Some(0), ..want() };
    let dropped = cloud.broker().offers(&all).await.unwrap().dropped;
    let reasons = ["not in stock", "can be taken back at any time", "priced in EUR", "paid in advance"];
    assert_eq!(dropped, reasons.map(|reason| Dropped { reason: reason.to_owned(), count: 1 }));
}

#[tokio::test]
async fn list_that_changes_between_pages_is_reread() {
    let cloud = FakeCloud::start(Prime);
    let planted: Vec<String> = {
        let mut state = cloud.state();
        state.page_size = 1;
        ["a", "b"].map(|name| state.plant(name)).into()
    };
    let pod = json!({"id": "x", "name": "gone since", "status": "ACTIVE", "gpuName": "A100_80GB", "gpuCount": 1, "priceHr": 1});
    let first = json!({"total_count": 3, "offset": 0, "limit": 100, "data": [pod]});
    let how = How::Say(ApiResponse::json(200, &first));
    cloud.state().faults.push(Fault { on: Op::List, applied: false, how, times: 1 });
    let listed: Vec<String> = cloud.broker().list().await.unwrap().into_iter().map(|instance| instance.id.0).collect();
    assert_eq!(listed, planted);
    cloud.state().truncates = true;
    assert!(cloud.broker().list().await.is_err());
}

#[tokio::test]
async fn id_is_one_url_segment() {
    let cloud = FakeCloud::start(Prime);
    assert_eq!(cloud.broker().get(&InstanceId("../ssh_keys/?x".to_owned())).await.unwrap(), None);
    assert_eq!(cloud.state().requests[0].path, "/pods/..%2Fssh_keys%2F%3Fx");
    assert_eq!(
        cloud.broker().terminate(&InstanceId("..".to_owned())).await.unwrap_err().kind,
        BrokerErrorKind::Rejected
    );
}
