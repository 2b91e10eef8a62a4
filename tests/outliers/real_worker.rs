//! The real worker on both kinds of host that need no account: over SSH, and an instance of the
//! local broker.

use std::time::{Duration, SystemTime};

use outliers::cloud::broker::local::LocalBroker;
use outliers::cloud::broker::{Broker, GpuRequest, Lease, LeaseTag};
use outliers::host::{Cursor, HostEvent, JobStatus, Launched, RemoteHost, reach};
use outliers::run::output::unplanned;
use outliers::units::Bytes;
use outliers_protocol::{CorpusSource, JobSpec, ModelSource, Outcome, Phase, Results};
use outliers_tests::programs;
use outliers_tests::sshd::Sshd;
use tokio::time::Instant;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(120)
}

/// Everything a deploy does with a host, on a golden checkpoint.
async fn whole_path(host: RemoteHost) {
    let deadline = soon();
    let last = std::sync::Mutex::new(None);
    let on = |event| {
        if let HostEvent::Progress(progress) = event {
            *last.lock().unwrap() = Some(progress);
        }
    };
    let facts = host.probe().await.unwrap();
    assert_eq!((facts.os.as_str(), facts.arch.as_str()), ("Linux", std::env::consts::ARCH));
    let worker = host.push_worker(&programs::worker(), &on).await.unwrap();
    let golden = programs::golden(&programs::goldens()[0]);
    let model = host.push_folder(&golden.join("model"), "outliers/models/golden", 64 << 20, &on).await.unwrap();
    let ids =
        host.push_file(&golden.join("golden.safetensors"), "outliers/ids.safetensors", 64 << 20, &on).await.unwrap();
    let mut job = JobSpec::new(ModelSource::Folder { path: model.path });
    job.corpus.source = CorpusSource::TokenIds(ids);
    job.devices = vec!["cpu".to_owned()];
    let launched = host.launch(&worker, "r1", &job, &[]).await.unwrap();
    assert!(!matches!(launched, Launched::Running { .. }), "{launched:?}");
    let ended = host.follow("r1", &mut Cursor::default(), deadline, &on).await.unwrap();
    let home = tempfile::tempdir().unwrap();
    let into = home.path().join("r1");
    let fetched = host.fetch("r1", &into, &unplanned(&job), &on).await.unwrap();
    let log = std::fs::read_to_string(into.join("worker.log")).unwrap_or_default();
    assert_eq!(ended, JobStatus::Ended { exit: Some(0) }, "{log}");
    assert_eq!(fetched.manifest.unwrap().outcome, Outcome::Complete);
    let results: Results = serde_json::from_slice(&std::fs::read(into.join("results.json")).unwrap()).unwrap();
    assert!(results.n_sites > 0 && results.perplexity.is_some());
    assert_eq!(last.lock().unwrap().as_ref().unwrap().phase, Phase::Done);
}

#[tokio::test]
async fn worker_runs_on_a_real_openssh_server() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let reached = reach(&server.endpoint(), server.key().private_path(), None, soon(), &|_| {}).await;
    whole_path(reached.unwrap().0).await;
}

#[tokio::test]
async fn worker_runs_on_a_local_broker_instance() {
    let folder = tempfile::tempdir().unwrap();
    let broker = LocalBroker::new(folder.path().join("cloud"), programs::controller());
    let want = GpuRequest { gpu_count: Some(0), ..GpuRequest::default() };
    let offer = broker.offers(&want).await.unwrap().offers.into_iter().find(|offer| offer.gpu_count == 0).unwrap();
    let deadline = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() + 300;
    let word = |s: &str| s.to_owned();
    let tag = LeaseTag { owner: word("me"), run: word("r1"), nonce: word("n1"), deadline };
    let lease = Lease { tag, ssh_public_key: String::new(), disk: Bytes::from_mib(100), stage: None };
    let instance = broker.create(&offer, &lease).await.unwrap();
    let access = broker.instance_transport(&instance.id).unwrap();
    whole_path(RemoteHost::new(access.transport, access.name)).await;
    broker.terminate(&instance.id).await.unwrap();
    assert!(broker.list().await.unwrap().is_empty());
}
