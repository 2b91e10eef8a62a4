use serde_json::{Value, json};

use super::pod::{Page, Pod};
use super::sku::{Sku, disk_gb, price};
use super::*;
use crate::cloud::broker::SshEndpoint;
use crate::cloud::http::HttpLimits;
use crate::units::{Bytes, CudaVersion, UsdPerHour};

/// A pod as documented, with `changes`.
fn pod(changes: Value) -> Value {
    let mut pod = json!({
        "id": "7h9k2m4n6p", "name": "outliers-o-r-n-1780315200", "image": "i", "args": "", "disk": 100, "ports": ["22/tcp"],
        "env": {"PUBLIC_KEY": "ssh-ed25519 AAAA"}, "registry": null, "status": "RUNNING",
        "actions": ["stop", "restart", "terminate"], "mounts": {}, "gpu": {"id": "NVIDIA GeForce RTX 4090", "count": 2},
        "cloud": "SECURE", "dataCenterId": "US-KS-2", "cudaVersion": "12.8",
        "ssh": {
            "proxy": {"host": "ssh.runpod.io", "port": 22, "username": "7h9k2m4n6p-64411eb2", "command": "ssh …"},
            "direct": {"host": "195.26.233.3", "port": 34446, "username": "root", "command": "ssh …"}
        },
        "template": null, "cost": 0.88, "locked": false, "globalNetworking": {"enabled": false},
        "runtime": {"uptime": 3600, "ports": [{"private": 22, "public": 34446, "type": "tcp", "ip": "195.26.233.3"}]},
        "createdAt": "2026-06-01T12:00:00Z", "startedAt": "2026-06-01T12:02:00Z"
    });
    for (name, value) in changes.as_object().unwrap() {
        pod[name] = value.clone();
    }
    pod
}

fn instance(changes: Value) -> Option<Instance> {
    serde_json::from_value::<Pod>(pod(changes)).unwrap().instance()
}

fn ready(host: &str, port: u16, user: &str) -> InstanceState {
    InstanceState::Ready(SshEndpoint { host: host.to_owned(), port, user: user.to_owned() })
}

#[test]
fn pod_is_converted_to_our_fields() {
    let expected = Instance {
        broker: "runpod".to_owned(),
        id: InstanceId("7h9k2m4n6p".to_owned()),
        name: "outliers-o-r-n-1780315200".to_owned(),
        state: ready("195.26.233.3", 34446, "root"),
        // Includes 100 GB at $0.10 a month.
        price: Some(UsdPerHour::from_dollars(0.893699)),
        hardware: "2 x RTX 4090".to_owned(),
        created_at: Some(1_780_315_200),
    };
    assert_eq!(instance(json!({})), Some(expected));
}

#[test]
fn every_pod_status_is_mapped() {
    let direct = json!({"direct": {"host": "h.example", "port": 22, "username": "u"}});
    let mapped =
        |ports: Value| json!({"ssh": {"proxy": null, "direct": null}, "runtime": {"uptime": 9, "ports": ports}});
    let booting = InstanceState::Booting;
    for (changes, expected) in [
        (json!({"status": "PROVISIONING", "ssh": direct}), booting.clone()),
        (json!({"status": "STARTING", "runtime": null}), booting.clone()),
        (json!({"ssh": direct}), ready("h.example", 22, "u")),
        (json!({"runtime": {"uptime": 0, "ports": []}}), booting.clone()),
        (json!({"runtime": {}}), ready("195.26.233.3", 34446, "root")),
        (json!({"runtime": null}), ready("195.26.233.3", 34446, "root")),
        (json!({"ssh": {"proxy": null, "direct": null}, "runtime": {"uptime": 0, "ports": []}}), booting.clone()),
        (json!({"ssh": null}), ready("195.26.233.3", 34446, "root")),
        (mapped(json!([{"private": 22, "public": 7, "type": "tcp", "ip": "1.2.3.4"}])), ready("1.2.3.4", 7, "root")),
        (mapped(json!([{"private": 22, "public": null, "type": "tcp", "ip": null}])), booting.clone()),
        (mapped(json!([{"private": 22, "public": 7, "type": "http", "ip": "1.2.3.4"}])), booting.clone()),
        (mapped(json!("none")), booting.clone()),
        // An invalid address must not reach a command line.
        (
            json!({"ssh": {"direct": {"host": "-oProxyCommand=x", "port": 1, "username": "u"}}, "runtime": null}),
            booting.clone(),
        ),
        (json!({"ssh": {"direct": {"host": "h", "port": 70000, "username": "u"}}, "runtime": null}), booting),
        (json!({"status": "EXITED", "cost": 0.0}), InstanceState::Stopped),
        (json!({"status": "ERROR"}), InstanceState::Failed("RunPod says ERROR".to_owned())),
        (json!({"status": "DREAMING\u{1b}[2J"}), InstanceState::Unknown("DREAMING".to_owned())),
        (json!({"status": 7}), InstanceState::Unknown(String::new())),
    ] {
        assert_eq!(instance(changes.clone()).unwrap().state, expected, "{changes}");
    }
    assert_eq!(instance(json!({"status": "TERMINATED"})), None);
}

#[test]
fn implausible_values_become_unknown() {
    let odd = instance(json!({"cost": "0.88", "gpu": null, "createdAt": 5, "disk": -1})).unwrap();
    assert_eq!((odd.price, odd.hardware.as_str(), odd.created_at), (None, "CPU only", None));
    assert_eq!(instance(json!({"cost": -1.0})).unwrap().price, None);
    assert_eq!(instance(json!({"cost": 1e300})).unwrap().price, None);
    let stopped = instance(json!({"cost": 0.0, "status": "EXITED"})).unwrap();
    assert_eq!(stopped.price, Some(UsdPerHour::from_dollars(0.0)));
    for status in ["PROVISIONING", "STARTING", "RUNNING", "ERROR"] {
        assert_eq!(instance(json!({"cost": 0.0, "status": status})).unwrap().price, None, "{status}");
    }
    // Its owner would be unknown.
    for field in ["id", "name"] {
        let mut nameless = pod(json!({}));
        nameless.as_object_mut().unwrap().remove(field);
        assert!(serde_json::from_value::<Pod>(nameless).is_err(), "{field}");
    }
}

#[test]
fn only_the_api_reports_a_missing_pod() {
    let gone = |status, body: &str| is_gone(&Response::recorded(Idempotency::Read, status, body));
    assert!(gone(404, r#"{"title": "Not Found", "status": 404, "detail": "pod not found"}"#));
    for (status, body) in
        [(404, "404 page not found"), (404, "<html></html>"), (404, ""), (404, "{}"), (403, r#"{"detail": "no"}"#)]
    {
        assert!(!gone(status, body), "{status} {body}");
    }
}

#[test]
fn next_page_needs_a_flag_and_a_cursor() {
    let next = |page: Value| serde_json::from_value::<Page>(page).map(|page| page.next()).ok();
    for (page, expected) in [
        (json!({"pods": []}), Some(Ok(None))),
        (json!({"pods": [], "pagination": null}), Some(Ok(None))),
        (json!({"pods": [], "pagination": {"hasNextPage": false, "nextCursor": null}}), Some(Ok(None))),
        (json!({"pods": [], "pagination": {"hasNextPage": true, "nextCursor": "x"}}), Some(Ok(Some("x".to_owned())))),
        (json!({"pods": [], "pagination": {"nextCursor": "x"}}), None),
        (json!({"pods": null}), None),
        (json!({}), None),
        (json!([]), None),
    ] {
        assert_eq!(next(page.clone()), expected, "{page}");
    }
    assert!(next(json!({"pods": [], "pagination": {"hasNextPage": true}})).unwrap().is_err());
}

#[test]
fn offer_prices_include_disks() {
    assert_eq!(disk_gb(None), 20);
    assert_eq!(disk_gb(Some(Bytes(1))), 20);
    assert_eq!(disk_gb(Some(Bytes::from_gib(100))), 108);
    assert_eq!(disk_gb(Some(Bytes(100_000_000_000))), 100);
    assert_eq!(price(2.0, 730), Ok(UsdPerHour::from_dollars(2.1)));
    for none in [f64::NAN, f64::INFINITY, -0.01, 10_001.0] {
        assert!(price(none, 20).is_err(), "{none}");
    }
}

fn runpod() -> RunPod {
    let http = Http::new(NAME, "http://127.0.0.1:9", None, HttpLimits::default()).unwrap();
    RunPod::new(ApiAccess { http, image: "runpod/pytorch:x".to_owned(), ssh_user: None, ssh_port: None })
}

fn lease() -> Lease {
    Lease {
        tag: "outliers-o-r-n-1780315200".parse().unwrap(),
        ssh_public_key: "ssh-ed25519 AAAA me\n".to_owned(),
        disk: Bytes::from_gib(100),
        stage: None,
    }
}

#[test]
fn order_contains_every_requirement() {
    let sku = Sku {
        gpu: "NVIDIA A100-SXM4-80GB".to_owned(),
        count: 4,
        tier: Tier::Community,
        place: None,
        ram_gib: None,
        min_cuda: None,
        bid_per_gpu: None,
    };
    let plain = json!({
        "name": "outliers-o-r-n-1780315200", "imageName": "runpod/pytorch:x", "cloudType": "COMMUNITY",
        "gpuTypeId": "NVIDIA A100-SXM4-80GB", "gpuCount": 4, "containerDiskInGb": 108, "volumeInGb": 0, "ports": "22/tcp",
        "supportPublicIp": true, "startSsh": true, "env": [{"key": "PUBLIC_KEY", "value": "ssh-ed25519 AAAA me"}],
        "terminateAfter": "2026-06-01T12:00:00Z"
    });
    assert_eq!(runpod().order(&sku, &lease()), plain);
    let full = Sku {
        place: Some("US-KS-2".to_owned()),
        ram_gib: Some(251),
        min_cuda: Some(CudaVersion { major: 12, minor: 8 }),
        bid_per_gpu: Some(Usd::from_micros(790_000)),
        ..sku
    };
    assert_eq!(serde_json::from_str::<Sku>(&full.key()).unwrap(), full);
    let order = runpod().order(&full, &lease());
    for (name, value) in [
        ("dataCenterId", json!("US-KS-2")),
        ("minMemoryInGb", json!(251)),
        ("minCudaVersion", json!("12.8")),
        ("bidPerGpu", json!(0.79)),
    ] {
        assert_eq!(order[name], value, "{name}");
    }
}

#[tokio::test]
async fn only_valid_ids_enter_urls() {
    for id in ["", "..", "a/b", "a?b", "a b", "%2e%2e"] {
        let id = InstanceId(id.to_owned());
        for error in [runpod().get(&id).await.unwrap_err(), runpod().terminate(&id).await.unwrap_err()] {
            assert_eq!(error.kind, BrokerErrorKind::Rejected, "{id}");
        }
    }
}

#[tokio::test]
async fn offer_key_of_another_broker_is_refused() {
    for (broker, key) in
        [("vast", r#"{"gpu":"x","count":1,"tier":"secure"}"#), (NAME, "12345"), (NAME, r#"{"gpu":"x"}"#)]
    {
        let offer = Offer { broker: broker.to_owned(), ..Offer::new(NAME, key.to_owned(), 1, UsdPerHour::default()) };
        assert_eq!(
            runpod().create(&offer, &lease()).await.unwrap_err().kind,
            BrokerErrorKind::Rejected,
            "{broker} {key}"
        );
    }
}
