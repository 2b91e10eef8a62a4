//! Properties of Vast.ai only.

use outliers::cloud::broker::{BrokerErrorKind, GpuRequest, InstanceId, InstanceState, Lease, Offer, Tier};
use outliers::cloud::estimate::Work;
use outliers::cloud::market::{self, Filter};
use outliers::units::{Bytes, Usd, UsdPerHour};
use outliers_clouds::dialect::Dialect;
use outliers_clouds::dialect::vast::Vast;
use outliers_clouds::{ApiResponse, FakeCloud, Fault, How, Op, Refusal};
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
        stage: None,
    }
}

async fn cheapest(cloud: &FakeCloud, want: &GpuRequest) -> Offer {
    let offers = cloud.broker().offers(want).await.expect("there are offers").offers;
    offers.into_iter().min_by_key(|offer| offer.price).expect("there is one")
}

#[tokio::test]
async fn instance_goes_from_offer_to_termination() {
    let cloud = FakeCloud::start(Vast);
    let broker = cloud.broker();
    let offer = cheapest(&cloud, &GpuRequest { tier: Some(Tier::Secure), ..want() }).await;
    let stock = cloud.state().stock.iter().find(|stock| stock.id == "1001").unwrap().clone();
    // 100 GB at 20 cents a month.
    assert_eq!(offer.price, UsdPerHour(Usd::from_dollars(1.89) + Usd::from_dollars(100.0 * 0.2 / 720.0)));
    assert_eq!((offer.gpu.as_deref(), offer.cpu_ram), (Some("A100-80GB"), Some(Bytes::from_gib(117))));
    // Whole gigabytes are reserved.
    assert_eq!(offer.disk, Some(Bytes(Bytes::from_gib(stock.disk_gib).0 / 1_000_000_000 * 1_000_000_000)));

    let created = broker.create(&offer, &lease()).await.unwrap();
    assert_eq!(created.tag(), Some(lease().tag));
    let made = cloud.state().instances[0].clone();
    assert_eq!(made.public_key.as_deref(), Some("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKey me"));
    assert_eq!((made.disk_gib, made.stock.spot), (93, false));

    let seen = broker.get(&created.id).await.unwrap().unwrap();
    let expected = InstanceState::Ready(made.ssh);
    let seen = if seen.state == expected { seen } else { broker.get(&created.id).await.unwrap().unwrap() };
    assert_eq!((seen.state, seen.price, seen.name), (expected, Some(offer.price), lease().tag.to_string()));

    broker.terminate(&created.id).await.unwrap();
    broker.terminate(&created.id).await.unwrap();
    assert_eq!(broker.get(&created.id).await.unwrap(), None);
    assert_eq!(cloud.state().live().count(), 0);
    assert!(cloud.state().requests.iter().all(|request| request.path.ends_with('/')));
}

#[tokio::test]
async fn too_low_bid_leaves_no_instance() {
    let cloud = FakeCloud::start(Vast);
    let offer = Offer { key: r#"{"ask":1005,"bid":0.01}"#.to_owned(), ..cheapest(&cloud, &want()).await };
    let error = cloud.broker().create(&offer, &lease()).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Maybe);
    assert!(error.message.contains("was terminated"), "{error}");
    let state = cloud.state();
    assert_eq!((state.instances.len(), state.live().count()), (1, 0));
}

#[tokio::test]
async fn interruptible_offers_need_spot_and_are_ordered_as_bids() {
    let cloud = FakeCloud::start(Vast);
    let spot = GpuRequest { spot: true, gpu_count: Some(2), ..want() };
    assert!(cloud.broker().offers(&GpuRequest { spot: false, ..spot.clone() }).await.unwrap().offers.is_empty());
    let offer = cheapest(&cloud, &spot).await;
    let stock = cloud.state().stock.iter().find(|stock| stock.spot).unwrap().clone();
    assert_eq!((offer.spot, offer.price), (true, Vast.price(&stock, 93)));
    cloud.broker().create(&offer, &lease()).await.unwrap();
    let sent = cloud.state().requests.last().unwrap().json().unwrap();
    assert_eq!(sent["price"], 1.2);
}

#[tokio::test]
async fn success_is_read_from_the_body_and_not_the_http_status() {
    let cloud = FakeCloud::start(Vast);
    let offer = cheapest(&cloud, &want()).await;
    let gone = json!({"success": false, "error": "no_such_ask", "msg": "error 410/3907: no_such_ask"});
    for (answer, expected) in [(gone, BrokerErrorKind::NoCapacity), (json!({"success": true}), BrokerErrorKind::Maybe)]
    {
        let how = How::Say(ApiResponse::json(200, &answer));
        cloud.state().faults.push(Fault { on: Op::Create, applied: false, how, times: 1 });
        assert_eq!(cloud.broker().create(&offer, &lease()).await.unwrap_err().kind, expected, "{answer}");
    }
    let refused = How::Say(ApiResponse::json(200, &json!({"success": false, "error": "busy"})));
    cloud.state().faults.push(Fault { on: Op::Terminate, applied: false, how: refused, times: 1 });
    assert!(cloud.broker().terminate(&InstanceId("17".to_owned())).await.is_err());
}

#[tokio::test]
async fn missing_page_of_a_list_is_an_error() {
    let cloud = FakeCloud::start(Vast);
    {
        let mut state = cloud.state();
        state.page_size = 7;
        state.stock[0].left = 100;
        (0..60).for_each(|_| drop(state.plant("somebody's")));
    }
    assert_eq!(cloud.broker().list().await.unwrap().len(), 60);
    cloud.state().truncates = true;
    let error = cloud.broker().list().await.unwrap_err();
    assert!(error.message.contains("7 of 60"), "{error}");
}

#[tokio::test]
async fn instance_ids_must_be_numbers() {
    let cloud = FakeCloud::start(Vast);
    let id = InstanceId("17/../../users/current".to_owned());
    assert_eq!(cloud.broker().terminate(&id).await.unwrap_err().kind, BrokerErrorKind::Rejected);
    assert_eq!(cloud.broker().get(&id).await.unwrap_err().kind, BrokerErrorKind::Rejected);
    assert!(cloud.state().requests.is_empty());
}

/// Hosts as they were observed in offers: V100 and Quadro RTX are below compute capability 8.0,
/// GH200 has an ARM processor; A100X is an Ampere card.
#[tokio::test]
async fn unsupported_hosts_are_excluded_and_counted() {
    let ask = |id: u32, gpu: &str, capability: u32, arch: &str| {
        json!({
            "id": id, "gpu_name": gpu, "num_gpus": 1, "dph_total": f64::from(id) / 10.0, "gpu_ram": 81920, "cpu_ram": 257_000,
            "cpu_cores": 64, "cpu_cores_effective": 16, "disk_space": 500, "cuda_max_good": 12.8, "duration": 9_000_000,
            "hosting_type": 1, "compute_cap": capability, "cpu_arch": arch, "rentable": true, "rented": false,
        })
    };
    let asks = [
        ask(1, "Tesla V100", 700, "amd64"),
        ask(2, "Q RTX 8000", 750, "amd64"),
        ask(3, "GH200 SXM", 900, "arm64"),
        ask(4, "A100X", 800, "amd64"),
        ask(5, "RTX 9000", 750, "amd64"),
        ask(6, "H100 PCIE", 900, "arm64"),
    ];
    let cloud = FakeCloud::start(Vast);
    cloud.state().fail_always(Op::Offers, How::Say(ApiResponse::json(200, &json!({"success": true, "offers": asks}))));
    let offers = cloud.broker().offers(&want()).await.unwrap().offers;
    let found = market::select(offers, &want(), &Work::default()).unwrap();
    assert_eq!(found.offers.iter().filter_map(|offer| offer.gpu.as_deref()).collect::<Vec<_>>(), ["A100X"]);
    let removed: Vec<_> =
        found.steps.iter().filter(|step| step.removed > 0).map(|step| (step.filter, step.removed)).collect();
    assert_eq!(removed, [(Filter::Processor, 2), (Filter::Capability, 3)]);
}

#[tokio::test]
async fn requested_price_is_read_without_other_calls() {
    let cloud = FakeCloud::start(Vast);
    let broker = cloud.broker();
    let id = InstanceId("123".to_owned());
    assert_eq!(broker.price_rise(&id).await.unwrap(), None);
    let rises = json!([
        {"pending_price_increase_id": 998, "contract_id": 77, "new_gpu_costpersec": 1.0, "old_gpu_costpersec": 0.5},
        {"pending_price_increase_id": 999, "contract_id": 123, "host_id": 7, "new_gpu_costpersec": 0.0002,
         "old_gpu_costpersec": 0.0001, "new_disk_ram_costpersec": null, "old_disk_ram_costpersec": null},
    ]);
    let answer = json!({"success": true, "count": 2, "truncated": false, "pending_price_increases": rises});
    cloud.state().fail(Op::Get, How::Say(ApiResponse::json(200, &answer)));
    let asked = broker.price_rise(&id).await.unwrap();
    assert_eq!(asked.as_deref(), Some("$0.72/h for its GPUs instead of $0.36/h"));
    assert!(cloud.state().requests.iter().all(|request| request.method == outliers::cloud::http::Method::GET));
}

#[tokio::test]
async fn exhausted_search_quota_is_reported_and_not_retried() {
    let cloud = FakeCloud::start(Vast);
    let used_up = json!({"success": false, "error": "search_quota_exceeded", "msg": "Search quota exceeded"});
    cloud.state().fail_always(Op::Offers, How::Say(ApiResponse::json(429, &used_up).retry_after(Some(1))));
    let error = cloud.broker().offers(&want()).await.unwrap_err();
    assert_eq!((error.kind, cloud.state().count(Op::Offers)), (BrokerErrorKind::Budget, 1));
    assert!(error.message.contains("quota of searches is used up"), "{error}");
}

#[tokio::test]
async fn long_retry_after_blocks_further_calls() {
    let cloud = FakeCloud::start(Vast);
    let broker = cloud.broker();
    cloud.state().fail(Op::Offers, How::Refuse(Refusal::RateLimited(Some(300))));
    for _ in 0..3 {
        let error = broker.offers(&want()).await.unwrap_err();
        assert_eq!(error.kind, BrokerErrorKind::RateLimited);
        assert!(
            error.message.contains("it asks to wait 2") || error.message.contains("it asks to wait 300 s"),
            "{error}"
        );
    }
    assert_eq!(cloud.state().count(Op::Offers), 1);
    assert_eq!(broker.list().await.unwrap().len(), 0, "calls of another kind are made");
}

#[tokio::test]
async fn account_shows_the_remaining_credit() {
    let cloud = FakeCloud::start(Vast);
    let account = cloud.broker().check().await.unwrap();
    assert_eq!(
        (account.who.as_deref(), account.balance),
        (Some("somebody@example.com"), Some(Usd::from_dollars(25.5)))
    );
}
