//! Properties of RunPod only: deadlines, bids, pods that end themselves.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use outliers::cloud::broker::{Broker, BrokerErrorKind, GpuRequest, Lease, Offer};
use outliers::units::Bytes;
use outliers_clouds::dialect::runpod::RunPod;
use outliers_clouds::{ApiResponse, FakeCloud, How, Op, Refusal, Stock};
use serde_json::{Value, json};

fn lease(cloud: &FakeCloud) -> Lease {
    Lease {
        tag: format!("outliers-o-r-n-{}", cloud.state().now + 3600).parse().expect("this is a tag"),
        ssh_public_key: "ssh-ed25519 AAAA me".to_owned(),
        disk: Bytes::from_gib(100),
        stage: None,
    }
}

async fn first(broker: &dyn Broker, want: GpuRequest) -> Offer {
    broker.offers(&want).await.expect("there are offers").offers.swap_remove(0)
}

fn questions(cloud: &FakeCloud) -> Vec<Value> {
    let state = cloud.state();
    let asked = state.requests.iter().filter(|request| request.path == "/graphql" && request.op == Some(Op::Offers));
    asked.map(|request| request.json().expect("it is JSON")["variables"]["place"].clone()).collect()
}

#[tokio::test]
async fn cloud_terminates_a_pod_at_its_deadline() {
    let cloud = FakeCloud::start(RunPod::default());
    let broker = cloud.broker();
    let offer = first(&*broker, GpuRequest::default()).await;
    broker.create(&offer, &lease(&cloud)).await.unwrap();
    cloud.state().now += 3599;
    assert_eq!(broker.list().await.unwrap().len(), 1);
    cloud.state().now += 1;
    assert_eq!(broker.list().await.unwrap(), []);
    assert_eq!(cloud.state().live().count(), 0);
}

#[tokio::test]
async fn pod_is_rented_by_rest_without_graphql() {
    let cloud = FakeCloud::start(RunPod::rest_alone());
    let broker = cloud.broker();
    broker.check().await.unwrap();
    let want =
        GpuRequest { min_cpu_ram: Some(Bytes::from_gib(1)), min_cuda: "12.4".parse().ok(), ..GpuRequest::default() };
    let offer = first(&*broker, want).await;
    assert_eq!(offer.cpu_ram, None, "only GraphQL tells");
    let lease = lease(&cloud);
    let made = broker.create(&offer, &lease).await.unwrap();
    assert_eq!(made.tag(), Some(lease.tag.clone()));
    {
        let state = cloud.state();
        assert_eq!(made.price, Some(state.instances[0].price));
        assert_eq!(state.instances[0].public_key.as_deref(), Some("ssh-ed25519 AAAA me"));
    }
    assert_eq!(broker.list().await.unwrap().len(), 1);
    broker.terminate(&made.id).await.unwrap();
    assert_eq!(cloud.state().live().count(), 0);

    cloud.state().fail(Op::Create, How::Refuse(Refusal::NoCapacity));
    assert_eq!(broker.create(&offer, &lease).await.unwrap_err().kind, BrokerErrorKind::NoCapacity);
    cloud.state().fail_after(Op::Create, How::CutBody);
    assert_eq!(broker.create(&offer, &lease).await.unwrap_err().kind, BrokerErrorKind::Maybe);
    assert_eq!(cloud.state().live().count(), 1, "it was made, and a look at the list tells");
    let bid = Offer { key: offer.key.replace('}', ",\"bid_per_gpu\":100000}"), ..offer };
    assert_eq!(broker.create(&bid, &lease).await.unwrap_err().kind, BrokerErrorKind::Rejected);
}

#[tokio::test]
async fn bid_is_made_only_with_spot_allowed() {
    let cloud = FakeCloud::start(RunPod::default());
    let broker = cloud.broker();
    let want = GpuRequest { gpu_count: Some(2), ..GpuRequest::default() };
    assert_eq!(broker.offers(&want).await.unwrap().offers, []);
    let offer = first(&*broker, GpuRequest { spot: true, ..want }).await;
    assert!(offer.spot);
    let instance = broker.create(&offer, &lease(&cloud)).await.unwrap();
    let state = cloud.state();
    assert!(state.instances[0].stock.spot);
    assert_eq!(instance.price, Some(state.instances[0].price));
}

#[tokio::test]
async fn host_details_are_queried_only_when_needed() {
    let cloud = FakeCloud::start(RunPod::default());
    let broker = cloud.broker();
    assert_eq!(first(&*broker, GpuRequest::default()).await.cpu_ram, None);
    assert_eq!(questions(&cloud), [] as [Value; 0]);
    let gpu_filter = Some("A100".to_owned());
    let want = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(100)), gpu_filter, ..GpuRequest::default() };
    let offer = first(&*broker, want).await;
    assert_eq!(offer.cpu_ram, Some(Bytes::from_gib(117)));
    let expected = json!({
        "gpuCount": 1, "secureCloud": true, "minDisk": 20, "dataCenterId": "us-kansas-2", "minMemoryInGb": 100
    });
    assert_eq!(questions(&cloud), [expected]);
    // The request is as the offer.
    cloud.state().stock[0].ram_gib = Some(100);
    assert_eq!(broker.create(&offer, &lease(&cloud)).await.unwrap_err().kind, BrokerErrorKind::NoCapacity);
}

#[tokio::test]
async fn unknown_failure_of_a_create_call_is_ambiguous() {
    let cloud = FakeCloud::start(RunPod::default());
    let broker = cloud.broker();
    let offer = first(&*broker, GpuRequest::default()).await;
    let words = json!({"errors": [{"message": "Something went wrong."}], "data": {"podFindAndDeployOnDemand": null}});
    cloud.state().fail_after(Op::Create, How::Say(ApiResponse::json(200, &words)));
    let lease = lease(&cloud);
    assert_eq!(broker.create(&offer, &lease).await.unwrap_err().kind, BrokerErrorKind::Maybe);
    let found = broker.list().await.unwrap();
    assert_eq!(found.iter().filter(|instance| instance.tag().as_ref() == Some(&lease.tag)).count(), 1);
}

#[tokio::test]
async fn unconfirmed_termination_is_not_trusted() {
    let cloud = FakeCloud::start(RunPod::default());
    let broker = cloud.broker();
    let offer = first(&*broker, GpuRequest::default()).await;
    let id = broker.create(&offer, &lease(&cloud)).await.unwrap().id;
    cloud.state().fail(Op::Terminate, How::Html);
    assert_eq!(broker.terminate(&id).await.unwrap_err().kind, BrokerErrorKind::Unavailable);
    let refusal = json!({"title": "Conflict", "status": 409, "detail": "the pod belongs to a cluster"});
    cloud.state().fail(Op::Terminate, How::Say(ApiResponse::json(409, &refusal)));
    let error = broker.terminate(&id).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Rejected);
    assert!(error.message.contains("belongs to a cluster"), "{error}");
    broker.terminate(&id).await.unwrap();
}

#[tokio::test]
async fn out_of_stock_is_reported() {
    let cloud = FakeCloud::start(RunPod::default());
    cloud.state().stock.retain(|stock| stock.id == "1004");
    let offers = cloud.broker().offers(&GpuRequest::default()).await.unwrap();
    assert_eq!((offers.offers.len(), offers.dropped.len()), (0, 1));
    assert_eq!(offers.dropped[0].reason, "out of stock");
    cloud.state().stock =
        vec![Stock { price: outliers::units::UsdPerHour::from_dollars(-1.0), ..Stock::mixed().remove(0) }];
    let offers = cloud.broker().offers(&GpuRequest::default()).await.unwrap();
    assert_eq!(offers.dropped[0].reason, "its price makes no sense");
}

/// Runs the script with which a pod ends itself, with `programs` as its only external commands.
/// Returns their arguments.
fn end_itself(programs: &[(&str, &str)]) -> (bool, String, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("log");
    for (name, body) in programs {
        let path = folder.path().join(name);
        let log = log.display();
        fs::write(&path, format!("#!/bin/sh\necho \"{name} $*\" >> {log}\n{body}\n")).expect("a program");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it may run");
    }
    let script = FakeCloud::start(RunPod::default()).broker().self_destruct().expect("a pod can end itself");
    let search = format!("{}:/usr/bin:/bin", folder.path().display());
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(script).env_clear().env("PATH", search);
    let output = shell.env("RUNPOD_POD_ID", "pod7").env("RUNPOD_API_KEY", "sekret").output().expect("there is a shell");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned(), read(&log))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn pod_terminates_itself_by_any_working_api() {
    let echo_key = "cat 2>/dev/null; echo $RUNPOD_API_KEY; echo $RUNPOD_API_KEY >&2";
    let fails = format!("{echo_key}; exit 1");
    let by_graphql = format!("{echo_key}; case \"$*\" in *graphql*) exit 0 ;; esac; exit 22");
    let refused = format!("{echo_key}; case \"$*\" in *graphql*) echo '{{\"errors\": []}}'; exit 0 ;; esac; exit 22");
    for (runpodctl, curl, ends, calls) in [
        (echo_key, fails.as_str(), true, "runpodctl pod delete pod7\n"),
        (fails.as_str(), echo_key, true, "runpodctl pod delete pod7\nrunpodctl remove pod pod7\ncurl "),
        (fails.as_str(), by_graphql.as_str(), true, "https://api.runpod.io/graphql"),
        (fails.as_str(), refused.as_str(), false, "https://api.runpod.io/graphql"),
        (fails.as_str(), fails.as_str(), false, "--request DELETE https://api.runpod.io/v2/pods/pod7"),
    ] {
        let (ended, said, log) = end_itself(&[("runpodctl", runpodctl), ("curl", curl)]);
        assert_eq!(ended, ends, "{log}");
        assert!(log.contains(calls), "{log}");
        assert!(!log.contains("sekret") && !said.contains("sekret"), "the key is in: {said}{log}");
    }
}
