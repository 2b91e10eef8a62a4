use super::*;

fn item() -> Value {
    json!({
        "cloudId": "NVIDIA A100 80GB PCIe", "gpuType": "A100_80GB", "socket": "PCIe", "provider": "runpod",
        "region": "united_states", "dataCenter": "US-KS-2", "country": "US", "gpuCount": 1, "gpuMemory": 80,
        "disk": {
            "minCount": 120, "defaultCount": 120, "maxCount": 3000, "pricePerUnit": 0.00014, "step": 1,
            "defaultIncludedInPrice": false, "additionalInfo": "Runpod uses 40GB of disk size for the filesystem."
        },
        "sharedDisk": {"minCount": null, "defaultCount": null, "maxCount": null, "pricePerUnit": null, "step": null},
        "vcpu": {"minCount": null, "defaultCount": 14, "maxCount": null, "pricePerUnit": null, "step": null},
        "memory": {"minCount": null, "defaultCount": 125, "maxCount": null, "pricePerUnit": null, "step": null},
        "internetSpeed": null, "provisioningTime": null, "stockStatus": "Low", "security": "secure_cloud",
        "prices": {"onDemand": 1.6567999999999998, "communityPrice": null, "isVariable": null, "currency": "USD"},
        "images": ["vllm_llama_8b", "cuda_11_8_pytorch_2_1", "cuda_12_4_pytorch_2_4", "ubuntu_22_cuda_12", "custom_template"],
        "isSpot": null, "prepaidTime": null
    })
}

fn item_with(changes: Value) -> Value {
    let mut item = item();
    for (field, value) in changes.as_object().unwrap() {
        item[field] = value.clone();
    }
    item
}

fn plain(item: Value) -> Result<Offer, String> {
    offer(item, &GpuRequest::default(), CLOUD.image)
}

fn sku_of(offer: &Offer) -> Sku {
    serde_json::from_str(&offer.key).unwrap()
}

fn lease(gb: u64) -> Lease {
    Lease {
        tag: "outliers-me-r1-n1-1795250000".parse().unwrap(),
        ssh_public_key: "ssh-ed25519 AAAAC3Nz".to_owned(),
        disk: Bytes(gb * GB),
        stage: None,
    }
}

#[test]
fn offer_is_converted_to_our_units() {
    let offer = plain(item()).unwrap();
    assert_eq!((offer.gpu.as_deref(), offer.gpu_raw.as_deref()), (Some("A100-80GB"), Some("A100_80GB PCIe")));
    assert_eq!((offer.vram, offer.gpu_count), (Some(Bytes::from_gib(80)), 1));
    assert_eq!((offer.cpu_ram, offer.cpu_cores), (Some(Bytes::from_gib(125)), Some(14)));
    assert_eq!(offer.disk, Some(Bytes(3000 * GB)));
    assert_eq!(offer.price, UsdPerHour::from_dollars(1.6568));
    assert_eq!((offer.tier, offer.spot), (Some(Tier::Secure), false));
    assert_eq!(offer.region.as_deref(), Some("united_states, US, US-KS-2 (runpod)"));
}

#[test]
fn resources_above_the_default_are_priced() {
    let want = GpuRequest { min_disk: Some(Bytes(500 * GB)), ..GpuRequest::default() };
    let offer = offer(item(), &want, CLOUD.image).unwrap();
    assert_eq!(offer.price, UsdPerHour::from_dollars(1.6568 + 380.0 * 0.00014));

    let range = |default, most, step| Range {
        default_count: Some(default),
        max_count: Some(most),
        price_per_unit: Some(0.5),
        step: Some(step),
    };
    let taken = |ordered, extra| Taken { ordered: Some(ordered), extra };
    assert_eq!(range(100, 400, 50).take(0), taken(100, 0.0));
    assert_eq!(range(100, 400, 50).take(101), taken(150, 25.0));
    assert_eq!(range(100, 400, 50).take(1000), taken(400, 150.0));
    assert_eq!(range(100, 400, 0).take(130), taken(130, 15.0));
    let fixed = Range { default_count: Some(512), ..Range::default() };
    assert_eq!((fixed.take(9999), fixed.most()), (Taken { ordered: None, extra: 0.0 }, Some(512)));
    assert_eq!(Range::default().most(), None);
}

#[test]
fn incomparable_offers_are_skipped_with_a_reason() {
    let prices = |price: Value, currency: &str| json!({"prices": {"onDemand": price, "currency": currency}});
    for (changes, reason) in [
        (prices(json!(1.0), "EUR"), "priced in EUR"),
        (json!({"prepaidTime": 24}), "paid in advance"),
        (json!({"stockStatus": "Unavailable"}), "not in stock"),
        (json!({"isSpot": true}), "can be taken back at any time"),
        (json!({"gpuCount": 16}), "several machines"),
        (json!({"gpuType": "CPU_NODE", "gpuCount": 1}), "no GPU"),
        (json!({"gpuCount": 0}), "no GPU"),
        (json!({"images": ["vllm_llama_8b"]}), "no image with CUDA"),
        (prices(Value::Null, "USD"), "no price that can be"),
        (prices(json!(-2.0), "USD"), "no price that can be"),
        (json!({"socket": null}), "not readable"),
        (json!({"disk": {"defaultCount": -5}}), "not readable"),
    ] {
        assert_eq!(plain(item_with(changes.clone())), Err(reason.to_owned()), "{changes}");
    }
    let want = GpuRequest { spot: true, ..GpuRequest::default() };
    assert!(offer(item_with(json!({"isSpot": true})), &want, CLOUD.image).unwrap().spot);
    let shared =
        item_with(json!({"prices": {"communityPrice": 0.7, "currency": "USD"}, "security": "community_cloud"}));
    let shared = plain(shared).unwrap();
    assert_eq!((shared.price, shared.tier), (UsdPerHour::from_dollars(0.7), Some(Tier::Community)));
}

#[test]
fn image_is_chosen_from_the_offer() {
    let image = |images: &[&str], preferred: &str| {
        let item = item_with(json!({"images": images}));
        offer(item, &GpuRequest::default(), preferred).map(|offer| sku_of(&offer).image)
    };
    let all = ["prime_rl", "cuda_11_8_pytorch_2_1", "cuda_12_6_pytorch_2_7", "ubuntu_22_cuda_12"];
    assert_eq!(image(&all, "ubuntu_22_cuda_12").as_deref(), Ok("ubuntu_22_cuda_12"));
    assert_eq!(image(&all, "no_such").as_deref(), Ok("cuda_12_6_pytorch_2_7"));
    assert_eq!(image(&all[..2], "no_such").as_deref(), Ok("cuda_11_8_pytorch_2_1"));
}

#[test]
fn order_repeats_every_field_that_identifies_the_offer() {
    let offer = plain(item()).unwrap();
    let ordered = order(&sku_of(&offer), offer.price, &lease(200), "ssh_1");
    let expected = json!({
        "pod": {
            "name": "outliers-me-r1-n1-1795250000", "cloudId": "NVIDIA A100 80GB PCIe", "gpuType": "A100_80GB",
            "socket": "PCIe", "gpuCount": 1, "image": "ubuntu_22_cuda_12", "maxPrice": 1.66, "sshKeyId": "ssh_1",
            "autoRestart": false, "dataCenterId": "US-KS-2", "country": "US", "security": "secure_cloud", "diskSize": 200
        },
        "provider": {"type": "runpod"}
    });
    assert_eq!(ordered, expected);

    let fixed = plain(item_with(json!({"disk": {"defaultCount": 512}, "dataCenter": null, "country": null}))).unwrap();
    let ordered = order(&sku_of(&fixed), UsdPerHour::from_dollars(2.0), &lease(200), "ssh_1");
    let pod = ordered["pod"].as_object().unwrap();
    assert!(["diskSize", "memory", "dataCenterId", "country"].iter().all(|field| !pod.contains_key(*field)), "{pod:?}");
    assert_eq!(pod["maxPrice"], 2.0);
}

#[test]
fn memory_is_ordered_where_the_offer_allows_it() {
    let memory = json!({"memory": {"defaultCount": 32, "maxCount": 256, "pricePerUnit": 0.004, "step": 16}});
    let want = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(60)), ..GpuRequest::default() };
    let offer = offer(item_with(memory), &want, CLOUD.image).unwrap();
    assert_eq!(
        (offer.cpu_ram, offer.price),
        (Some(Bytes::from_gib(64)), UsdPerHour::from_dollars(1.6568 + 32.0 * 0.004))
    );
    assert_eq!(order(&sku_of(&offer), offer.price, &lease(1), "k")["pod"]["memory"], 64);
}

fn pod_with(changes: Value) -> Pod {
    let mut pod = json!({
        "id": "9f2c1f0e-6f9b-4f4e-9d5c-0a1b2c3d4e5f", "userId": "user_123", "teamId": null, "walletId": "wallet_123",
        "name": "outliers-me-r1-n1-1795250000", "type": "HOSTED", "providerType": "runpod", "status": "ACTIVE",
        "installationStatus": "FINISHED", "installationFailure": null, "installationProgress": 100,
        "createdAt": "2026-11-21T04:00:00Z", "updatedAt": "2026-11-21T04:00:00Z", "terminatedAt": null,
        "gpuName": "A100_80GB", "gpuCount": 1, "socket": "PCIe", "priceHr": 1.657, "stoppedPriceHr": 0.02,
        "provisioningPriceHr": 0.0, "environmentType": "ubuntu_22_cuda_12", "primePortMapping": [],
        "sshConnection": "root@135.23.125.123 -p 2222", "ip": "135.23.125.123", "isSpot": false, "autoRestart": false
    });
    for (field, value) in changes.as_object().unwrap() {
        pod[field] = value.clone();
    }
    serde_json::from_value(pod).unwrap()
}

fn ready(user: &str, host: &str, port: u16) -> InstanceState {
    InstanceState::Ready(SshEndpoint { host: host.to_owned(), port, user: user.to_owned() })
}

#[test]
fn instance_is_converted_to_our_fields() {
    let instance = pod_with(json!({})).into_instance();
    assert_eq!(
        (instance.id.0.as_str(), instance.hardware.as_str()),
        ("9f2c1f0e-6f9b-4f4e-9d5c-0a1b2c3d4e5f", "1 x A100-80GB")
    );
    assert_eq!(instance.tag().map(|tag| tag.deadline), Some(1_795_250_000));
    assert_eq!(instance.price, Some(UsdPerHour::from_dollars(1.657)));
    assert_eq!(instance.created_at, Some(1_795_233_600));
    assert_eq!(instance.state, ready("root", "135.23.125.123", 2222));
}

#[test]
fn stopped_instance_uses_its_stopped_price_or_full_price() {
    let price = |changes| pod_with(changes).into_instance().price.map(|price| price.0.dollars());
    assert_eq!(price(json!({"status": "STOPPED"})), Some(0.02));
    assert_eq!(price(json!({"status": "STOPPED", "stoppedPriceHr": null})), Some(1.657));
}

#[test]
fn every_cloud_state_is_mapped() {
    let failed = |words: &str| InstanceState::Failed(words.to_owned());
    for (changes, expected) in [
        (
            json!({"status": "PROVISIONING", "installationStatus": "PENDING", "sshConnection": null}),
            InstanceState::Booting,
        ),
        (json!({"status": "PENDING", "installationStatus": null}), InstanceState::Booting),
        (json!({"installationStatus": "ACTIVE"}), InstanceState::Booting),
        (json!({"sshConnection": [null]}), InstanceState::Booting),
        (json!({"sshConnection": ["ubuntu@10.0.0.7"]}), ready("ubuntu", "10.0.0.7", 22)),
        (
            json!({"installationStatus": "ERROR", "installationFailure": "no driver"}),
            failed("its installation failed: no driver"),
        ),
        (json!({"status": "ERROR"}), failed("it could not be started")),
        (json!({"status": "STOPPED"}), InstanceState::Stopped),
        (json!({"status": "DELETING"}), InstanceState::Terminating),
        (json!({"status": "UNKNOWN"}), InstanceState::Unknown("UNKNOWN".to_owned())),
        (json!({"status": "DREAMING"}), InstanceState::Unknown("DREAMING".to_owned())),
    ] {
        assert_eq!(pod_with(changes.clone()).state(), expected, "{changes}");
    }
    assert!(pod_with(json!({"status": "TERMINATED"})).is_over());
}

#[test]
fn ssh_addresses_are_parsed_strictly() {
    let read = |text| endpoint(text).map(|endpoint| endpoint.to_string());
    assert_eq!(read("root@1.2.3.4 -p 22").as_deref(), Some("root@1.2.3.4:22"));
    assert_eq!(read("ubuntu@host-1.example.com").as_deref(), Some("ubuntu@host-1.example.com:22"));
    for text in [
        "",
        "1.2.3.4",
        "root@1.2.3.4 -p",
        "root@1.2.3.4 -p 0",
        "root@1.2.3.4 -p 99999",
        "root@1.2.3.4 -oProxyCommand=x",
        "root@-oProxyCommand=x",
        "-oProxyCommand=x@host",
        "root@a;reboot",
        "root@a -p 22 -p 23",
        "root@None -p None",
    ] {
        assert_eq!(read(text), None, "{text}");
    }
}

#[test]
fn refusal_messages_map_to_error_kinds() {
    use BrokerErrorKind as Kind;
    for (status, body, expected) in [
        (401, json!({"detail": "Invalid API key"}), Kind::Auth),
        (402, json!({"detail": "Insufficient funds"}), Kind::Budget),
        (400, json!({"detail": "Insufficient funds in wallet"}), Kind::Budget),
        (400, json!({"detail": "No capacity available for the requested configuration"}), Kind::NoCapacity),
        (404, json!({"detail": "This GPU is no longer available"}), Kind::NoCapacity),
        (404, json!({"detail": "Pod not found"}), Kind::NotFound),
        (422, json!({"errors": [{"param": "pod.cloudId", "details": "Field required"}]}), Kind::Rejected),
        (422, json!({"detail": [{"loc": ["body"], "msg": "Field required", "type": "missing"}]}), Kind::Rejected),
        (307, json!(""), Kind::Maybe),
    ] {
        assert_eq!(kind_of(&Response::recorded(Idempotency::Once, status, &body)), expected, "{status} {body}");
    }
    assert!(is_gone(&Response::recorded(Idempotency::Read, 404, json!({"detail": "Pod not found"}))));
    assert!(!is_gone(&Response::recorded(Idempotency::Read, 404, "<html>404</html>")));
}
