//! What the queue and the leases' folders show, and what it means. Every word comes from the
//! cluster and is read strictly.

use super::{Kind, NAME, error};
use crate::broker::{BrokerError, Instance, InstanceId, InstanceState, LeaseTag, SshEndpoint};
use crate::text::clean;
use crate::transport::quote::quote;
use crate::units::UsdPerHour;

/// A submission that is under way, or was cut short, is waited for so long.
const SUBMITTING_S: u64 = 120;

/// The leases' folders below `root`, then the whole queue of one user, ended jobs too as far as
/// Slurm remembers them: a folder that says that it was submitted has its job in what is seen
/// later. A job's name may hold anything and stands last: what follows a line break in one is no
/// line of ours.
pub(super) fn look(root: &str) -> String {
    format!(
        "digits() {{ head -n 1 \"$1\" 2> /dev/null | tr -cd 0-9 | head -c 15; }}\n\
         if cd {root} 2> /dev/null; then for lease in outliers-*/; do\n\
           lease=${{lease%/}}; [ -d \"$lease\" ] || continue\n\
           stage=waiting; for go in \"$lease\"/outliers/*/go; do [ -f \"$go\" ] && stage=launched; done\n\
           since=$(digits \"$lease/submitting\")\n\
           [ -n \"$since\" ] && [ $(($(date +%s) - since)) -lt {SUBMITTING_S} ] && stage=submitting\n\
           ends=$(digits \"$lease/ends\")\n\
           echo \"@lease $lease|$stage|$ends|$(sed -n 1p \"$lease/lease\" 2> /dev/null)\"\n\
         done; fi\n\
         squeue --me --noheader --states=all --format='@job %i|%T|%r|%P|%e|%N|%j' && echo '@end '",
        root = quote(root),
    )
}

/// The rest of the first line `@<key> ...`.
pub(super) fn field<'a>(answer: &'a str, key: &str) -> Option<&'a str> {
    answer.lines().find_map(|line| line.strip_prefix('@')?.strip_prefix(key)?.strip_prefix(' '))
}

/// What one look saw.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    jobs: Vec<Job>,
    leases: Vec<Folder>,
    /// Lines that are none, cut to a readable length.
    odd: Vec<String>,
}

/// A job as `squeue` shows it.
#[derive(Clone, Debug, PartialEq)]
struct Job {
    number: String,
    state: String,
    reason: String,
    partition: String,
    ends: Option<u64>,
    node: String,
    name: String,
}

/// A lease's folder.
#[derive(Clone, Debug, PartialEq)]
struct Folder {
    tag: LeaseTag,
    stage: Stage,
    ends: Option<u64>,
    what: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Submitting,
    /// No worker was started.
    Waiting,
    /// There may be files worth having.
    Launched,
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Waits,
    Boots,
    Runs,
    Leaves,
    Ended,
    Unknown,
}

impl Job {
    fn read(line: &str) -> Option<Self> {
        let mut parts = line.splitn(7, '|').map(|part| part.trim().to_owned());
        let mut next = || parts.next();
        let (number, state, reason, partition) = (next()?, next()?, next()?, next()?);
        let (ends, node, name) = (next()?.parse().ok(), next()?, next()?);
        let is_number = number.starts_with(|c: char| c.is_ascii_digit())
            && number.chars().all(|c| c.is_ascii_alphanumeric() || "_[]-,%+".contains(c));
        let is_word = !state.is_empty() && state.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        (is_number && is_word).then_some(Self { number, state, reason, partition, ends, node, name })
    }

    fn tag(&self) -> Option<LeaseTag> {
        self.name.parse().ok()
    }

    fn life(&self) -> Life {
        match self.state.as_str() {
            "PENDING" | "REQUEUED" | "REQUEUE_FED" | "REQUEUE_HOLD" | "RESV_DEL_HOLD" | "SPECIAL_EXIT" | "SUSPENDED"
            | "STOPPED" => Life::Waits,
            "CONFIGURING" | "POWER_UP_NODE" => Life::Boots,
            "RUNNING" | "RESIZING" | "SIGNALING" => Life::Runs,
            "COMPLETING" | "STAGE_OUT" => Life::Leaves,
            "BOOT_FAIL" | "CANCELLED" | "COMPLETED" | "DEADLINE" | "FAILED" | "LAUNCH_FAILED" | "NODE_FAIL"
            | "OUT_OF_MEMORY" | "PREEMPTED" | "RECONFIG_FAIL" | "REVOKED" | "TIMEOUT" => Life::Ended,
            _ => Life::Unknown,
        }
    }

    /// Why it waits.
    fn waits_for(&self) -> String {
        let (number, reason) = (&self.number, clean(self.reason.as_bytes(), 120));
        let partition = clean(self.partition.as_bytes(), 40);
        let more = match (self.state.as_str(), reason.as_str()) {
            (_, "JobHeldUser") => format!(": you hold it, and `scontrol release {number}` lets it go"),
            (_, "JobHeldAdmin") => ": an administrator holds it".to_owned(),
            (_, "PartitionTimeLimit") => format!(": it never starts, for {partition} allows less time"),
            ("SUSPENDED" | "STOPPED", _) => ": another job has its place for now".to_owned(),
            _ => String::new(),
        };
        format!("job {number} in {partition}: {} ({reason}{more})", self.state)
    }

    /// How it ended, in Slurm's word and in others.
    fn ended(&self) -> String {
        let words = match self.state.as_str() {
            "BOOT_FAIL" | "NODE_FAIL" => "its node failed",
            "CANCELLED" => "it was cancelled",
            "DEADLINE" => "it waited for too long",
            "OUT_OF_MEMORY" => "it used more memory than it had asked for",
            "PREEMPTED" => "another job took its place",
            "TIMEOUT" => "its time limit was reached",
            "COMPLETED" => "its script ended",
            _ => "it failed",
        };
        format!("{}: {words}", self.state)
    }
}

impl Folder {
    fn read(line: &str) -> Option<Self> {
        let mut parts = line.splitn(4, '|');
        let mut next = || parts.next().map(str::trim);
        let (tag, stage) = (next()?.parse().ok()?, next()?);
        let (ends, what) = (next()?.parse().ok(), next()?);
        let stage = match stage {
            "submitting" => Stage::Submitting,
            "waiting" => Stage::Waiting,
            "launched" => Stage::Launched,
            _ => return None,
        };
        Some(Self { tag, stage, ends, what: clean(what.as_bytes(), 120) })
    }
}

impl Snapshot {
    /// What [`look`] printed.
    ///
    /// # Errors
    /// It did not get to its end: half a list is none.
    pub(super) fn read(answer: &str) -> Result<Self, BrokerError> {
        let mut snapshot = Self::default();
        for line in answer.lines() {
            if let Some(job) = line.strip_prefix("@job ") {
                match Job::read(job) {
                    Some(job) => snapshot.jobs.push(job),
                    None => snapshot.odd.push(clean(job.as_bytes(), 120)),
                }
            } else if let Some(lease) = line.strip_prefix("@lease ") {
                snapshot.leases.extend(Folder::read(lease));
            }
        }
        match field(answer, "end") {
            Some(_) => Ok(snapshot),
            None => Err(error(Kind::Unavailable, "the queue's list broke off".to_owned())),
        }
    }

    /// The job of a tag: one that lives, else the last that ended.
    fn job(&self, tag: &str) -> Option<&Job> {
        let of = || self.jobs.iter().filter(|job| job.name == tag);
        of().find(|job| job.life() != Life::Ended).or_else(|| of().next_back())
    }

    fn folder(&self, tag: &str) -> Option<&Folder> {
        self.leases.iter().find(|folder| folder.tag.to_string() == tag)
    }

    /// The number of a tag's job while it lives.
    pub(super) fn number(&self, tag: &str) -> Option<String> {
        self.job(tag).filter(|job| job.life() == Life::Runs).map(|job| job.number.clone())
    }

    /// How a tag's job ended; `None` while it waits or runs, or where that is not known.
    pub(super) fn over(&self, tag: &str) -> Option<String> {
        match (self.job(tag), self.folder(tag)) {
            (Some(job), _) if job.life() == Life::Ended => Some(job.ended()),
            (None, Some(folder)) if folder.stage != Stage::Submitting => {
                Some("it is in the queue no more".to_owned())
            }
            _ => None,
        }
    }

    /// When the job's time is up, or was. A job that waits has all of its time, and one that was
    /// taken away lost it otherwise.
    pub(super) fn ends_at(&self, tag: &str) -> Option<u64> {
        let by_its_script = || self.folder(tag)?.ends;
        match self.job(tag) {
            Some(job) => match job.life() {
                Life::Runs | Life::Leaves => job.ends.or_else(by_its_script),
                Life::Ended if matches!(job.state.as_str(), "TIMEOUT" | "COMPLETED" | "FAILED") => by_its_script(),
                _ => None,
            },
            None => by_its_script(),
        }
    }

    /// All jobs of the user, and all leases that still have a folder. `door` is the login node.
    pub(super) fn instances(&self, door: &SshEndpoint) -> Vec<Instance> {
        let mut tags: Vec<LeaseTag> = self.leases.iter().map(|folder| folder.tag.clone()).collect();
        let living = |job: &&Job| job.life() != Life::Ended;
        for tag in self.jobs.iter().filter(living).filter_map(Job::tag) {
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        let ours = tags.iter().map(|tag| self.lease(&tag.to_string(), door));
        let foreign = self.jobs.iter().filter(living).filter(|job| job.tag().is_none()).map(other);
        ours.chain(foreign).chain(self.odd.iter().map(|line| unreadable(line))).collect()
    }

    fn lease(&self, tag: &str, door: &SshEndpoint) -> Instance {
        let folder = self.folder(tag);
        let job = self.job(tag);
        let life = job.map_or(Life::Ended, Job::life);
        let why = || job.map_or_else(|| "it is in the queue no more".to_owned(), Job::ended);
        let state = match (life, folder.map(|folder| folder.stage)) {
            (Life::Waits, _) => InstanceState::Queued(job.map(Job::waits_for).unwrap_or_default()),
            (Life::Boots, _) | (Life::Ended, Some(Stage::Submitting)) => InstanceState::Booting,
            (Life::Runs, Some(_)) | (Life::Leaves | Life::Ended, Some(Stage::Launched)) => {
                InstanceState::Ready(door.clone())
            }
            // Its folder goes before it does.
            (Life::Runs | Life::Leaves, None) => InstanceState::Terminating,
            (Life::Leaves, Some(_)) => InstanceState::Booting,
            (Life::Ended, _) => InstanceState::Failed(format!("its job is over, {}", why())),
            (Life::Unknown, _) => {
                InstanceState::Unknown(job.map(|job| clean(job.state.as_bytes(), 40)).unwrap_or_default())
            }
        };
        Instance {
            broker: NAME.to_owned(),
            id: InstanceId(tag.to_owned()),
            name: tag.to_owned(),
            state,
            price: Some(UsdPerHour::default()),
            hardware: folder.map(|folder| folder.what.clone()).unwrap_or_default(),
            created_at: None,
        }
    }
}

/// A job of the user's that is none of ours.
fn other(job: &Job) -> Instance {
    let state = match job.life() {
        Life::Waits => InstanceState::Queued(job.waits_for()),
        _ => InstanceState::Unknown(format!("{} on {}", job.state, clean(job.node.as_bytes(), 40))),
    };
    Instance {
        broker: NAME.to_owned(),
        id: InstanceId(job.number.clone()),
        name: clean(job.name.as_bytes(), 80),
        state,
        price: None,
        hardware: String::new(),
        created_at: None,
    }
}

fn unreadable(line: &str) -> Instance {
    Instance {
        broker: NAME.to_owned(),
        id: InstanceId(String::new()),
        name: String::new(),
        state: InstanceState::Unreadable(format!("squeue printed `{line}`")),
        price: None,
        hardware: String::new(),
        created_at: None,
    }
}
