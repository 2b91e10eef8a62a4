//! The same deploy against a real OpenSSH server, as an instance of a small test cloud.

use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use outliers::cloud::broker::{
    Account, Broker, BrokerError, BrokerErrorKind, Capabilities, GpuRequest, Instance, InstanceId, InstanceState,
    Lease, LeaseTag, Offer, Offers,
};
use outliers::cloud::clouds::{BadHosts, Cloud, Clouds, Timeouts};
use outliers::cloud::estimate::Work;
use outliers::cloud::market::Quote;
use outliers::run::deploy::{Driver, Ports, SshHosts, Stop};
use outliers::run::ledger::{Ledger, RunRecord, RunWriter, now_ms};
use outliers::run::{GuardTimeouts, Intent, Pin, RunEvent, RunOutcome, RunSpec};
use outliers::units::{Bytes, UsdPerHour};
use outliers_protocol::{CorpusSource, JobSpec, ModelSource, Precision, Results, files};
use outliers_tests::golden::{assert_activations_equal, assert_statistics_equal};
use outliers_tests::programs::{golden, worker};
use outliers_tests::sha256;
use outliers_tests::sshd::Sshd;

/// A cloud whose instances are OpenSSH servers.
#[derive(Default)]
struct SshdCloud {
    instances: Mutex<Vec<(Instance, Sshd)>>,
    created: Mutex<usize>,
    /// Instances accept no login: the key is not installed.
    deaf: bool,
    /// MiB of disk of an instance, where it can be mounted.
    disk: Option<u32>,
    /// More lines of the servers' configuration.
    config: &'static str,
    /// Programs cannot be run from an instance's home folder.
    noexec: bool,
}

const NAME: &str = "sshd";

#[async_trait]
impl Broker for SshdCloud {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        Ok(Account::default())
    }

    async fn offers(&self, _want: &GpuRequest) -> Result<Offers, BrokerError> {
        Ok(Offers { offers: vec![offer()], dropped: Vec::new() })
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let failed = |message: String| BrokerError { broker: NAME, kind: BrokerErrorKind::Unavailable, message };
        let server = Sshd::start_with(self.config).map_err(|e| failed(e.to_string()))?;
        let mut server = server.ok_or_else(|| failed("no sshd".to_owned()))?;
        if let Some(mib) = self.disk {
            server.shrink_home(mib);
        }
        if self.noexec {
            server.mount_home("noexec");
        }
        if !self.deaf {
            server.authorize(&lease.ssh_public_key).map_err(|e| failed(e.to_string()))?;
        }
        let mut created = self.created.lock().unwrap();
        *created += 1;
        let instance = Instance {
            broker: NAME.to_owned(),
            id: InstanceId(format!("sshd-{created}")),
            name: lease.tag.to_string(),
            state: InstanceState::Ready(server.endpoint()),
            price: Some(offer.price),
            hardware: "this machine".to_owned(),
            created_at: Some(now_ms() / 1000),
        };
        self.instances.lock().unwrap().push((instance.clone(), server));
        Ok(instance)
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        Ok(self.instances.lock().unwrap().iter().map(|(instance, _)| instance.clone()).collect())
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        self.instances.lock().unwrap().retain(|(instance, _)| instance.id != *id);
        Ok(())
    }
}

fn offer() -> Offer {
    Offer {
        cpu_ram: Some(Bytes::from_gib(1)),
        cpu_cores: Some(1),
        disk: Some(Bytes::from_gib(1)),
        ..Offer::new(NAME, "one".to_owned(), 0, UsdPerHour::from_dollars(1.0))
    }
}

/// A run of a fixture, its model folder uploaded.
fn spec(fixture: &str, results: &Path) -> RunSpec {
    let text = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let model = text(golden(fixture).join("model"));
    let mut job = JobSpec::new(ModelSource::Folder { path: model.clone() });
    job.corpus.source = CorpusSource::TokenIds(text(golden(fixture).join("golden.safetensors")));
    job.precision = Precision::F32;
    job.save_activations = Some("activations.safetensors".to_owned());
    RunSpec {
        model,
        brokers: NAME.to_owned(),
        job,
        job_key: fixture.to_owned(),
        request: GpuRequest { gpu_count: Some(0), ..GpuRequest::default() },
        work: Work::default(),
        disk: Bytes::from_mib(16),
        push_model: true,
        keep_running: false,
        detach: false,
        max_duration_s: 600,
        watch: GuardTimeouts { lease_s: 600, unclaimed_s: 600 },
        budget: None,
        max_gpu_time: None,
        quote: Quote::default(),
        only_in_time: false,
        stage: None,
        results: text(results.to_owned()),
        output: Vec::new(),
        survey: None,
    }
}

async fn drive(cloud: &Arc<SshdCloud>, run: RunWriter, timeouts: Timeouts) -> RunRecord {
    let (hosts, bad_hosts) = (SshHosts::new(worker(), Bytes::from_gib(1), Bytes::from_gib(1)), BadHosts::default());
    let clouds = Clouds::from(vec![Cloud { broker: cloud.clone(), timeouts, is_local: false }]);
    let ports = Ports { clouds: &clouds, bad_hosts: &bad_hosts, hosts: &hosts, secrets: &[], start_throttle: None };
    let stop = tokio::sync::watch::Sender::new(Stop::Go);
    let record = Driver::new(run, ports, stop.subscribe(), &|_| {}).drive().await.unwrap();
    assert!(record.state.is_closed(), "{:?}", record.state);
    assert!(cloud.instances.lock().unwrap().is_empty(), "an instance is left");
    record
}

/// Whether there is an OpenSSH server; prints a message if not.
fn sshd_is_here() -> bool {
    Sshd::start().unwrap().is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn deploy_over_openssh_equals_the_reference() {
    if !sshd_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (cloud, ledger) = (Arc::new(SshdCloud::default()), Ledger::open(&folder.path().join("state")).unwrap());
    let run = ledger.plan(&spec("olmoe-bf16", &folder.path().join("results"))).unwrap();
    let record = drive(&cloud, run, Timeouts::LOCAL).await;
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed), "{record:?}");
    let home = Path::new(&record.state.results().unwrap().folder).to_owned();
    let reference = golden("olmoe-bf16");
    assert_activations_equal(&reference.join("golden.safetensors"), &home.join("activations.safetensors"));
    let results: Results = serde_json::from_slice(&std::fs::read(home.join(files::RESULTS)).unwrap()).unwrap();
    assert_statistics_equal(&reference.join("outliers.json"), &results);
    assert_eq!(
        results.model,
        reference.join("model").to_str().unwrap(),
        "the name asked for, not the path it was pushed to"
    );
    assert_eq!(*cloud.created.lock().unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn deploy_works_with_one_channel_and_a_noexec_home() {
    if !sshd_is_here() {
        return;
    }
    let mut clouds = vec![SshdCloud { config: "MaxSessions 1", ..SshdCloud::default() }];
    if Sshd::start().unwrap().unwrap().mount_home("noexec") {
        clouds.push(SshdCloud { noexec: true, ..SshdCloud::default() });
    }
    for cloud in clouds {
        let folder = tempfile::tempdir().unwrap();
        let (cloud, ledger) = (Arc::new(cloud), Ledger::open(&folder.path().join("state")).unwrap());
        let run = ledger.plan(&spec("llama-f32", &folder.path().join("results"))).unwrap();
        let record = drive(&cloud, run, Timeouts::LOCAL).await;
        assert_eq!(record.state.ending(), Some(&RunOutcome::Completed), "{:?}: {record:?}", cloud.config);
        assert!(record.state.results().is_some_and(|results| results.complete));
        assert_eq!(*cloud.created.lock().unwrap(), 1);
    }
    clear_away();
}

/// Removes the worker beside a home folder.
fn clear_away() {
    use std::os::unix::fs::MetadataExt;
    let here = tempfile::tempdir().unwrap();
    let (user, sha256) = (here.path().metadata().unwrap().uid(), sha256(&std::fs::read(worker()).unwrap()));
    // Without a mounted home, there is none.
    let _ = std::fs::remove_dir_all(format!("/var/tmp/outliers-{user}/bin/{sha256}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_that_rejects_our_key_is_terminated() {
    if !sshd_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cloud = Arc::new(SshdCloud { deaf: true, ..SshdCloud::default() });
    let ledger = Ledger::open(&folder.path().join("state")).unwrap();
    let run = ledger.plan(&spec("llama-f32", &folder.path().join("results"))).unwrap();
    let timeouts = Timeouts { ssh: std::time::Duration::from_secs(6), ..Timeouts::LOCAL };
    let record = drive(&cloud, run, timeouts).await;
    let said = record.state.ending().unwrap().to_string();
    assert!(said.contains("key") || said.contains("log in"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_with_an_unpinned_host_key_is_terminated() {
    if !sshd_is_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (cloud, ledger) = (Arc::new(SshdCloud::default()), Ledger::open(&folder.path().join("state")).unwrap());
    let mut run = ledger.plan(&spec("llama-f32", &folder.path().join("results"))).unwrap();
    // A controller had pinned a key; then another host got the address.
    let tag = LeaseTag {
        owner: run.owner().to_owned(),
        run: run.record().id.clone(),
        nonce: "n1".to_owned(),
        deadline: now_ms() / 1000 + 600,
    };
    let another = outliers::host::keys::RunKey::create(folder.path(), "another", "host").unwrap();
    let key = outliers::host::keys::RunKey::create(&run.folder(), outliers::run::deploy::KEY_FILE, "run").unwrap();
    run.append(RunEvent::Creating { intent: Box::new(Intent { offer: offer(), tag: tag.clone() }) }).unwrap();
    let lease = Lease { tag, ssh_public_key: key.public_line().to_owned(), disk: Bytes(0), stage: None };
    let instance = cloud.create(&offer(), &lease).await.unwrap();
    run.append(RunEvent::Created { instance: instance.id, price: instance.price }).unwrap();
    run.append(RunEvent::Reached { pin: Pin(another.public_line().to_owned()), price: None }).unwrap();
    let record = drive(&cloud, run, Timeouts::LOCAL).await;
    let said = record.state.ending().unwrap().to_string();
    assert!(said.contains("host key"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_without_disk_space_is_terminated() {
    if !sshd_is_here() || !Sshd::start().unwrap().unwrap().shrink_home(1) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cloud = Arc::new(SshdCloud { disk: Some(3), ..SshdCloud::default() });
    let ledger = Ledger::open(&folder.path().join("state")).unwrap();
    for (disk, word) in [(Bytes::from_mib(16), "disk"), (Bytes(0), "free")] {
        let mut spec = RunSpec { disk, ..spec("llama-f32", &folder.path().join("results")) };
        spec.request.min_disk = Some(disk);
        let record = drive(&cloud, ledger.plan(&spec).unwrap(), Timeouts::LOCAL).await;
        let said = record.state.ending().unwrap().to_string();
        assert!(said.contains(word), "{said}");
    }
}
