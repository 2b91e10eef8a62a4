//! Merges the command line, the environment and the settings files into one value. No other module
//! reads them.
//!
//! Command-line options have priority over the user's file, which has priority over the built-in
//! `config/outliers.toml`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outliers_protocol::{ByteSize, JobOptions, Merge, ThresholdOptions, mergeable};
use serde::Deserialize;

use crate::cli::ClusterArgs;
use crate::cloud::broker::{CLOUDS, CloudKind, local, slurm};
use crate::cloud::clouds::Timeouts;
use crate::files::{MAX_FILE_BYTES, read_text};
use crate::host::GuardTimeouts;
use crate::run::local_worker::InspectLimits;
use crate::secret::Secret;
use crate::text::toml_error;
use crate::units::{Bytes, Fraction, Positive, UsdPerHour};

pub(crate) use crate::units::Span;
pub(crate) use resolve::{
    DeployRequest, JobRequest, ModelRequest, OffersRequest, PlanRequest, RunTerms, SurveyRequest,
};

mod resolve;

/// Environment variables that this program reads, beside the clouds' keys
/// ([`CloudKind::key_variable`], or the variable that the
/// settings name).
pub(crate) mod variables {
    /// Folder of ledger, keys and the local cloud.
    pub(crate) const STATE: &str = "OUTLIERS_STATE";
    /// The user's settings.
    pub(crate) const CONFIG: &str = "OUTLIERS_CONFIG";
    /// Token for gated models. It is passed only to the worker of a job that needs it.
    pub(crate) const HF_TOKEN: &str = "HF_TOKEN";
    /// Address of another hub; passed to the worker.
    pub(crate) const HF_ENDPOINT: &str = "HF_ENDPOINT";
    /// Folder with the token file of `hf auth login`.
    pub(crate) const HF_HOME: &str = "HF_HOME";
    /// Disables colours, with any value.
    pub(crate) const NO_COLOR: &str = "NO_COLOR";
    /// `dumb`: no colours and no bars.
    pub(crate) const TERM: &str = "TERM";
    /// Base of the state folder.
    pub(crate) const XDG_STATE_HOME: &str = "XDG_STATE_HOME";
    /// Base of the user's settings.
    pub(crate) const XDG_CONFIG_HOME: &str = "XDG_CONFIG_HOME";
    /// Base of both, if they are not set.
    pub(crate) const HOME: &str = "HOME";
}

/// How long a job may wait in a cluster's queue; results are kept in its folder as long.
const QUEUE: Duration = Duration::from_secs(7 * 86_400);

/// The hub, unless `HF_ENDPOINT` is set.
const PUBLIC_HUB: &str = "https://huggingface.co";

/// The built-in settings.
const DEFAULTS: &str = include_str!("../../../config/outliers.toml");

/// Maximum bytes of a token file.
const MAX_TOKEN: u64 = 64 << 10;

/// The environment as it was at the start. It holds keys, so it is never printed.
#[derive(Clone, Default)]
pub(crate) struct Environment {
    values: BTreeMap<String, String>,
    /// Whether the name of the home folder is not UTF-8.
    odd_home: bool,
}

impl Environment {
    pub(crate) fn of_process() -> Self {
        Self::of_system(std::env::vars_os())
    }

    fn of_system(pairs: impl Iterator<Item = (OsString, OsString)>) -> Self {
        let mut environment = Self::default();
        for (name, value) in pairs {
            match (name.into_string(), value.into_string()) {
                (Ok(name), Ok(value)) => drop(environment.values.insert(name, value)),
                (Ok(name), Err(_)) => environment.odd_home |= name == variables::HOME,
                (Err(_), _) => {}
            }
        }
        environment
    }

    #[cfg(test)]
    pub(crate) fn of(pairs: &[(&str, &str)]) -> Self {
        Self::of_system(pairs.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
    }

    /// The value, unless it is empty.
    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The home folder, or why it is unusable.
    fn home(&self) -> Result<PathBuf, &'static str> {
        match self.path(variables::HOME) {
            _ if self.odd_home => Err("is not UTF-8"),
            None => Err("is not set"),
            Some(home) if home.is_absolute() => Ok(home),
            Some(_) => Err("is not an absolute path"),
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.get(name).map(PathBuf::from)
    }

    /// Whether the environment allows coloured and redrawn output.
    pub(crate) fn is_plain(&self) -> bool {
        self.get(variables::NO_COLOR).is_some() || self.get(variables::TERM) == Some("dumb")
    }
}

/// The resolved settings of a command.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Folder of ledger, keys and the local cloud.
    pub(crate) state: PathBuf,
    /// Folder of the results, absolute.
    pub(crate) results: PathBuf,
    /// Path of the worker program, if set.
    pub(crate) worker: Option<PathBuf>,
    /// Limits for the inspection of a job on this machine.
    pub(crate) inspect_limits: InspectLimits,
    pub(crate) broker: DefaultBroker,
    /// Every supported cloud that is not disabled, with its key if one is set.
    pub(crate) clouds: Vec<CloudSettings>,
    /// The cluster behind a login node, where one is named.
    pub(crate) slurm: Option<slurm::Site>,
    /// The same for any cluster: its host is empty where none is named.
    pub(crate) any_cluster: slurm::Site,
    /// After this an instance has no right to exist.
    pub(crate) max_duration: Duration,
    /// Timeouts of the guard on an instance.
    pub(crate) watch: GuardTimeouts,
    /// Disk beyond the needs of the checkpoint.
    pub(crate) spare_disk: Bytes,
    /// Maximum size of a pushed folder or corpus.
    pub(crate) push_limit: Bytes,
    /// Maximum size of a save point that is fetched while the worker runs.
    pub(crate) save_point_limit: Bytes,
    /// Maximum concurrent runs of a survey.
    pub(crate) max_parallel: usize,
    /// Minimum time between the starts of two workers of a survey.
    pub(crate) stagger: Duration,
    /// Options of every job.
    pub(crate) job: JobOptions,
    /// Weight bytes per second, for plans.
    pub(crate) read_rate: Bytes,
    /// Share of peak arithmetic, for plans.
    pub(crate) efficiency: f64,
    /// Maximum requests to the hub in five minutes, over all runs.
    pub(crate) hub_requests: usize,
    /// Token for gated models.
    pub(crate) hf_token: Option<Secret>,
    /// Address of another hub.
    pub(crate) hf_endpoint: Option<String>,
}

/// The default brokers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DefaultBroker {
    Named(String),
    /// Every cloud whose key is set.
    Clouds,
    /// This machine, since no cloud's key is set.
    Local,
}

#[derive(Clone, Debug)]
pub(crate) struct CloudSettings {
    pub(crate) kind: &'static CloudKind,
    /// Base URL of its API.
    pub(crate) base_url: String,
    /// Environment variable with its key.
    pub(crate) key_variable: String,
    pub(crate) key: Option<Secret>,
    pub(crate) image: String,
    /// SSH user of its instances, if the cloud does not state it.
    pub(crate) ssh_user: Option<String>,
    /// SSH port of its instances, if the cloud does not state it.
    pub(crate) ssh_port: Option<u16>,
    /// Minimum time between two listings.
    pub(crate) listing_interval: Option<Duration>,
}

impl CloudSettings {
    /// The variable's name for messages. A value that does not look like a name may be the key
    /// itself, and is not shown.
    pub(crate) fn variable(&self) -> &str {
        let fits = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
        let is_name = self.key_variable.len() <= 60 && self.key_variable.bytes().all(fits);
        if is_name { &self.key_variable } else { "the variable that key-variable in the settings names" }
    }
}

mergeable! {
    /// Content of a settings file. Every field is optional; an unknown one is an error.
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct SettingsFile {
        broker: Option<String>,
        results: Option<PathBuf>,
        #[serde(default)]
        worker: WorkerSection,
        #[serde(default)]
        run: RunSection,
        #[serde(default)]
        survey: SurveySection,
        #[serde(default)]
        hub: HubSection,
        #[serde(default)]
        thresholds: ThresholdOptions,
        #[serde(default)]
        plan: PlanSection,
        #[serde(default)]
        brokers: Brokers,
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Brokers {
    slurm: Option<SlurmSection>,
    #[serde(flatten)]
    clouds: BTreeMap<String, BrokerSection>,
}

/// The built-in file has no broker sections.
impl Merge for Brokers {
    fn merge(self, _built_in: Self) -> Self {
        self
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct SlurmSection {
    host: Option<String>,
    #[serde(alias = "ssh_config")]
    ssh_config: Option<PathBuf>,
    partition: Option<String>,
    account: Option<String>,
    qos: Option<String>,
    constraint: Option<String>,
    scratch: Option<String>,
    #[serde(alias = "hf_home")]
    hf_home: Option<String>,
    #[serde(alias = "stage_partition")]
    stage_partition: Option<String>,
    #[serde(default)]
    sbatch: Vec<String>,
    queue: Option<Span>,
    #[serde(alias = "gpu_memory")]
    gpu_memory: Option<SomeBytes>,
    #[serde(alias = "price_per_gpu_hour")]
    price_per_gpu_hour: Option<Positive>,
    #[serde(alias = "listing_interval")]
    listing_interval: Option<Span>,
}

impl SlurmSection {
    /// The cluster; its host is empty if none is set. Paths are relative to `here`; `hub` replaces
    /// the public hub.
    fn site(self, here: &Path, hub: Option<&str>) -> slurm::Site {
        slurm::Site {
            host: self.host.unwrap_or_default(),
            ssh_config: self.ssh_config.map(|path| here.join(path)),
            partition: self.partition,
            account: self.account,
            qos: self.qos,
            constraint: self.constraint,
            scratch: self.scratch,
            hf_home: self.hf_home,
            hub: hub.unwrap_or(PUBLIC_HUB).to_owned(),
            stage_partition: self.stage_partition,
            token: None,
            sbatch: self.sbatch,
            queue: self.queue.map_or(QUEUE, |span| span.0),
            gpu_memory: self.gpu_memory.map(|size| Bytes(size.0.0)),
            price_per_gpu: UsdPerHour::from_dollars(self.price_per_gpu_hour.map_or(0.0, Positive::get)),
            listing_interval: self.listing_interval.map_or(Timeouts::CLOUD.listing_interval, |span| span.0),
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct BrokerSection {
    enabled: Option<bool>,
    #[serde(alias = "base_url")]
    base_url: Option<String>,
    #[serde(alias = "key_variable")]
    key_variable: Option<String>,
    image: Option<String>,
    #[serde(alias = "ssh_user")]
    ssh_user: Option<String>,
    #[serde(alias = "ssh_port")]
    ssh_port: Option<u16>,
    #[serde(alias = "listing_interval")]
    listing_interval: Option<Span>,
}

mergeable! {
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct WorkerSection {
        binary: Option<PathBuf>,
        #[serde(alias = "inspect_memory")]
        inspect_memory: Option<SomeBytes>,
        #[serde(alias = "inspect_time")]
        inspect_time: Option<Span>,
    }
}

mergeable! {
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct RunSection {
        #[serde(alias = "max_duration")]
        max_duration: Option<Span>,
        lease: Option<Span>,
        unclaimed: Option<Span>,
        #[serde(alias = "spare_disk")]
        spare_disk: Option<ByteSize>,
        #[serde(alias = "push_limit")]
        push_limit: Option<ByteSize>,
        #[serde(alias = "save_point_limit")]
        save_point_limit: Option<ByteSize>,
    }
}

mergeable! {
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct SurveySection {
        #[serde(alias = "max_parallel")]
        max_parallel: Option<NonZero<usize>>,
        #[serde(alias = "stagger_seconds")]
        stagger_seconds: Option<u32>,
    }
}

mergeable! {
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct HubSection {
        requests: Option<NonZero<usize>>,
    }
}

mergeable! {
    #[derive(Clone, Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct PlanSection {
        #[serde(alias = "read_rate")]
        read_rate: Option<SomeBytes>,
        efficiency: Option<Fraction>,
    }
}

/// A positive amount of memory.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "ByteSize")]
struct SomeBytes(ByteSize);

impl TryFrom<ByteSize> for SomeBytes {
    type Error = &'static str;

    fn try_from(size: ByteSize) -> Result<Self, &'static str> {
        if size.0 > 0 { Ok(Self(size)) } else { Err("it must be a positive number") }
    }
}

impl Settings {
    /// Resolves the settings. `config` is the file from the command line, `here` the current
    /// folder.
    ///
    /// # Errors
    /// [`SettingsError`] if a file is unreadable or invalid, or there is no folder for the state.
    pub(crate) fn resolve(
        config: Option<&Path>,
        environment: &Environment,
        here: &Path,
    ) -> Result<Self, SettingsError> {
        Self::of(user_file(config, environment)?, environment, here)
    }

    /// As [`Self::resolve`], for commands that end instances: of an invalid file only the clouds
    /// are used, if they are valid.
    ///
    /// # Errors
    /// [`SettingsError`] if there is no folder for the state.
    pub(crate) fn for_endings(
        config: Option<&Path>,
        environment: &Environment,
        here: &Path,
    ) -> Result<Self, SettingsError> {
        let text = user_path(config, environment).and_then(|path| read_text(&path, MAX_FILE_BYTES).ok());
        let table = text.and_then(|text| toml::from_str::<toml::Table>(&text).ok()).unwrap_or_default();
        let clouds = |brokers: toml::Value| brokers.try_into().ok();
        let brokers = table.get("brokers").cloned().and_then(clouds).unwrap_or_default();
        Self::of(SettingsFile { brokers, ..SettingsFile::default() }, environment, here)
    }

    fn of(user: SettingsFile, environment: &Environment, here: &Path) -> Result<Self, SettingsError> {
        let file = user.merge(parse(DEFAULTS, Path::new("config/outliers.toml"))?);
        let clouds = clouds(&file.brokers.clouds, environment)?;
        let slurm = file.brokers.slurm.unwrap_or_default();
        let broker = match file.broker.as_deref() {
            None | Some("auto") if clouds.iter().any(|cloud| cloud.key.is_some()) => DefaultBroker::Clouds,
            None | Some("auto") => DefaultBroker::Local,
            Some(name) => DefaultBroker::Named(name.to_owned()),
        };
        let SettingsFile { worker, run, survey, hub, plan, .. } = file;
        let built_in = |field| missing_default(field);
        let lease = run.lease.ok_or_else(|| built_in("run.lease"))?;
        let unclaimed = run.unclaimed.ok_or_else(|| built_in("run.unclaimed"))?;
        let stagger = survey.stagger_seconds.ok_or_else(|| built_in("survey.stagger-seconds"))?;
        Ok(Self {
            state: state_folder(environment)?,
            results: here.join(file.results.ok_or_else(|| built_in("results"))?),
            worker: worker.binary.map(|path| here.join(path)),
            inspect_limits: InspectLimits {
                memory: size(worker.inspect_memory.map(|memory| memory.0), "worker.inspect-memory")?,
                time: worker.inspect_time.ok_or_else(|| built_in("worker.inspect-time"))?.0,
            },
            broker,
            clouds,
            slurm: None,
            any_cluster: slurm.site(here, environment.get(variables::HF_ENDPOINT)),
            max_duration: run.max_duration.ok_or_else(|| built_in("run.max-duration"))?.0,
            watch: GuardTimeouts { lease_s: lease.0.as_secs(), unclaimed_s: unclaimed.0.as_secs() },
            spare_disk: size(run.spare_disk, "run.spare-disk")?,
            push_limit: size(run.push_limit, "run.push-limit")?,
            save_point_limit: size(run.save_point_limit, "run.save-point-limit")?,
            max_parallel: survey.max_parallel.ok_or_else(|| built_in("survey.max-parallel"))?.get(),
            stagger: Duration::from_secs(stagger.into()),
            job: JobOptions { thresholds: file.thresholds, ..JobOptions::default() },
            read_rate: size(plan.read_rate.map(|rate| rate.0), "plan.read-rate")?,
            efficiency: plan.efficiency.ok_or_else(|| built_in("plan.efficiency"))?.get(),
            hub_requests: hub.requests.ok_or_else(|| built_in("hub.requests"))?.get(),
            hf_token: hf_token(environment),
            hf_endpoint: environment.get(variables::HF_ENDPOINT).map(str::to_owned),
        })
    }

    /// Applies the command line's options of the cluster. Without a host there is no cluster.
    #[must_use]
    pub(crate) fn on_cluster(self, typed: &ClusterArgs) -> Self {
        let site = self.any_cluster;
        let any_cluster = slurm::Site {
            host: typed.host.clone().unwrap_or(site.host),
            partition: typed.partition.clone().or(site.partition),
            account: typed.account.clone().or(site.account),
            qos: typed.qos.clone().or(site.qos),
            constraint: typed.constraint.clone().or(site.constraint),
            stage_partition: typed.stage_partition.clone().or(site.stage_partition),
            ..site
        };
        let slurm = (!any_cluster.host.is_empty()).then(|| any_cluster.clone());
        Self { slurm, any_cluster, ..self }
    }

    /// Environment variables for each worker if `workers` of them use the hub at the same time.
    pub(crate) fn hub_variables(&self, workers: usize) -> Vec<(&'static str, Secret)> {
        let share = (self.hub_requests / workers.max(1)).max(1);
        let endpoint = self.hf_endpoint.as_ref().map(|text| (variables::HF_ENDPOINT, Secret::new(text.clone())));
        let token = self.hf_token.clone().map(|token| (variables::HF_TOKEN, token));
        let share = (outliers_protocol::HUB_REQUESTS, Secret::new(share.to_string()));
        token.into_iter().chain(endpoint).chain([share]).collect()
    }
}

fn size(found: Option<ByteSize>, field: &'static str) -> Result<Bytes, SettingsError> {
    found.map(|ByteSize(bytes)| Bytes(bytes)).ok_or_else(|| missing_default(field))
}

fn clouds(
    sections: &BTreeMap<String, BrokerSection>,
    environment: &Environment,
) -> Result<Vec<CloudSettings>, SettingsError> {
    if let Some(name) = sections.keys().find(|name| !CLOUDS.iter().any(|kind| kind.name == **name)) {
        return Err(SettingsError::NoSuchBroker { name: name.clone() });
    }
    let resolve = |kind: &'static CloudKind| {
        let section = sections.get(kind.name).cloned().unwrap_or_default();
        let key_variable = section.key_variable.unwrap_or_else(|| kind.key_variable.to_owned());
        let key = environment.get(&key_variable).map(|key| Secret::new(key.trim()));
        section.enabled.unwrap_or(true).then(|| CloudSettings {
            kind,
            base_url: section.base_url.unwrap_or_else(|| kind.base_url.to_owned()),
            key_variable,
            key,
            image: section.image.unwrap_or_else(|| kind.image.to_owned()),
            ssh_user: section.ssh_user,
            ssh_port: section.ssh_port,
            listing_interval: section.listing_interval.map(|span| span.0),
        })
    };
    Ok(CLOUDS.iter().copied().filter_map(resolve).collect())
}

fn user_file(config: Option<&Path>, environment: &Environment) -> Result<SettingsFile, SettingsError> {
    let Some(path) = user_path(config, environment) else { return Ok(SettingsFile::default()) };
    let text =
        read_text(&path, MAX_FILE_BYTES).map_err(|source| SettingsError::Unreadable { path: path.clone(), source })?;
    parse(&text, &path)
}

fn user_path(config: Option<&Path>, environment: &Environment) -> Option<PathBuf> {
    let named = config.map(Path::to_owned).or_else(|| environment.path(variables::CONFIG));
    let usual = || {
        let base = environment.path(variables::XDG_CONFIG_HOME);
        let base = base.or_else(|| Some(environment.home().ok()?.join(".config")))?;
        Some(base.join("outliers/outliers.toml")).filter(|path| path.exists())
    };
    named.or_else(usual)
}

fn parse(text: &str, path: &Path) -> Result<SettingsFile, SettingsError> {
    toml::from_str(text).map_err(|error| {
        let (line, said) = toml_error(text, &error);
        let at = line.map_or(String::new(), |line| format!("line {line}: "));
        SettingsError::Wrong { path: path.to_owned(), why: at + &said }
    })
}

fn state_folder(environment: &Environment) -> Result<PathBuf, SettingsError> {
    let named = environment.path(variables::STATE);
    let base = || environment.path(variables::XDG_STATE_HOME).map(|base| base.join("outliers"));
    let home = || environment.home().map(|home| home.join(".local/state/outliers"));
    let home = || home().map_err(|why| SettingsError::NoState { why });
    let folder = named.or_else(base).map_or_else(home, Ok)?;
    std::path::absolute(&folder).map_err(|source| SettingsError::Unreadable { path: folder, source })
}

/// The token in the variable, else in the file of `hf auth login`.
fn hf_token(environment: &Environment) -> Option<Secret> {
    let named = environment.get(variables::HF_TOKEN).map(str::to_owned);
    let file = || {
        let home = environment.path(variables::HF_HOME);
        let home = home.or_else(|| Some(environment.home().ok()?.join(".cache/huggingface")))?;
        read_text(&home.join("token"), MAX_TOKEN).ok()
    };
    let token = named.or_else(file)?.trim().to_owned();
    (!token.is_empty()).then(|| Secret::new(token))
}

fn missing_default(field: &'static str) -> SettingsError {
    SettingsError::Wrong { path: PathBuf::from("config/outliers.toml"), why: format!("{field} is missing") }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("{}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{}: {why}", path.display())]
    Wrong { path: PathBuf, why: String },
    #[error("[brokers.{name}]: there is no such cloud")]
    NoSuchBroker { name: String },
    #[error("there is no place for the ledger: HOME {why}")]
    NoState { why: &'static str },
}

/// Names of all supported clouds.
pub(crate) fn known_brokers() -> String {
    let clouds = CLOUDS.iter().map(|kind| kind.name);
    [local::NAME, slurm::NAME].into_iter().chain(clouds).collect::<Vec<_>>().join(", ")
}

impl SettingsError {
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Unreadable { .. } => "name a file that can be read, or none".to_owned(),
            Self::Wrong { .. } => "config/outliers.toml shows every setting with its default".to_owned(),
            Self::NoSuchBroker { .. } => format!("built in: {}", known_brokers()),
            Self::NoState { .. } => format!("set HOME to your folder, or {} to another", variables::STATE),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use outliers_protocol::Thresholds;
    use proptest::prelude::*;

    use super::*;

    fn resolve(text: Option<&str>, environment: &[(&'static str, &str)]) -> Result<Settings, SettingsError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        std::fs::write(&path, text.unwrap_or_default()).unwrap();
        let home = folder.path().to_string_lossy().into_owned();
        let mut pairs = vec![(variables::HOME, home.as_str())];
        pairs.extend_from_slice(environment);
        Settings::resolve(text.map(|_| path.as_path()), &Environment::of(&pairs), Path::new("/here"))
    }

    #[test]
    fn defaults_are_complete_and_match_the_docs() {
        let settings = resolve(None, &[]).unwrap();
        assert_eq!(settings.broker, DefaultBroker::Local);
        assert_eq!(settings.results, Path::new("/here/remote_results"));
        assert_eq!(settings.max_duration, Duration::from_secs(6 * 3600));
        assert_eq!(settings.watch, GuardTimeouts { lease_s: 7200, unclaimed_s: 3600 });
        assert_eq!(settings.push_limit, Bytes::from_gib(1));
        let inspect_limits = InspectLimits { memory: Bytes::from_gib(16), time: Duration::from_secs(1800) };
        assert_eq!(settings.inspect_limits, inspect_limits);
        assert_eq!((settings.max_parallel, settings.stagger), (3, Duration::from_secs(20)));
        let none = Thresholds { magnitude: 0.0, layer_fraction: 0.0, position_fraction: 0.0 };
        assert_eq!(settings.job.thresholds.over(none), Thresholds::default());
        assert!(settings.state.ends_with(".local/state/outliers"));
        assert!(settings.hf_token.is_none() && settings.hub_variables(1).len() == 1);
    }

    #[test]
    fn settings_file_changes_only_its_keys() {
        let settings = resolve(Some("broker = 'x'\n[run]\nmax-duration = '1h30m'"), &[]).unwrap();
        let older = resolve(Some("[run]\nmax_duration = '1h30m'"), &[]).unwrap();
        assert_eq!(older.max_duration, settings.max_duration, "the spelling with `_` is understood");
        assert_eq!(settings.broker, DefaultBroker::Named("x".into()));
        assert_eq!(settings.max_duration, Duration::from_secs(5400));
        assert_eq!(settings.push_limit, Bytes::from_gib(1));
    }

    #[test]
    fn unknown_key_is_an_error_with_its_location() {
        for (text, word) in [
            ("brokr = 'x'", "brokr"),
            ("[run]\nmax-duration = '5 parsecs'", "parsecs"),
            ("[run]\nmax_durations = '5m'", "max_durations"),
            ("[worker]\nbinary = 3", "binary"),
            ("[worker]\ninspect-memory = '0 GiB'", "inspect-memory"),
            ("[survey]\nmax-parallel = 0", "max-parallel"),
            ("[hub]\nrequests = 0", "requests"),
            ("[thresholds]\nmagnitude = nan", "magnitude"),
            ("[thresholds]\nmagnitude = 0", "magnitude"),
            ("[thresholds]\nlayer-fraction = 1.5", "layer-fraction"),
            ("[thresholds]\nposition-fraction = -0.06", "position-fraction"),
            ("[plan]\nefficiency = 0.0", "efficiency"),
            ("[plan]\nefficiency = inf", "efficiency"),
            ("[plan]\nread-rate = '0 GiB'", "read-rate"),
            ("[run]\nmax-duration = '0s'", "max-duration"),
            ("= 3", "line 1"),
        ] {
            let error = resolve(Some(text), &[]).unwrap_err();
            assert!(error.to_string().contains(word) && error.to_string().contains("mine.toml"), "{error}");
            assert!(!error.hint().is_empty());
        }
        let missing = Settings::resolve(Some(Path::new("/no/such")), &Environment::of(&[]), Path::new("/"));
        assert!(matches!(missing, Err(SettingsError::Unreadable { .. })));
    }

    #[test]
    fn api_key_in_the_settings_file_is_never_printed() {
        for text in [
            "RUNPOD_API_KEY = 'rpa_geheim'",
            "[brokers.runpod]\nkey = \"rpa_geheim\"",
            "[brokers.runpod]\nenabled = \"rpa_geheim\"",
            "[hub]\nrequests = 'rpa_geheim'",
            "[hub]\ntoken = rpa_geheim",
            "brokers = { runpod = { key = 'rpa_geheim' } }",
            "broker = 'x'\nrpa_geheim\n",
        ] {
            let error = resolve(Some(text), &[]).unwrap_err().to_string();
            assert!(!error.contains("geheim") && error.contains("mine.toml: "), "{text}: {error}");
        }
        let settings = resolve(Some("[brokers.runpod]\nkey-variable = 'rpa_geheim'"), &[]).unwrap();
        assert!(settings.clouds.iter().all(|cloud| !cloud.variable().contains("geheim")));
    }

    #[test]
    fn cluster_merges_file_and_options() {
        let text = "[brokers.slurm]\nhost = 'a'\naccount = 'lab'\nqueue = '2d'\nssh-config = 'c'\nhf-home = '/hf'\n\
                    stage-partition = 'io'\nprice-per-gpu-hour = 1.25\n\
                    [brokers.vast]\nenabled = false";
        let settings = resolve(Some(text), &[]).unwrap();
        assert!(settings.clouds.iter().all(|cloud| cloud.kind.name != "vast"), "the clouds are read as ever");
        let typed = |host: Option<&str>| ClusterArgs {
            host: host.map(str::to_owned),
            partition: Some("gpu".into()),
            ..ClusterArgs::default()
        };
        let site = settings.on_cluster(&typed(Some("b"))).slurm.unwrap();
        assert_eq!((site.host.as_str(), site.account.as_deref(), site.queue.as_secs()), ("b", Some("lab"), 172_800));
        assert_eq!((site.partition.as_deref(), site.ssh_config), (Some("gpu"), Some("/here/c".into())));
        assert_eq!((site.hf_home.as_deref(), site.hub.as_str()), (Some("/hf"), PUBLIC_HUB));
        assert_eq!(site.stage_partition.as_deref(), Some("io"));
        assert_eq!(site.price_per_gpu, UsdPerHour::from_dollars(1.25));
        assert!(resolve(None, &[]).unwrap().on_cluster(&typed(None)).slurm.is_none(), "no host, no cluster");
        let bare = resolve(Some("[brokers.slurm]\nscratch = '/s'"), &[]).unwrap();
        assert!(bare.clone().on_cluster(&typed(None)).slurm.is_none());
        assert_eq!(bare.on_cluster(&typed(Some("b"))).slurm.unwrap().scratch.as_deref(), Some("/s"));
        let wrong = resolve(Some("[brokers.slurm]\nhots = 'a'"), &[]).unwrap_err();
        assert!(wrong.to_string().contains("hots"), "{wrong}");
    }

    #[test]
    fn environment_variables_set_the_folders() {
        let settings = resolve(None, &[(variables::STATE, "/s"), (variables::HF_TOKEN, " hf_x\n")]).unwrap();
        assert_eq!(settings.state, Path::new("/s"));
        let given = |workers| {
            settings.hub_variables(workers).into_iter().map(|(name, value)| (name, value.expose().to_owned()))
        };
        assert!(given(3).eq([("HF_TOKEN", "hf_x".to_owned()), ("OUTLIERS_HUB_REQUESTS", "333".to_owned())]));
        assert_eq!(given(5000).next_back().unwrap().1, "1", "a worker that may ask nothing can do nothing");
        assert!(!format!("{settings:?}").contains("hf_x"), "a token is never printed");
        assert_eq!(settings.hf_token.unwrap().expose(), "hf_x");
        let settings = resolve(None, &[(variables::XDG_STATE_HOME, "/xdg"), (variables::HF_TOKEN, "")]).unwrap();
        assert_eq!(settings.state, Path::new("/xdg/outliers"));
        assert!(settings.hf_token.is_none());
        let nowhere = Settings::resolve(None, &Environment::of(&[]), Path::new("/"));
        assert!(matches!(nowhere, Err(SettingsError::NoState { why: "is not set" })));
    }

    #[test]
    fn relative_or_non_utf8_home_is_refused() {
        let resolve = |environment: &Environment| Settings::resolve(None, environment, Path::new("/here"));
        let relative = resolve(&Environment::of(&[(variables::HOME, "me")])).unwrap_err();
        assert!(relative.to_string().contains("HOME is not an absolute path"), "{relative}");
        let odd = |more: &[(&str, &str)]| {
            let pairs = more.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
            let home = (OsString::from(variables::HOME), OsString::from_vec(b"/home/m\xe9".to_vec()));
            resolve(&Environment::of_system(pairs.chain([home])))
        };
        let error = odd(&[]).unwrap_err();
        assert!(error.to_string().contains("HOME is not UTF-8") && error.hint().contains("OUTLIERS_STATE"), "{error}");
        assert_eq!(odd(&[(variables::STATE, "/s")]).unwrap().state, Path::new("/s"), "it is not needed");
    }

    #[test]
    fn durations_and_sizes_are_parsed() {
        for (text, seconds) in [("90s", 90), ("5m", 300), ("1h30m", 5400), ("2d", 172_800), (" 1h ", 3600)] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_secs(seconds))));
        }
        for text in ["", "5", "m", "5x", "0s", "-5m", "99999999999999999999s", "9999999999999d", "5m3"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        assert_eq!(Span(Duration::from_secs(3725)).to_string(), "1 h 02 min");
        assert_eq!(Span(Duration::from_secs(65)).to_string(), "1 min 05 s");
        let days = [172_799, 172_800, 356_400].map(|seconds| format!("{:#}", Span(Duration::from_secs(seconds))));
        assert_eq!(days, ["2 d 00 h", "2 d 00 h", "4 d 03 h"]);
        let rounded = [9, 59, 65, 722, 3599, 7260].map(|seconds| format!("{:#}", Span(Duration::from_secs(seconds))));
        assert_eq!(rounded, ["9.0 s", "59 s", "1 min", "12 min", "1 h 00 min", "2 h 01 min"]);
    }

    proptest! {
        #[test]
        fn any_duration_or_size_parses_without_panic(text in "\\PC{0,12}") {
            let _ = text.parse::<Span>();
        }
    }
}

/// The catalogue files beside the settings, which surveys use.
#[cfg(test)]
mod catalogue {
    use std::collections::BTreeSet;
    use std::path::Path;

    use serde::Deserialize;

    use crate::survey::Survey;

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Catalogue {
        model: Vec<Model>,
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Model {
        id: String,
        architecture: String,
        kind: Kind,
        parameters: u64,
        /// Mixtures only.
        active: Option<u64>,
        layers: u32,
        experts: Option<u32>,
        top_k: Option<u32>,
        stored_gb: f64,
        /// Access needs a token of an authorised account.
        #[serde(default)]
        gated: bool,
        /// Fine-tuned after pre-training.
        post_trained: bool,
        /// Kind of routing.
        router: Option<String>,
        /// Position of the norms.
        norms: Option<String>,
        /// The dtypes of the weights.
        stored: Option<String>,
        optimiser: Option<String>,
        #[serde(default)]
        gated_attention: bool,
        #[serde(default)]
        learned_sinks: bool,
        /// Source of the last three.
        source: Option<String>,
    }

    #[derive(Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Dense,
        Moe,
    }

    fn config() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../config"))
    }

    fn catalogue() -> Catalogue {
        toml::from_str(&std::fs::read_to_string(config().join("models.toml")).unwrap()).unwrap()
    }

    #[test]
    fn catalogue_is_consistent() {
        let models = catalogue().model;
        assert_eq!(models.iter().map(|m| &m.id).collect::<BTreeSet<_>>().len(), models.len(), "an id twice");
        let gated = models.iter().filter(|model| model.gated).map(|model| model.id.as_str());
        let licensed = |id: &str| id.starts_with("meta-llama/") || id.starts_with("google/");
        assert!(gated.clone().count() == 6 && gated.clone().all(licensed));
        for model in models {
            let id = &model.id;
            assert_eq!(id.split('/').count(), 2, "{id}");
            assert!(model.layers > 0 && model.parameters > 0 && !model.architecture.is_empty(), "{id}");
            assert!(model.post_trained || !id.ends_with("-Instruct"), "{id}");
            let moe = model.kind == Kind::Moe;
            assert_eq!(
                (model.experts.is_some(), model.top_k.is_some(), model.active.is_some()),
                (moe, moe, moe),
                "{id}"
            );
            assert!(model.top_k <= model.experts && model.active.unwrap_or(0) < model.parameters, "{id}");
            assert!(model.optimiser.as_deref().is_none_or(|optimiser| ["AdamW", "Muon"].contains(&optimiser)), "{id}");
            let claims = model.optimiser.is_some() || model.gated_attention || model.learned_sinks;
            assert_eq!(claims, model.source.is_some(), "{id}");
            let told = [&model.norms, &model.stored].map(Option::is_some);
            assert!(told[0] == told[1] && model.router.is_some() == (told[0] && moe), "{id}");
            // Half a byte (MXFP4) to four bytes (F32) per parameter, and other stored tensors.
            let bytes_each = model.stored_gb * 1e9 / model.parameters as f64;
            assert!((0.5..5.0).contains(&bytes_each), "{id}: {bytes_each}");
        }
    }

    /// Checks that every key in `value` is kebab-case.
    fn is_kebab_case(value: &toml::Value) {
        match value {
            toml::Value::Table(table) => {
                for (key, value) in table {
                    assert!(!key.contains('_'), "{key}");
                    is_kebab_case(value);
                }
            }
            toml::Value::Array(values) => values.iter().for_each(is_kebab_case),
            _ => {}
        }
    }

    #[test]
    fn keys_are_spelt_alike_in_all_files() {
        let mut files = 0;
        for folder in [config().to_owned(), config().join("surveys")] {
            let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
            for path in paths.filter(|path| path.extension().is_some_and(|ending| ending == "toml")) {
                let file: toml::Table = toml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
                is_kebab_case(&toml::Value::Table(file));
                files += 1;
            }
        }
        assert_eq!(files, 8);
    }

    #[test]
    fn shipped_surveys_name_catalogue_models() {
        let known: BTreeSet<String> = catalogue().model.into_iter().map(|model| model.id).collect();
        let mut sizes = Vec::new();
        for entry in std::fs::read_dir(config().join("surveys")).unwrap() {
            let path = entry.unwrap().path();
            let survey = Survey::read(&path).unwrap();
            assert_eq!(path.file_stem().unwrap().to_str(), Some(survey.name.as_str()));
            let (sequences, length) = (survey.job.num_sequences, survey.job.sequence_length);
            assert_eq!((sequences, length), (Some(16), Some(2048)), "the published setting");
            for entry in &survey.models {
                assert!(known.contains(&entry.id), "{}: {}", survey.name, entry.name);
            }
            sizes.push((survey.name, survey.models.len()));
        }
        sizes.sort();
        let expected =
            [("dense-controls", 16), ("moe-2026", 12), ("moe-nine", 9), ("seed-seven", 7), ("trajectories", 11)];
        assert_eq!(sizes, expected.map(|(name, n)| (name.to_owned(), n)));
    }
}
