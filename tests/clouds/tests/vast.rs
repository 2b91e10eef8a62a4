//! What only Vast.ai does.

use outliers::broker::{BrokerErrorKind, GpuRequest, InstanceId, InstanceState, Lease, Offer, Tier};
use outliers::units::{Bytes, Usd, UsdPerHour};
use outliers_clouds::dialect::Dialect;
use outliers_clouds::dialect::vast::Vast;
use outliers_clouds::{Answer, FakeCloud, Fault, How, Op};
use serde_json::json;

const DISK: Bytes = Bytes(100_000_000_000);

fn want() -> GpuRequest {
    GpuRequest { gpu_count: Some(1), min_disk: Some(DISK), ..GpuRequest::default() }
}

fn lease() -> Lease {
    Lease {
        tag: "outliers-me-r1-n1-4102444800".parse().expect("it is a tag"),
        ssh_public_key: "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey me".to_owned(),
        disk: DISK,
    }
}

async fn cheapest(cloud: &FakeCloud, want: &GpuRequest) -> Offer {
    let offers = cloud.broker().offers(want).await.expect("there are offers").offers;
    offers.into_iter().min_by_key(|offer| offer.price).expect("there is one")
}

#[tokio::test]
async fn an_instance_from_offer_to_end() {
    let cloud = FakeCloud::start(Vast);
    let broker = cloud.broker();
    let offer = cheapest(&cloud, &GpuRequest { tier: Some(Tier::Secure), ..want() }).await;
    let stock = cloud.world().stock.iter().find(|stock| stock.id == "1001").unwrap().clone();
    // 100 GB at 20 cents a month.
    assert_eq!(offer.price, UsdPerHour(Usd::from_dollars(1.89) + Usd::from_dollars(100.0 * 0.2 / 720.0)));
    assert_eq!((offer.gpu.as_deref(), offer.cpu_ram), (Some("A100-80GB"), Some(Bytes::from_gib(117))));
    assert_eq!(offer.disk, Some(Bytes::from_gib(stock.disk_gib)));

    let created = broker.create(&offer, &lease()).await.unwrap();
    assert_eq!(created.tag(), Some(lease().tag));
    let made = cloud.world().instances[0].clone();
    assert_eq!(made.public_key.as_deref(), Some("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey me"));
    assert_eq!((made.disk_gib, made.stock.spot), (93, false));

    let seen = broker.get(&created.id).await.unwrap().unwrap();
    let expected = InstanceState::Ready(made.ssh);
    let seen = if seen.state == expected { seen } else { broker.get(&created.id).await.unwrap().unwrap() };
    assert_eq!((seen.state, seen.price, seen.name), (expected, Some(offer.price), lease().tag.to_string()));

    broker.terminate(&created.id).await.unwrap();
    broker.terminate(&created.id).await.unwrap();
    assert_eq!(broker.get(&created.id).await.unwrap(), None);
    assert_eq!(cloud.world().live().count(), 0);
    assert!(cloud.world().requests.iter().all(|request| request.path.ends_with('/')));
}

#[tokio::test]
async fn a_bid_that_is_too_low_leaves_nothing_behind() {
    let cloud = FakeCloud::start(Vast);
    let offer = Offer { key: r#"{"ask":1005,"bid":0.01}"#.to_owned(), ..cheapest(&cloud, &want()).await };
    let error = cloud.broker().create(&offer, &lease()).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Maybe);
    assert!(error.message.contains("was terminated"), "{error}");
    let world = cloud.world();
    assert_eq!((world.instances.len(), world.live().count()), (1, 0));
}

#[tokio::test]
async fn what_can_be_taken_back_is_a_bid() {
    let cloud = FakeCloud::start(Vast);
    let spot = GpuRequest { spot: true, gpu_count: Some(2), ..want() };
    assert!(cloud.broker().offers(&GpuRequest { spot: false, ..spot.clone() }).await.unwrap().offers.is_empty());
    let offer = cheapest(&cloud, &spot).await;
    let stock = cloud.world().stock.iter().find(|stock| stock.spot).unwrap().clone();
    assert_eq!((offer.spot, offer.price), (true, Vast.price(&stock, 93)));
    cloud.broker().create(&offer, &lease()).await.unwrap();
    let sent = cloud.world().requests.last().unwrap().json().unwrap();
    assert_eq!(sent["price"], 1.2);
}

#[tokio::test]
async fn success_is_what_the_answer_says_not_its_status() {
    let cloud = FakeCloud::start(Vast);
    let offer = cheapest(&cloud, &want()).await;
    let gone = json!({"success": false, "error": "no_such_ask", "msg": "error 410/3907: no_such_ask"});
    for (answer, expected) in [(gone, BrokerErrorKind::NoCapacity), (json!({"success": true}), BrokerErrorKind::Maybe)]
    {
        let how = How::Say(Answer::json(200, &answer));
        cloud.world().faults.push(Fault { on: Op::Create, applied: false, how, times: 1 });
        assert_eq!(cloud.broker().create(&offer, &lease()).await.unwrap_err().kind, expected, "{answer}");
    }
    let refused = How::Say(Answer::json(200, &json!({"success": false, "error": "busy"})));
    cloud.world().faults.push(Fault { on: Op::Terminate, applied: false, how: refused, times: 1 });
    assert!(cloud.broker().terminate(&InstanceId("17".to_owned())).await.is_err());
}

#[tokio::test]
async fn every_page_is_read_and_a_missing_one_is_an_error() {
    let cloud = FakeCloud::start(Vast);
    {
        let mut world = cloud.world();
        world.page_size = 7;
        world.stock[0].left = 100;
        (0..60).for_each(|_| drop(world.plant("somebody's")));
    }
    assert_eq!(cloud.broker().list().await.unwrap().len(), 60);
    cloud.world().truncates = true;
    let error = cloud.broker().list().await.unwrap_err();
    assert!(error.message.contains("7 of 60"), "{error}");
}

#[tokio::test]
async fn ids_are_numbers() {
    let cloud = FakeCloud::start(Vast);
    let id = InstanceId("17/../../users/current".to_owned());
    assert_eq!(cloud.broker().terminate(&id).await.unwrap_err().kind, BrokerErrorKind::Rejected);
    assert_eq!(cloud.broker().get(&id).await.unwrap_err().kind, BrokerErrorKind::Rejected);
    assert!(cloud.world().requests.is_empty());
}

#[tokio::test]
async fn the_account_tells_what_is_left() {
    let cloud = FakeCloud::start(Vast);
    let account = cloud.broker().check().await.unwrap();
    assert_eq!(
        (account.who.as_deref(), account.balance),
        (Some("somebody@example.com"), Some(Usd::from_dollars(25.5)))
    );
}
