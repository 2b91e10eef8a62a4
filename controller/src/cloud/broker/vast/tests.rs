use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::*;

fn ask() -> Value {
    json!({
        "id": 30_143_891, "ask_contract_id": 30_143_891, "machine_id": 88888, "host_id": 55555, "gpu_name": "H100 PCIE",
        "num_gpus": 1, "gpu_ram": 81559, "gpu_total_ram": 81559, "gpu_frac": 0.125, "cpu_cores": 256,
        "cpu_cores_effective": 32.0, "cpu_ram": 1_031_854, "disk_space": 1834.2, "dph_base": 1.8667, "dph_total": 1.8944,
        "min_bid": 0.9333, "storage_cost": 0.2, "inet_down": 2034.9, "reliability2": 0.9981, "verification": "verified",
        "hosting_type": 1, "geolocation": "Texas, US", "direct_port_count": 249, "cuda_max_good": 12.8,
        "duration": 2_534_567.1, "rentable": true, "rented": false, "is_bid": false, "external": null
    })
}

fn ask_with(field: &str, value: Value) -> Value {
    let mut ask = ask();
    ask[field] = value;
    ask
}

fn lease() -> Lease {
    Lease {
        tag: "outliers-me-r1-n1-1795250000".parse().unwrap(),
        ssh_public_key: "ssh-ed25519 AAAAC3Nz it's mine\n".to_owned(),
        disk: Bytes(99_500_000_000),
        stage: None,
    }
}

#[test]
fn offer_is_converted_to_our_units() {
    let offer = offer(ask(), false).unwrap();
    assert_eq!(offer.gpu.as_deref(), Some("H100"));
    assert_eq!(offer.gpu_raw.as_deref(), Some("H100 PCIE"));
    assert_eq!((offer.vram, offer.vram_reported), (Some(Bytes::from_gib(80)), Some(Bytes::from_mib(81559))));
    // An eighth of the machine: 32 of 256 cores.
    assert_eq!((offer.cpu_ram, offer.cpu_cores), (Some(Bytes((1_031_854 << 20) / 8)), Some(32)));
    assert_eq!(offer.disk, Some(Bytes(1_834_000_000_000)), "whole gigabytes are rented");
    assert_eq!(offer.price, UsdPerHour::from_dollars(1.8944));
    assert_eq!((offer.region.as_deref(), offer.tier, offer.spot), (Some("Texas, US"), Some(Tier::Secure), false));
    assert_eq!(offer.max_cuda, Some(CudaVersion { major: 12, minor: 8 }));
    assert_eq!(offer.download, Some(Bytes(254_362_500)));
    assert_eq!(offer.machine.as_deref(), Some("88888"));
    assert_eq!(offer.key, r#"{"ask":30143891}"#);
}

#[test]
fn spot_price_is_the_minimum_bid_plus_disk() {
    let offer = offer(ask(), true).unwrap();
    assert_eq!(offer.price, UsdPerHour::from_dollars(0.9333 + 0.0277));
    assert!(offer.spot);
    assert_eq!(offer.key, r#"{"ask":30143891,"bid":0.9333}"#);
}

#[test]
fn absent_fields_are_unknown() {
    for (field, value) in [("cpu_cores", Value::Null), ("cpu_ram", json!("much")), ("cpu_cores_effective", json!(-1))] {
        assert_eq!(offer(ask_with(field, value), false).unwrap().cpu_ram, None, "{field}");
    }
    let bare = offer(json!({"id": 1, "gpu_name": "H200", "num_gpus": 8, "dph_total": 20}), false).unwrap();
    assert_eq!((bare.gpu.as_deref(), bare.vram, bare.vram_reported), (Some("H200"), Some(Bytes::from_gib(141)), None));
    assert_eq!((bare.cpu_ram, bare.disk, bare.tier, bare.max_cuda, bare.machine), (None, None, None, None, None));
}

#[test]
fn cpu_architecture_and_compute_capability_are_parsed() {
    let told = |field: &str, value: Value| {
        let offer = offer(ask_with(field, value), false).unwrap();
        (offer.capability, offer.arm)
    };
    assert_eq!(told("gpu_name", json!("H100 PCIE")), (Some(90), false));
    assert_eq!(told("gpu_name", json!("Rubin R200")), (None, false));
    assert_eq!(told("compute_cap", json!(1210)), (Some(121), false));
    assert_eq!(told("compute_cap", json!(-3)), (Some(90), false), "no figure that can be one");
    for (arch, arm) in [(json!("arm64"), true), (json!("aarch64"), true), (json!("amd64"), false), (json!(7), false)] {
        assert_eq!(told("cpu_arch", arch.clone()).1, arm, "{arch}");
    }
    assert!(told("gpu_name", json!("GH200 SXM")).1);
}

#[test]
fn unusable_offers_are_skipped_with_a_reason() {
    for (field, value, reason) in [
        ("rentable", json!(false), "rented already"),
        ("rented", json!(true), "rented already"),
        ("duration", json!(3600), "the host's contract ends within 6 hours"),
        ("num_gpus", json!(0), "no GPU"),
        ("disk_space", json!(9.9), "less than 10 GB of disk"),
        ("dph_total", json!(-1.5), "no price that can be"),
        ("dph_total", json!(1e30), "no price that can be"),
        ("dph_total", json!("cheap"), "not readable"),
        ("id", Value::Null, "not readable"),
    ] {
        assert_eq!(offer(ask_with(field, value), false), Err(reason.to_owned()), "{field}");
    }
    assert_eq!(offer(ask_with("min_bid", json!(500)), true), Err("no bid is possible".to_owned()));
    assert_eq!(offer(json!("an offer"), false), Err("not readable".to_owned()));
}

#[test]
fn search_contains_only_the_requested_filters() {
    let asked = query(&GpuRequest::default(), RentalKind::OnDemand);
    assert_eq!(
        (&asked["type"], &asked["num_gpus"], &asked["allocated_storage"]),
        (&json!("ondemand"), &json!({"eq": 1}), &json!(10))
    );
    for field in
        ["gpu_ram", "cpu_ram", "disk_space", "dph_total", "cuda_max_good", "datacenter", "geolocation", "gpu_name"]
    {
        assert_eq!(asked.get(field), None, "{field}");
    }
    let want = GpuRequest {
        gpu_count: Some(0),
        min_vram: Some(Bytes::from_gib(80)),
        min_disk: Some(Bytes(99_500_000_000)),
        max_price: Some(UsdPerHour::from_dollars(3.0)),
        region: Some("us".to_owned()),
        tier: Some(Tier::Secure),
        min_cuda: Some("12.4".parse().unwrap()),
        ..GpuRequest::default()
    };
    let asked = query(&want, RentalKind::OnDemand);
    for (field, expected) in [
        ("type", json!("ondemand")),
        ("gpu_ram", json!({"gte": 73728.0})),
        ("disk_space", json!({"gte": 100})),
        ("allocated_storage", json!(100)),
        ("dph_total", json!({"lte": 3.0 + 1e-6})),
        ("cuda_max_good", json!({"gte": 12.4 - 0.06})),
        ("datacenter", json!({"eq": true})),
    ] {
        assert_eq!(asked[field], expected, "{field}");
    }
    assert_eq!((asked.get("num_gpus"), asked.get("geolocation")), (None, None));
    assert_eq!(query(&want, RentalKind::Bid).get("dph_total"), None, "a bid may be lower");
}

#[test]
fn order_has_a_price_only_for_spot() {
    let ordered = order(&OfferKey { ask: 1, bid: None }, &lease(), "image").unwrap();
    assert_eq!(ordered.get("price"), None);
    assert_eq!(ordered["label"], "outliers-me-r1-n1-1795250000");
    assert_eq!(
        (&ordered["disk"], &ordered["runtype"], &ordered["cancel_unavail"]),
        (&json!(100), &json!("ssh_direct"), &json!(true))
    );
    assert_eq!(order(&OfferKey { ask: 1, bid: Some(0.9) }, &lease(), "image").unwrap()["price"], 0.9);
    let broken = Lease { ssh_public_key: "ssh-ed25519 A\nssh-ed25519 B".to_owned(), ..lease() };
    assert!(order(&OfferKey { ask: 1, bid: None }, &broken, "image").is_err());
}

#[test]
fn start_script_adds_the_key_once() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().display().to_string();
    let script = on_start(lease().ssh_public_key.trim()).replace("/root", &root).replace("/etc", &root);
    fs::create_dir(home.path().join(".ssh")).unwrap();
    fs::write(home.path().join(".ssh/authorized_keys"), "ssh-ed25519 account's").unwrap();
    for _ in 0..2 {
        assert!(Command::new("sh").args(["-c", &script]).env("CONTAINER_ID", "12").status().unwrap().success());
    }
    let keys = fs::read_to_string(home.path().join(".ssh/authorized_keys")).unwrap();
    assert_eq!(keys, "ssh-ed25519 account's\nssh-ed25519 AAAAC3Nz it's mine\n");
    assert!(fs::read_to_string(home.path().join("environment")).unwrap().contains("CONTAINER_ID=12"));
}

fn contract() -> Value {
    json!({
        "id": 7_835_610, "machine_id": 88888, "host_id": 55555, "label": "outliers-me-r1-n1-1795250000",
        "actual_status": "running", "intended_status": "running", "cur_state": "running", "next_state": "running",
        "status_msg": "success, running pytorch/pytorch_2.8.0", "image_runtype": "ssh", "gpu_name": "H100 PCIE",
        "num_gpus": 1, "gpu_ram": 81559, "disk_space": 100.0, "dph_base": 1.8667, "dph_total": 1.8944, "is_bid": false,
        "public_ipaddr": "203.0.113.42\n", "ssh_host": "ssh5.vast.ai", "ssh_port": 15610, "ssh_idx": "5",
        "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40022"}, {"HostIp": "::", "HostPort": "40022"}]},
        "start_date": 1_795_236_000.2, "end_date": 1_797_700_000.0
    })
}

fn state_with(changes: Value) -> InstanceState {
    let mut contract = contract();
    for (field, value) in changes.as_object().unwrap() {
        contract[field] = value.clone();
    }
    serde_json::from_value::<Contract>(contract).unwrap().state()
}

fn ready(host: &str, port: u16) -> InstanceState {
    InstanceState::Ready(SshEndpoint { host: host.to_owned(), port, user: "root".to_owned() })
}

#[test]
fn instance_is_converted_to_our_fields() {
    let instance = serde_json::from_value::<Contract>(contract()).unwrap().into_instance();
    assert_eq!((instance.id.0.as_str(), instance.hardware.as_str()), ("7835610", "1 x H100"));
    assert_eq!(instance.tag().map(|tag| tag.run), Some("r1".to_owned()));
    assert_eq!(instance.price, Some(UsdPerHour::from_dollars(1.8944)));
    assert_eq!(instance.created_at, Some(1_795_236_000));
    assert_eq!(instance.state, ready("203.0.113.42", 40022));
}

#[test]
fn every_cloud_state_is_mapped() {
    let oci = "Error response from daemon: failed to create task for container: OCI runtime create failed";
    let failed = |words: &str| InstanceState::Failed(words.to_owned());
    let stopped =
        json!({"actual_status": null, "cur_state": "stopped", "intended_status": "stopped", "next_state": "stopped"});
    for (changes, expected) in [
        (json!({"actual_status": null, "status_msg": null}), InstanceState::Booting),
        (json!({"actual_status": "loading", "ports": null}), InstanceState::Booting),
        (json!({"actual_status": "created", "status_msg": null}), InstanceState::Booting),
        (
            json!({"actual_status": "created", "status_msg": oci}),
            failed(&format!("it was created and does not start: {oci}")),
        ),
        (stopped, failed("it could not be started, or was outbid: success, running pytorch/pytorch_2.8.0")),
        (json!({"actual_status": "stopped"}), InstanceState::Stopped),
        (json!({"actual_status": "exited", "status_msg": ""}), failed("exited")),
        (json!({"actual_status": "offline", "status_msg": "\u{1b}[2Jgone"}), failed("offline: gone")),
        (json!({"actual_status": "hibernating"}), InstanceState::Unknown("hibernating".to_owned())),
    ] {
        assert_eq!(state_with(changes.clone()), expected, "{changes}");
    }
}

#[test]
fn ssh_relay_is_used_without_a_direct_port() {
    assert_eq!(state_with(json!({"ports": null})), ready("ssh5.vast.ai", 15610));
    assert_eq!(state_with(json!({"ports": [1, 2]})), ready("ssh5.vast.ai", 15610));
    assert_eq!(state_with(json!({"public_ipaddr": "-oProxyCommand=sh"})), ready("ssh5.vast.ai", 15610));
    assert_eq!(state_with(json!({"ports": {"22/tcp": [{"HostPort": 40023}]}})), ready("203.0.113.42", 40023));
    assert_eq!(state_with(json!({"ports": {"22/tcp": [{"HostPort": "0"}]}})), ready("ssh5.vast.ai", 15610));
    assert_eq!(state_with(json!({"ports": {}, "ssh_port": "15610"})), InstanceState::Booting);
    assert_eq!(state_with(json!({"ports": {}, "ssh_host": "a;b"})), InstanceState::Booting);
}

#[test]
fn refusal_messages_map_to_error_kinds() {
    use BrokerErrorKind as Kind;
    let gone = "error 404/3603: no_such_ask Instance type by id 1234567 is not available.";
    for (status, body, expected) in [
        (404, json!({"error": "not_found", "msg": "Invalid user key"}), Kind::Auth),
        (401, json!({"success": false, "error": "auth_error", "msg": "Invalid user key"}), Kind::Auth),
        (410, json!({"success": false, "error": "no_such_ask", "msg": "no longer available"}), Kind::NoCapacity),
        (404, json!({"success": false, "error": "invalid_args", "msg": gone, "ask_id": 1_234_567}), Kind::NoCapacity),
        (200, json!({"success": false, "error": "no_such_ask"}), Kind::NoCapacity),
        (400, json!({"success": false, "error": "insufficient_credit", "msg": "see the billing page."}), Kind::Budget),
        (404, json!({"success": false, "error": "not_found", "msg": "Instance not found"}), Kind::NotFound),
        (400, json!({"success": false, "error": "invalid_price"}), Kind::Rejected),
        (200, json!({"success": false}), Kind::Rejected),
        (307, json!(""), Kind::Maybe),
    ] {
        assert_eq!(kind_of(&Response::recorded(Idempotency::Once, status, &body)), expected, "{status} {body}");
    }
}

#[test]
fn only_an_api_answer_proves_an_instance_gone() {
    for (status, body, gone) in [
        (404, r#"{"success":false,"error":"not_found","msg":"Instance not found"}"#, true),
        (404, r#"{"success":false,"error":"no_such_instance","msg":"Instance 7835610 not found."}"#, true),
        (404, r#"{"error":"not_found","msg":"Invalid user key"}"#, false),
        (404, "<html>404 Not Found</html>", false),
        (404, "", false),
    ] {
        assert_eq!(is_gone(&Response::recorded(Idempotency::Idempotent, status, body)), gone, "{body}");
    }
}

#[test]
fn only_null_means_no_instance() {
    assert!(serde_json::from_str::<Single>(r#"{"instances": null}"#).unwrap().instances.is_none());
    // An existing entry that cannot be parsed is an unreadable instance, not a missing one.
    for odd in [r#"{"instances": []}"#, r#"{"instances": {}}"#] {
        assert!(serde_json::from_str::<Single>(odd).unwrap().instances.is_some(), "{odd}");
    }
    for other in ["{}", "[]", "null"] {
        assert!(serde_json::from_str::<Single>(other).is_err(), "{other}");
    }
}

/// Runs the script with a fake curl, which records its arguments and standard input.
fn self_destruct(variables: &[(&str, &str)]) -> (bool, String, String) {
    let tools = tempfile::tempdir().unwrap();
    let note = tools.path().join("note");
    let curl = tools.path().join("curl");
    fs::write(&curl, format!("#!/bin/sh\necho \"$@\" >{0}\ncat >>{0}\n", note.display())).unwrap();
    fs::set_permissions(&curl, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", tools.path().display());
    let mut sh = Command::new("sh");
    let out =
        sh.args(["-c", SELF_DESTRUCT]).env_clear().env("PATH", path).envs(variables.iter().copied()).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), fs::read_to_string(note).unwrap_or_default(), said)
}

#[test]
fn self_termination_does_not_expose_the_key() {
    let (done, sent, said) = self_destruct(&[("CONTAINER_ID", "7835610"), ("CONTAINER_API_KEY", "abc123")]);
    assert!(done, "{said}");
    let (arguments, input) = sent.split_once('\n').unwrap();
    assert!(
        arguments.contains("-X DELETE") && arguments.ends_with("https://console.vast.ai/api/v0/instances/7835610/")
    );
    assert!(!arguments.contains("abc123") && !said.contains("abc123"));
    assert_eq!(input, "header = \"Authorization: Bearer abc123\"\n");
    for elsewhere in
        [&[][..], &[("CONTAINER_ID", "7/../8"), ("CONTAINER_API_KEY", "abc123")], &[("CONTAINER_ID", "7835610")]]
    {
        let (done, sent, said) = self_destruct(elsewhere);
        assert!(!done && sent.is_empty() && !said.is_empty(), "{elsewhere:?} {sent} {said}");
    }
}
