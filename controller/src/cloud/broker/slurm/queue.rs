//! Parses the queue and the leases' folders. Text from the cluster is untrusted and parsed
//! strictly.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Kind, NAME, SUFFIX, error};
use crate::calendar::rfc3339;
use crate::cloud::broker::{BrokerError, Instance, InstanceState, LeaseTag, RunTime, SshEndpoint};
use crate::host::transport::quote::quote;
use crate::text::clean;
use crate::units::UsdPerHour;

/// Seconds for which a running or interrupted submission is awaited.
const SUBMITTING_S: u64 = 120;

/// Maximum interval of queries that several processes share. Longer intervals are not shared.
const MAX_APART_S: u64 = 60;
/// Prints the input of [`Snapshot::read`], with an answer of `squeue` at most `interval` old.
const SNAPSHOT: &str = include_str!("snapshot.sh");

/// The clocks of login node, compute nodes and Slurm's controller differ by no more.
const CLOCKS_S: u64 = 30;

/// No job runs for longer than ten years: a figure beyond is none.
const LONGEST_S: u64 = 10 * 365 * 86_400;

/// Resolution of estimated start times, in seconds.
const ROUND_S: u64 = 600;

/// The leases' folders below `root` that are of this `cluster`, the whole queue of one user, and
/// how the jobs ended that it shows no more. `squeue` runs once per `interval`, however many
/// processes look. `cluster` is empty where its name is not known.
pub(super) fn snapshot_script(root: &str, cluster: &str, interval: Duration) -> String {
    let (root, cluster, seconds) = (quote(root), quote(cluster), interval.as_secs().min(MAX_APART_S));
    format!("ROOT={root} CLUSTER={cluster} INTERVAL={seconds} SUBMITTING={SUBMITTING_S}\n{SNAPSHOT}")
}

/// Rest of the first line `@<key> ...`.
pub(super) fn field<'a>(answer: &'a str, key: &str) -> Option<&'a str> {
    answer.lines().find_map(|line| line.strip_prefix('@')?.strip_prefix(key)?.strip_prefix(' '))
}

/// State of the queue and folders at one time.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    jobs: Vec<Job>,
    leases: Vec<Folder>,
    /// Of leases whose jobs the queue shows no more, how they ended.
    past: Vec<Past>,
    /// What the jobs' own scripts wrote down of their times.
    times: Vec<Times>,
    /// Of jobs that wait: number, place among all that wait in the partition, how many these are.
    places: Vec<(String, u64, u64)>,
    /// The cluster hides the jobs of others.
    places_hidden: bool,
    /// Of leases whose staging job failed: tag, and why.
    unstaged: Vec<(String, String)>,
    /// Lines that cannot be parsed, shortened.
    odd: Vec<String>,
}

/// A job in the output of `squeue`.
#[derive(Clone, Debug, PartialEq)]
struct Job {
    number: String,
    state: String,
    reason: String,
    partition: String,
    /// Actual or expected start.
    starts: Option<u64>,
    ends: Option<u64>,
    node: String,
    name: String,
}

/// A lease's folder.
#[derive(Clone, Debug, PartialEq)]
struct Folder {
    /// Tag of the lease.
    name: String,
    stage: Stage,
    ends: Option<u64>,
    what: String,
}

/// How a job ended that the queue shows no more.
#[derive(Clone, Debug, PartialEq)]
struct Past {
    tag: String,
    state: String,
    starts: Option<u64>,
    ends: Option<u64>,
}

/// What a job's script wrote down: seconds of its earlier starts, when it began, when it was at
/// work last.
#[derive(Clone, Debug, PartialEq)]
struct Times {
    tag: String,
    ended_s: u64,
    began: u64,
    alive: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Submitting,
    /// The worker was not started.
    Waiting,
    /// The worker was started; results may exist.
    Launched,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JobPhase {
    Waits,
    Boots,
    Runs,
    Leaves,
    Ended,
    Unknown,
}

impl Job {
    fn read(line: &str) -> Option<Self> {
        let mut parts = line.splitn(8, '|').map(|part| part.trim().to_owned());
        let mut next = || parts.next();
        let (number, state, reason, partition) = (next()?, next()?, next()?, next()?);
        let (starts, ends, node, name) = (next()?.parse().ok(), next()?.parse().ok(), next()?, next()?);
        let is_number = number.starts_with(|c: char| c.is_ascii_digit())
            && number.chars().all(|c| c.is_ascii_alphanumeric() || "_[]-,%+".contains(c));
        let is_word = !state.is_empty() && state.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        (is_number && is_word).then_some(Self { number, state, reason, partition, starts, ends, node, name })
    }

    /// Tag of the lease that the job or staging job belongs to.
    fn tag(&self) -> Option<&str> {
        let tag = self.name.strip_suffix(SUFFIX).unwrap_or(&self.name);
        tag.parse::<LeaseTag>().is_ok().then_some(tag)
    }

    fn life(&self) -> JobPhase {
        match self.state.as_str() {
            "PENDING" | "REQUEUED" | "REQUEUE_FED" | "REQUEUE_HOLD" | "RESV_DEL_HOLD" | "SPECIAL_EXIT"
            | "SUSPENDED" | "STOPPED" | "EXPEDITING" => JobPhase::Waits,
            "CONFIGURING" | "POWER_UP_NODE" => JobPhase::Boots,
            "RUNNING" | "RESIZING" | "SIGNALING" => JobPhase::Runs,
            "COMPLETING" | "STAGE_OUT" | "UPDATE_DB" => JobPhase::Leaves,
            state if is_over(state) => JobPhase::Ended,
            _ => JobPhase::Unknown,
        }
    }

    /// Why it waits, and until when by Slurm's own estimate; `place` says behind how many.
    fn waits_for(&self, place: &str) -> String {
        let (number, reason) = (&self.number, clean(self.reason.as_bytes(), 120));
        let partition = clean(self.partition.as_bytes(), 40);
        let more = match (self.state.as_str(), reason.as_str()) {
            (_, "JobHeldUser") => format!(": you hold it, and `scontrol release {number}` lets it go"),
            (_, "JobHeldAdmin") => ": an administrator holds it".to_owned(),
            (_, "PartitionTimeLimit") => format!(": it never starts, for {partition} allows less time"),
            ("SUSPENDED" | "STOPPED", _) => ": another job has its place for now".to_owned(),
            _ => String::new(),
        };
        // Rounded, since the estimate changes all the time.
        let start = self.starts.map(|at| rfc3339(at.div_ceil(ROUND_S).saturating_mul(ROUND_S)));
        let start = start.map_or_else(String::new, |at| format!(", may start by {at}"));
        format!("job {number} in {partition}: {} ({reason}{more}){start}{place}", self.state)
    }
}

/// Whether a state is final.
fn is_over(state: &str) -> bool {
    matches!(
        state,
        "BOOT_FAIL"
            | "CANCELLED"
            | "COMPLETED"
            | "DEADLINE"
            | "FAILED"
            | "LAUNCH_FAILED"
            | "NODE_FAIL"
            | "OUT_OF_MEMORY"
            | "PREEMPTED"
            | "RECONFIG_FAIL"
            | "REVOKED"
            | "TIMEOUT"
    )
}

/// Slurm's final state with an explanation.
fn in_words(state: &str) -> String {
    let words = match state {
        "BOOT_FAIL" | "NODE_FAIL" => "its node failed",
        "CANCELLED" => "it was cancelled",
        "DEADLINE" => "it waited for too long",
        "OUT_OF_MEMORY" => "it used more memory than it had asked for",
        "PREEMPTED" => "another job took its place",
        "TIMEOUT" => "its time limit was reached",
        "COMPLETED" => "its script ended",
        _ => "it failed",
    };
    format!("{state}: {words}")
}

impl Folder {
    fn read(line: &str) -> Option<Self> {
        let mut parts = line.splitn(4, '|');
        let mut next = || parts.next().map(str::trim);
        let (tag, stage): (LeaseTag, _) = (next()?.parse().ok()?, next()?);
        let (ends, what) = (next()?.parse().ok(), next()?);
        let stage = match stage {
            "submitting" => Stage::Submitting,
            "waiting" => Stage::Waiting,
            "launched" => Stage::Launched,
            _ => return None,
        };
        Some(Self { name: tag.to_string(), stage, ends, what: clean(what.as_bytes(), 120) })
    }
}

impl Past {
    /// `None` if it is no longer recorded.
    fn read(line: &str) -> Option<Self> {
        let (tag, record) = line.split_once('|')?;
        let mut words = record.split(' ');
        let state = words.next()?;
        let mut time = || words.next().and_then(|word| word.parse().ok());
        let (starts, ends) = (time(), time());
        is_over(state).then(|| Self { tag: tag.to_owned(), state: state.to_owned(), starts, ends })
    }
}

impl Times {
    fn read(line: &str) -> Option<Self> {
        let mut parts = line.splitn(3, '|');
        let (tag, times, alive) = (parts.next()?, parts.next()?, parts.next()?);
        let (ended, began) = times.split_once(' ')?;
        let (ended_s, began) = (ended.parse().ok()?, began.parse().ok()?);
        Some(Self { tag: tag.to_owned(), ended_s, began, alive: alive.trim().parse().unwrap_or(began) })
    }

    /// Seconds of all starts, the last until it was at work last.
    fn all_s(&self) -> u64 {
        self.ended_s.saturating_add(self.alive.saturating_sub(self.began))
    }
}

/// A job's number, its place and of how many.
fn read_place(line: &str) -> Option<(String, u64, u64)> {
    let mut parts = line.splitn(3, '|');
    Some((parts.next()?.to_owned(), parts.next()?.parse().ok()?, parts.next()?.trim().parse().ok()?))
}

impl Snapshot {
    /// Parses the output of [`snapshot_script`].
    ///
    /// # Errors
    /// The output is incomplete.
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
            } else if let Some(past) = line.strip_prefix("@past ") {
                snapshot.past.extend(Past::read(past));
            } else if let Some(times) = line.strip_prefix("@time ") {
                snapshot.times.extend(Times::read(times));
            } else if let Some(place) = line.strip_prefix("@place ") {
                snapshot.places.extend(read_place(place));
            } else if line == "@places hidden" {
                snapshot.places_hidden = true;
            } else if let Some((tag, why)) = line.strip_prefix("@unstaged ").and_then(|line| line.split_once('|')) {
                snapshot.unstaged.push((tag.to_owned(), clean(why.as_bytes(), 200)));
            }
        }
        match field(answer, "end") {
            Some(_) => Ok(snapshot),
            None => Err(error(Kind::Unavailable, "the queue's list broke off".to_owned())),
        }
    }

    /// The job with a tag: the live one, else the last that ended.
    fn job(&self, tag: &str) -> Option<&Job> {
        let of = || self.jobs.iter().filter(|job| job.name == tag);
        of().find(|job| job.life() != JobPhase::Ended).or_else(|| of().next_back())
    }

    /// The live staging job of a tag.
    fn staging(&self, tag: &str) -> Option<&Job> {
        let is_it = |job: &&Job| job.name.strip_suffix(SUFFIX) == Some(tag) && job.life() != JobPhase::Ended;
        self.jobs.iter().find(is_it)
    }

    /// Why a queued job waits.
    fn waits_for(&self, tag: &str, job: &Job) -> String {
        match self.staging(tag) {
            Some(staging) if staging.life() == JobPhase::Runs => {
                let partition = clean(staging.partition.as_bytes(), 40);
                format!("job {} in {partition} fetches the model for job {}", staging.number, job.number)
            }
            Some(staging) => {
                let waits_for = staging.waits_for(&self.place(staging));
                format!("{waits_for}; it fetches the model for job {}", job.number)
            }
            None => job.waits_for(&self.place(job)),
        }
    }

    /// The place of a job that waits, after what else is known of it.
    fn place(&self, job: &Job) -> String {
        if self.places_hidden {
            return ", position not shown by this cluster".to_owned();
        }
        let place = self.places.iter().find(|(number, ..)| *number == job.number);
        place.map_or_else(String::new, |(_, place, of)| format!(", position {place} of {of}"))
    }

    /// For how long a tag's job has run: the present start by the queue, those before by its
    /// script. `None`: nothing is known of such a job.
    pub(super) fn run_time(&self, tag: &str) -> Option<RunTime> {
        let times = self.times.iter().find(|times| times.tag == tag);
        let by_script = || times.map_or(0, Times::all_s);
        // A start by the queue's times, and those before it: the script may not have begun yet.
        let before = |starts: u64| match times {
            Some(times) if times.began.saturating_add(CLOCKS_S) >= starts => times.ended_s,
            _ => by_script(),
        };
        let over = |starts: Option<u64>, ends: Option<u64>| {
            let whole = |(starts, ends): (u64, u64)| before(starts).saturating_add(ends.saturating_sub(starts));
            let ended_s = starts.zip(ends).map_or_else(by_script, whole).min(LONGEST_S);
            RunTime { ended_s, ..RunTime::default() }
        };
        let Some(job) = self.job(tag) else {
            let past = self.past.iter().find(|past| past.tag == tag);
            let known = self.folder(tag).is_some();
            return known.then(|| past.map_or_else(|| over(None, None), |past| over(past.starts, past.ends)));
        };
        Some(match job.life() {
            JobPhase::Waits => over(None, None),
            JobPhase::Boots | JobPhase::Runs | JobPhase::Unknown => {
                let since = job.starts.or_else(|| times.map(|times| times.began));
                let ended_s = since.map_or_else(by_script, before).min(LONGEST_S);
                RunTime { ended_s, since, until: job.ends }
            }
            JobPhase::Leaves | JobPhase::Ended => over(job.starts, job.ends),
        })
    }

    /// Takes over what an earlier look saw of the times of jobs whose folders are gone by now.
    pub(super) fn remember(&mut self, earlier: &Self) {
        let lost = earlier.times.iter().filter(|times| self.times.iter().all(|mine| mine.tag != times.tag));
        let lost: Vec<Times> = lost.filter(|times| self.job(&times.tag).is_some()).cloned().collect();
        self.times.extend(lost);
    }

    fn folder(&self, tag: &str) -> Option<&Folder> {
        self.leases.iter().find(|folder| folder.name == tag)
    }

    /// The id of a tag's live job.
    pub(super) fn number(&self, tag: &str) -> Option<String> {
        self.job(tag).filter(|job| job.life() == JobPhase::Runs).map(|job| job.number.clone())
    }

    /// The final state of a tag's job, if known.
    fn last_state(&self, tag: &str) -> Option<&str> {
        let past = || self.past.iter().find(|past| past.tag == tag).map(|past| past.state.as_str());
        self.job(tag).map_or_else(past, |job| is_over(&job.state).then_some(job.state.as_str()))
    }

    /// How a tag's job ended; `None` while it waits or runs, or if unknown.
    pub(super) fn over(&self, tag: &str) -> Option<String> {
        let gone = || {
            let folder = self.folder(tag).filter(|folder| folder.stage != Stage::Submitting);
            folder.filter(|_| self.job(tag).is_none()).map(|_| "it is in the queue no more".to_owned())
        };
        let over = self.last_state(tag).map(in_words).or_else(gone)?;
        Some(match self.unstaged.iter().find(|(of, _)| of == tag) {
            Some((_, why)) => format!("{over}; the job that fetches the model failed: {why}"),
            None => over,
        })
    }

    /// Whether Slurm is ending a tag's job.
    pub(super) fn is_ending(&self, tag: &str) -> bool {
        self.job(tag).is_some_and(|job| job.life() == JobPhase::Leaves)
    }

    /// When the job's time is up, or was. A job that waits has all of its time, and one that was
    /// taken away lost it otherwise.
    pub(super) fn ends_at(&self, tag: &str) -> Option<u64> {
        let by_its_script = || self.folder(tag)?.ends;
        let lost = |state: &str| !matches!(state, "TIMEOUT" | "COMPLETED" | "FAILED");
        match (self.job(tag), self.last_state(tag)) {
            (_, Some(state)) if lost(state) => None,
            (None, _) | (_, Some(_)) => by_its_script(),
            (Some(job), None) if job.life() == JobPhase::Runs => job.ends.or_else(by_its_script),
            // Its end by then is now, whatever ends it.
            (Some(_), None) if self.is_ending(tag) => by_its_script(),
            (Some(_), None) => None,
        }
    }

    /// All jobs of the user, and all leases with a folder. `login_endpoint` is the login node.
    pub(super) fn instances(&self, login_endpoint: &SshEndpoint) -> Vec<Instance> {
        let mut names: BTreeSet<&str> = self.leases.iter().map(|folder| folder.name.as_str()).collect();
        let live = || self.jobs.iter().filter(|job| job.life() != JobPhase::Ended);
        names.extend(live().filter_map(Job::tag));
        let foreign = live().filter(|job| job.tag().is_none());
        let leases = names.iter().map(|name| self.lease(name, login_endpoint));
        leases.chain(foreign.map(other)).chain(self.odd.iter().map(|line| unreadable(line))).collect()
    }

    fn lease(&self, tag: &str, login_endpoint: &SshEndpoint) -> Instance {
        let folder = self.folder(tag);
        let job = self.job(tag);
        let life = job.map_or(JobPhase::Ended, Job::life);
        let over = self.over(tag);
        let what = folder.map(|folder| folder.what.clone()).unwrap_or_default();
        let why = || over.clone().unwrap_or_else(|| "it is in the queue no more".to_owned());
        let state = match (life, folder.map(|folder| folder.stage)) {
            (JobPhase::Waits, _) => InstanceState::Queued(job.map(|job| self.waits_for(tag, job)).unwrap_or_default()),
            (JobPhase::Boots, _) | (JobPhase::Ended, Some(Stage::Submitting)) => InstanceState::Booting,
            (JobPhase::Runs, Some(_)) | (JobPhase::Leaves | JobPhase::Ended, Some(Stage::Launched)) => {
                InstanceState::Ready(login_endpoint.clone())
            }
            // The folder is removed before the job ends.
            (JobPhase::Runs | JobPhase::Leaves, None) => InstanceState::Terminating,
            (JobPhase::Ended, None) if self.staging(tag).is_some() => InstanceState::Terminating,
            (JobPhase::Leaves, Some(_)) => InstanceState::Booting,
            (JobPhase::Ended, _) => InstanceState::Failed(format!("its job is over, {}", why())),
            (JobPhase::Unknown, _) => {
                InstanceState::Unknown(job.map(|job| clean(job.state.as_bytes(), 40)).unwrap_or_default())
            }
        };
        // Its files can still be fetched.
        let hardware = match over.filter(|_| matches!(state, InstanceState::Ready(_))) {
            Some(over) => format!("{what}; its job is over, {over}"),
            None => what,
        };
        Instance { price: Some(UsdPerHour::default()), hardware, ..Instance::new(NAME, tag, tag, state) }
    }
}

/// A job of the user that is not this program's.
fn other(job: &Job) -> Instance {
    let state = match job.life() {
        JobPhase::Waits => InstanceState::Queued(job.waits_for("")),
        _ => InstanceState::Unknown(format!("{} on {}", job.state, clean(job.node.as_bytes(), 40))),
    };
    Instance::new(NAME, &job.number, clean(job.name.as_bytes(), 80), state)
}

fn unreadable(line: &str) -> Instance {
    Instance::new(NAME, "", "", InstanceState::Unreadable(format!("squeue printed `{line}`")))
}
