//! Slurm: a cluster behind a login node, reached by the `ssh` program of this machine.
//!
//! An instance is a job and its folder on the shared file system of login and compute nodes:
//! `outliers-jobs/<tag>` below the scratch folder. The job's name is the tag, too, so that both
//! are found by it. A folder whose job is over still holds results. The job's script (`job.sh`)
//! waits for the worker, which is uploaded through the login node. Source: the manual pages of
//! Slurm 22.05 to 24.11 (sbatch, squeue, sinfo, scancel), and the recorded output of 22.05.8 in
//! the tests.
//!
//! A job that waits is [`InstanceState::Queued`] for up to [`Site::queue`], costs nothing, and is
//! not replaced by another. Its lease is extended by that time; the job's own time limit is the
//! run's.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{
    Account, Broker, BrokerError, BrokerErrorKind as Kind, Capabilities, GpuRequest, Instance, InstanceId,
    InstanceState, InstanceTransport, Lease, LeaseTag, Offer, Offers, RunTime,
};
use crate::cloud::http::Explain;
use crate::host::transport::program::OpenSsh;
use crate::host::transport::quote::quote;
use crate::secret::Secret;
use crate::text::clean;
use crate::units::{Bytes, Span, Usd, UsdPerHour};

mod cluster;
mod job;
mod offers;
mod queue;
mod stage;
#[cfg(test)]
mod tests;

use cluster::Cluster;
use job::JobTransport;
pub use stage::STAGED;
use stage::{SUFFIX, Staging};

/// The broker's name.
pub const NAME: &str = "slurm";
/// Script of a job, after its own variables.
const JOB: &str = include_str!("slurm/job.sh");
/// Time before its end at which a job receives SIGTERM. Shorter jobs receive none.
const WARNING: Duration = Duration::from_secs(120);
const MIN_WARNED: Duration = Duration::from_secs(600);

/// A cluster and its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// The login node: `user@name`, or an alias of the SSH configuration.
    pub host: String,
    /// Replaces `~/.ssh/config`.
    pub ssh_config: Option<PathBuf>,
    /// The only partition to use.
    pub partition: Option<String>,
    /// `--account`.
    pub account: Option<String>,
    /// `--qos`.
    pub qos: Option<String>,
    /// `--constraint`.
    pub constraint: Option<String>,
    /// A folder that login node and compute nodes share, absolute or below the home folder;
    /// `None`: the home folder.
    pub scratch: Option<String>,
    /// `HF_HOME` of a hub cache that all nodes share. Models in it are read from there.
    pub hf_home: Option<String>,
    /// The hub that nodes try to reach.
    pub hub: String,
    /// Partition of staging jobs.
    pub stage_partition: Option<String>,
    /// Token of staging jobs.
    pub token: Option<Secret>,
    /// Additional options of `sbatch`.
    pub sbatch: Vec<String>,
    /// How long a job may wait in the queue.
    pub queue: Duration,
    /// Memory of one GPU, if its type does not determine it.
    pub gpu_memory: Option<Bytes>,
    /// What an hour of one GPU costs, where the accounting is in money.
    pub price_per_gpu: UsdPerHour,
    /// `squeue` is asked no more often.
    pub listing_interval: Duration,
}

impl Site {
    /// The scratch folder as offers record it.
    fn recorded_scratch(&self) -> String {
        self.scratch.clone().unwrap_or_default()
    }

    /// This site with the scratch folder that an offer records.
    #[must_use]
    pub fn with_scratch(self, recorded: String) -> Self {
        Self { scratch: Some(recorded).filter(|path| !path.is_empty()), ..self }
    }

    /// What a job with this many GPUs costs while it runs.
    fn price(&self, gpus: u32) -> UsdPerHour {
        UsdPerHour(Usd::from_micros(self.price_per_gpu.0.micros().saturating_mul(gpus.into())))
    }
}

/// A cluster as one user reaches it.
pub struct Slurm {
    site: Site,
    /// The script that prints a node's facts.
    probe: &'static str,
    /// Offers whose records name no login node are of this cluster.
    takes_nameless: bool,
    cluster: Arc<Cluster>,
}

/// Parameters of an offer for [`Broker::create`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Sku {
    /// The cluster's login node. Empty: the offer was recorded by an earlier version.
    #[serde(default)]
    host: String,
    /// Its scratch folder, as [`Site::scratch`]. Empty: the home folder. `None`: the offer was
    /// recorded by an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scratch: Option<String>,
    partition: String,
    gpus: u32,
    /// As `--gres` names it.
    gpu_type: Option<String>,
    cpus: u32,
    mem_mib: u64,
    /// Time limit of the partition in seconds; `None`: unlimited.
    limit_s: Option<u64>,
}

impl Slurm {
    /// Connects through `ssh`; `explain` receives commands and answers. `probe` is the script that
    /// prints a node's facts (`host::PROBE`), which each job runs on its node.
    pub fn new(site: Site, ssh: OpenSsh, probe: &'static str, explain: Option<Explain>) -> Self {
        let cluster = Cluster::new(ssh, site.scratch.clone(), site.listing_interval, explain);
        Self { site, probe, takes_nameless: true, cluster: Arc::new(cluster) }
    }

    /// Whether offers that an earlier version recorded, without a login node, are of this cluster.
    #[must_use]
    pub fn taking_nameless(self, takes_nameless: bool) -> Self {
        Self { takes_nameless, ..self }
    }

    /// The options of `sbatch` for a share of one node and a time limit in minutes, each a word.
    fn limits(&self, sku: &Sku, time: Duration) -> Vec<String> {
        let minutes = time.as_secs().div_ceil(60).max(1);
        vec![
            format!("--partition={}", sku.partition),
            format!("--time={minutes}"),
            "--nodes=1".to_owned(),
            "--ntasks=1".to_owned(),
            format!("--cpus-per-task={}", sku.cpus),
            format!("--mem={}M", sku.mem_mib),
        ]
    }

    /// Makes Slurm remove a job that waits for too long.
    fn deadline(&self, time: Duration) -> String {
        format!("--deadline=now+{}", self.site.queue.as_secs() + time.as_secs() + 60)
    }

    /// As [`Self::limits`], with the other options of the job.
    fn options(&self, sku: &Sku, time: Duration) -> Vec<String> {
        let mut options = self.limits(sku, time);
        if sku.gpus > 0 {
            let kind = sku.gpu_type.as_ref().map(|kind| format!("{kind}:")).unwrap_or_default();
            options.push(format!("--gres=gpu:{kind}{}", sku.gpus));
        }
        let site = &self.site;
        for (name, value) in [("account", &site.account), ("qos", &site.qos), ("constraint", &site.constraint)] {
            options.extend(value.iter().map(|value| format!("--{name}={value}")));
        }
        options.extend(site.sbatch.iter().cloned());
        options
    }

    /// A script that creates the lease's folder, submits the job and prints the outcome.
    fn submission(&self, root: &str, sku: &Sku, lease: &Lease, time: Duration) -> String {
        let tag = lease.tag.to_string();
        let mut options = self.options(sku, time);
        options.extend([format!("--job-name={tag}"), "--parsable".to_owned(), "--requeue".to_owned()]);
        options.extend(["--output=job.log", "--open-mode=append"].map(str::to_owned));
        options.push(self.deadline(time));
        if time >= MIN_WARNED {
            options.push(format!("--signal=B:TERM@{}", WARNING.as_secs()));
        }
        let options: Vec<String> = options.iter().map(|option| quote(option)).collect();
        let folder = format!("{root}/{tag}");
        let staging = lease.stage.as_ref().zip(self.site.stage_partition.as_deref());
        let staging = staging.map(|(stage, partition)| self.staging(partition, stage, &tag, &folder, time));
        let Staging { write, submit } = staging.unwrap_or_default();
        let of = match self.cluster.name() {
            "" => String::new(),
            name => format!(" && echo {} > {}/cluster", quote(name), quote(&folder)),
        };
        let script = format!(
            "#!/bin/sh\nRUN=outliers/{} LIMIT={} HUB={}\nprobe() {{\n{}\n}}\n{JOB}",
            lease.tag.run,
            time.as_secs().div_ceil(60).max(1) * 60,
            quote(&self.site.hub),
            self.probe,
        );
        format!(
            "umask 077\n\
             if ! why=$({{ mkdir -p {cache} && mkdir {folder} && ln -s ../.cache {folder}/.cache && \
             printf '%s\\n' {what} > {folder}/lease && printf '%s' {script} > {folder}/job.sh{of}{write} && \
             date +%s > {folder}/submitting; }} 2>&1)\n\
             then echo \"@refused the scratch folder: $(echo $why)\"; exit 0; fi\n\
             cd {folder} || exit 1\nafter=''\n{submit}\
             if sbatch --chdir=\"$PWD\" $after {options} < job.sh > sbatch.out 2> sbatch.log; then\n\
               date +%s > ../.changed; cut -d ';' -f 1 < sbatch.out > sbatch.id && mv -f sbatch.id job.id\n\
               rm -f sbatch.out submitting\n\
               echo \"@submitted $(head -c 20 job.id)\"\n\
             else echo \"@refused $(tail -n 3 sbatch.log | tr '\\n' ' ')\"; fi",
            cache = quote(&format!("{root}/.cache")),
            folder = quote(&folder),
            what = quote(&what(sku)),
            script = quote(&script),
            options = options.join(" "),
        )
    }

    /// A script that cancels the job and its staging job, then removes its folder, and with the
    /// last folder the shared files. A job that is just ending may still write into its folder.
    fn removal(root: &str, user: &str, tag: &LeaseTag) -> String {
        let (name, root, user) = (tag.to_string(), quote(root), quote(user));
        format!(
            "scancel --user={user} --name={name} || exit 1\n\
             if [ -f {root}/{name}/stage.sh ] || [ ! -d {root}/{name} ]; then\n\
               scancel --user={user} --name={name}{SUFFIX} || exit 1\nfi\n\
             cd {root} 2> /dev/null || exit 0\n\
             i=0; until rm -rf ./{name}; do [ $i -lt 3 ] || exit 1; i=$((i + 1)); sleep 1; done\n\
             for left in outliers-*/; do [ -d \"$left\" ] && {{ date +%s > .changed; exit 0; }}; done\n\
             i=0; until mkdir .asking 2> /dev/null || [ $i -ge 5 ]; do i=$((i + 1)); sleep 1; done\n\
             rm -rf .cache .asking .asked* .changed .part-* .queue-* .places* .placed*\n\
             cd .. && rmdir {root} 2> /dev/null; exit 0"
        )
    }
}

/// The login node of the cluster that an offer is of, where its record tells.
pub fn login_node(offer: &Offer) -> Option<String> {
    Some(sku(offer)?.host).filter(|host| !host.is_empty())
}

/// The scratch folder in which an offer's job has its folder, where its record tells. Empty: the
/// home folder.
pub fn scratch(offer: &Offer) -> Option<String> {
    sku(offer)?.scratch
}

fn sku(offer: &Offer) -> Option<Sku> {
    let key = Some(&offer.key).filter(|_| offer.broker == NAME)?;
    serde_json::from_str(key).ok()
}

/// In words, the same for an offer and its instance.
fn what(sku: &Sku) -> String {
    match (sku.gpus, &sku.gpu_type) {
        (0, _) => format!("{} CPU cores in {}", sku.cpus, sku.partition),
        (gpus, Some(kind)) => format!("{gpus} x {kind} in {}", sku.partition),
        (gpus, None) => format!("{gpus} GPUs in {}", sku.partition),
    }
}

/// The GPUs of an instance, by what [`what`] said of it.
fn gpus_of(hardware: &str) -> u32 {
    let (count, rest) = hardware.split_once(' ').unwrap_or_default();
    let has_gpus = rest.starts_with("x ") || rest.starts_with("GPUs ");
    count.parse().ok().filter(|_| has_gpus).unwrap_or(0)
}

#[async_trait]
impl Broker for Slurm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        // A job ends at its time limit; before its start it ends at the deadline of its
        // submission.
        Capabilities { server_deadline: true, self_destruct: false, spot: false }
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        let login = self.cluster.login().await?;
        let answer = self.cluster.ask("sinfo --version && sinfo -h -o %P > /dev/null", Kind::Unavailable).await?;
        let version = answer.lines().next().unwrap_or_default();
        let who = format!("{} at {}, {}", login.user, self.site.host, clean(version.as_bytes(), 60));
        Ok(Account { who: Some(who), balance: None })
    }

    async fn offers(&self, want: &GpuRequest) -> Result<Offers, BrokerError> {
        let root = self.cluster.root().await?;
        let script = offers::script(&root, self.site.partition.as_deref());
        let answer = self.cluster.ask(&script, Kind::Unavailable).await?;
        if let Some(partition) = &self.site.partition
            && queue::field(&answer, "nodes").is_none()
        {
            let all = self.cluster.ask("sinfo -h -o %R | sort -u", Kind::Unavailable).await?;
            let all = all.split_whitespace().collect::<Vec<_>>().join(", ");
            let message = format!("no partition {partition} with nodes: there are {all}");
            return Err(error(Kind::Rejected, clean(message.as_bytes(), 300)));
        }
        let mut found = offers::read(&answer, want, &self.site);
        let questions: Vec<(usize, String)> = found
            .sku
            .iter()
            .take(offers::MAX_ASKED)
            .enumerate()
            .map(|(i, sku)| {
                let options = self.options(sku, Duration::from_secs(3600));
                (i, options.iter().map(|option| quote(option)).collect::<Vec<_>>().join(" "))
            })
            .collect();
        // Offers are valid without the queue's estimate.
        if let Ok(answer) = self.cluster.ask(&offers::when(&questions), Kind::Unavailable).await {
            found.note_starts(&answer);
        }
        Ok(found.offers)
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let Ok(sku) = serde_json::from_str::<Sku>(&offer.key) else {
            return Err(error(Kind::Rejected, format!("{:?} is no offer of this cluster's", offer.key)));
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let time = lease.tag.deadline.saturating_sub(now).saturating_sub(self.site.queue.as_secs());
        if time == 0 {
            return Err(error(Kind::Rejected, "there is no time left for a job".to_owned()));
        }
        if let Some(limit) = sku.limit_s.filter(|limit| *limit < time) {
            let message = format!(
                "partition {} lets a job run for {:#}, and the run has {:#}: a shorter --max-duration fits",
                clean(sku.partition.as_bytes(), 40),
                Span(Duration::from_secs(limit)),
                Span(Duration::from_secs(time))
            );
            return Err(error(Kind::Rejected, message));
        }
        if lease.stage.is_some() && self.site.stage_partition.is_none() {
            return Err(error(Kind::Rejected, "no stage-partition is set any more".to_owned()));
        }
        let root = self.cluster.root().await?;
        let script = self.submission(&root, &sku, lease, Duration::from_secs(time));
        let token = self.site.token.as_ref().filter(|_| lease.stage.is_some());
        // After any failure from here on the job may exist. Its name decides.
        let answer = self.cluster.ask_with(token, &script, Kind::Maybe).await;
        self.cluster.changed();
        let answer = answer?;
        if let Some(refusal) = queue::field(&answer, "refused") {
            let (kind, refusal) = (refused(refusal), clean(refusal.as_bytes(), 300));
            if kind != Kind::Maybe {
                let login = self.cluster.login().await?;
                // What is not removed is found by its tag.
                let _ = self.cluster.ask(&Self::removal(&root, &login.user, &lease.tag), Kind::Unavailable).await;
            }
            return Err(error(kind, format!("sbatch: {refusal}")));
        }
        if queue::field(&answer, "submitted").is_none() {
            return Err(error(Kind::Maybe, "sbatch did not say what became of the job".to_owned()));
        }
        let (name, state) = (lease.tag.to_string(), InstanceState::Queued("it was just submitted".to_owned()));
        Ok(Instance { price: Some(offer.price), hardware: what(&sku), ..Instance::new(NAME, &name, &name, state) })
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        let login_endpoint = self.cluster.login_endpoint(&self.site.host).await;
        let mut listed = self.cluster.snapshot().await?.instances(&login_endpoint);
        for ours in listed.iter_mut().filter(|instance| instance.tag().is_some()) {
            ours.price = Some(self.site.price(gpus_of(&ours.hardware)));
        }
        Ok(listed)
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        // Other jobs of the user are never cancelled.
        let Ok(tag) = id.0.parse::<LeaseTag>() else {
            return Err(error(Kind::Rejected, format!("{:?} is no job of this program: use scancel", id.0)));
        };
        let (login, root) = (self.cluster.login().await?, self.cluster.root().await?);
        let ended = self.cluster.ask(&Self::removal(&root, &login.user, &tag), Kind::Unavailable).await;
        self.cluster.changed();
        ended.map(drop)
    }

    fn made(&self, offer: &Offer) -> bool {
        // A job whose folder is elsewhere would look like one that is being ended.
        offer.broker == NAME
            && login_node(offer).map_or(self.takes_nameless, |host| host == self.site.host)
            && scratch(offer).is_none_or(|scratch| scratch == self.site.recorded_scratch())
    }

    async fn has_checkpoint(&self, folder: &str) -> Result<Option<bool>, BrokerError> {
        let file = quote(&format!("{folder}/config.json"));
        let script = format!("if [ -f {file} ]; then echo '@there '; else echo '@absent '; fi");
        let answer = self.cluster.ask(&script, Kind::Unavailable).await?;
        Ok(Some(queue::field(&answer, "there").is_some()))
    }

    fn instance_transport(&self, id: &InstanceId) -> Option<InstanceTransport> {
        let tag: LeaseTag = id.0.parse().ok()?;
        let job = self.cluster.seen(&id.0);
        let shell = match job {
            Some(number) => ["srun", &format!("--jobid={number}"), "--overlap", "--pty"].map(str::to_owned).to_vec(),
            None => Vec::new(),
        };
        let shell = shell.into_iter().chain(["sh".to_owned()]);
        Some(InstanceTransport {
            name: format!("job {} on {}", tag.run, self.site.host),
            shell: std::iter::once("ssh".to_owned()).chain(self.cluster.ssh().shell()).chain(shell).collect(),
            needs_guard: false,
            transport: Arc::new(JobTransport::new(self.cluster.clone(), tag)),
        })
    }

    fn ends_at(&self, id: &InstanceId) -> Option<u64> {
        self.cluster.latest()?.ends_at(&id.0)
    }

    fn run_time(&self, id: &InstanceId) -> Option<RunTime> {
        self.cluster.latest()?.run_time(&id.0)
    }
}

/// Kind of a refusal by `sbatch`. After a time-out the job may exist.
fn refused(words: &str) -> Kind {
    let words = words.to_lowercase();
    let has = |part: &str| words.contains(part);
    match () {
        () if has("file exists") || has("timed out") || has("zero bytes") || has("unexpected message") => Kind::Maybe,
        () if has("unable to contact") || has("connection refused") || has("munge") || has("authentication") => {
            Kind::Unavailable
        }
        () if has("temporarily") || has("try again") || has("too many") => Kind::RateLimited,
        () if has("quota") || has("no space left") => Kind::Budget,
        () if has("qos") || has("accounting") || has("policy") || has("limit") => Kind::Budget,
        () if has("invalid account") => Kind::Budget,
        () if has("not available") || has("busy") || has("down") => Kind::NoCapacity,
        () => Kind::Rejected,
    }
}

fn error(kind: Kind, message: String) -> BrokerError {
    BrokerError { broker: NAME, kind, message }
}
