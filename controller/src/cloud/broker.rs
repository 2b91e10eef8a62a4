//! A broker is one cloud, with its offers and instances. It is independent of runs, ledgers, hosts
//! and other brokers.
//!
//! Implementations return values, not live objects. An error is never reported as an empty list,
//! and an unknown outcome is [`BrokerErrorKind::Maybe`].

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use outliers_protocol::FileBytes;
use serde::{Deserialize, Serialize};

use crate::cloud::http::Http;
use crate::host::transport::Transport;
use crate::units::{Bytes, Usd, UsdPerHour};

pub use crate::cloud::broker_error::{BrokerError, BrokerErrorKind};
pub use crate::cloud::offer::{GpuRequest, Offer, Tier};
pub use crate::host::transport::SshEndpoint;

pub mod local;
pub mod slurm;
mod wire;

/// Declares the modules of the clouds and lists them. A new cloud is a file and a line here.
macro_rules! clouds {
    ($($(#[$doc:meta])* $module:ident),* $(,)?) => {
        $($(#[$doc])* pub mod $module;)*

        /// Every supported cloud, besides this machine.
        pub const CLOUDS: &[&CloudKind] = &[$(&$module::CLOUD),*];
    };
}

clouds! { lambda, prime, runpod, vast }

/// One cloud.
#[async_trait]
pub trait Broker: Send + Sync {
    /// The name used in settings, ledgers and on the command line.
    fn name(&self) -> &'static str;

    /// Optional features of this cloud.
    fn capabilities(&self) -> Capabilities;

    /// Checks the key. Costs nothing and changes nothing.
    async fn check(&self) -> Result<Account, BrokerError>;

    /// Lists what can be rented now. `want` lets a cloud filter on its side; the market filters
    /// again.
    async fn offers(&self, want: &GpuRequest) -> Result<Offers, BrokerError>;

    /// Rents an instance. It carries the lease's tag from the moment it exists.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Maybe`] if an instance may exist; with every other kind none does.
    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError>;

    /// Lists all pages of this account's instances, also those of other programs. An unreadable
    /// one is [`InstanceState::Unreadable`], never missing.
    async fn list(&self) -> Result<Vec<Instance>, BrokerError>;

    /// One instance; `None` when the cloud says that there is none, which may be too early to know.
    async fn get(&self, id: &InstanceId) -> Result<Option<Instance>, BrokerError> {
        Ok(self.list().await?.into_iter().find(|instance| instance.id == *id))
    }

    /// Ends an instance and its billing, and removes what its creation added to the account. A
    /// missing instance counts as success.
    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError>;

    /// Whether an offer is this cloud's: then only this cloud's list can show its instance.
    fn made(&self, offer: &Offer) -> bool {
        offer.broker == self.name()
    }

    /// Seconds by which the cloud's clock is ahead of this machine's, by its latest answer;
    /// `None`: it is the same clock, or no answer told.
    fn clock_skew(&self) -> Option<i64> {
        None
    }

    /// The higher price that an instance's host demands, as text, on clouds where hosts may do so
    /// and no answer was given. No function accepts it.
    async fn price_rise(&self, _id: &InstanceId) -> Result<Option<String>, BrokerError> {
        Ok(None)
    }

    /// Whether this folder on the shared file system of all instances contains a checkpoint;
    /// `None` if there is no shared file system.
    ///
    /// # Errors
    /// Errors of the call.
    async fn has_checkpoint(&self, _folder: &str) -> Result<Option<bool>, BrokerError> {
        Ok(None)
    }

    /// Access to an instance without its own SSH server; `None`: use the address in its state.
    fn instance_transport(&self, _id: &InstanceId) -> Option<InstanceTransport> {
        None
    }

    /// When the cloud itself ends or has ended an instance, by its latest listing and its clock;
    /// Unix seconds. `None`: at its lease's deadline.
    fn ends_at(&self, _id: &InstanceId) -> Option<u64> {
        None
    }

    /// For how long an instance has run, as it was last listed; `None`: as long as it has existed.
    fn run_time(&self, _id: &InstanceId) -> Option<RunTime> {
        None
    }

    /// A POSIX shell script with which an instance ends itself, billing included, by a credential
    /// that can do nothing else; `None` where the cloud gives none.
    fn self_destruct(&self) -> Option<&'static str> {
        None
    }
}

/// For how long an instance has run, by its cloud's own record: time in a queue is none of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunTime {
    /// Seconds of all starts that have ended.
    pub ended_s: u64,
    /// Since when it runs, Unix seconds; `None`: it does not.
    pub since: Option<u64>,
    /// When the cloud itself ends it, Unix seconds, where that is known.
    pub until: Option<u64>,
}

/// A cloud as it is built in: what has to be known before anybody speaks to it.
#[derive(Debug)]
pub struct CloudKind {
    /// Name in settings, ledgers and on the command line.
    pub name: &'static str,
    /// Environment variable for the key, as named by the cloud.
    pub key_variable: &'static str,
    /// Base URL of its API.
    pub base_url: &'static str,
    /// Container image of instances; empty for clouds that rent virtual machines.
    pub image: &'static str,
    /// Web page on which users create a key.
    pub key_page: &'static str,
    /// Creates the broker.
    pub connect: fn(ApiAccess) -> Box<dyn Broker>,
}

/// Access of one account to a cloud's API.
pub struct ApiAccess {
    /// HTTP client with the account's key.
    pub http: Http,
    /// Container image for instances.
    pub image: String,
    /// SSH user from the settings, for clouds that do not state it.
    pub ssh_user: Option<String>,
    /// SSH port from the settings, for clouds that do not state it.
    pub ssh_port: Option<u16>,
}

/// Access to an instance without its own SSH server.
pub struct InstanceTransport {
    /// Commands and files there. The transport authenticates the other side; no host key is
    /// pinned.
    pub transport: Arc<dyn Transport>,
    /// Name of the instance in messages.
    pub name: String,
    /// The command line that opens a shell there.
    pub shell: Vec<String>,
    /// Whether this program's guard must watch the instance: nothing else ends an abandoned
    /// worker.
    pub needs_guard: bool,
}

/// Optional features of a cloud.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// The cloud ends an instance at its lease's deadline.
    pub server_deadline: bool,
    /// An instance can end itself and its billing.
    pub self_destruct: bool,
    /// It rents preemptible instances.
    pub spot: bool,
}

impl Capabilities {
    /// Whether an instance ends at its deadline without a controller.
    pub fn ends_by_itself(self) -> bool {
        self.server_deadline || self.self_destruct
    }
}

/// Information about an account.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Account {
    /// Its owner, as text from the cloud.
    pub who: Option<String>,
    /// Remaining balance.
    pub balance: Option<Usd>,
}

/// Offers of a cloud.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offers {
    /// Offers that can be compared.
    pub offers: Vec<Offer>,
    /// Offers that cannot, by reason.
    pub dropped: Vec<Dropped>,
}

/// Offers left out before any filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Reason as text: `priced in EUR`, `paid in advance`.
    pub reason: String,
    /// Number of offers.
    pub count: usize,
}

impl Offers {
    /// Separates offers from the reasons for which others are left out.
    pub fn collect(items: impl IntoIterator<Item = Result<Offer, String>>) -> Self {
        let mut sorted = Self::default();
        for item in items {
            match item {
                Ok(offer) => sorted.offers.push(offer),
                Err(reason) => sorted.drop_one(reason),
            }
        }
        sorted
    }

    fn drop_one(&mut self, reason: String) {
        match self.dropped.iter_mut().find(|dropped| dropped.reason == reason) {
            Some(dropped) => dropped.count += 1,
            None => self.dropped.push(Dropped { reason, count: 1 }),
        }
    }
}

/// Purpose and limits of a rental.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    /// Tag of the instance.
    pub tag: LeaseTag,
    /// OpenSSH public key that is authorised.
    pub ssh_public_key: String,
    /// Disk to reserve, on clouds that need it.
    pub disk: Bytes,
    /// Model to fetch before the instance starts.
    pub stage: Option<Stage>,
}

/// A hub model to fetch to the shared file system of all instances.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Model id, `owner/name`.
    pub model: String,
    /// Commit hash.
    pub commit: String,
    /// Its files, with plain names.
    pub files: Vec<FileBytes>,
}

impl Stage {
    /// Total size of the files.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.bytes)))
    }
}

/// The tag in every instance's name: owner, run, nonce and deadline. It suffices for a reaper to
/// decide on an instance.
///
/// Format: `outliers-<owner>-<run>-<nonce>-<deadline as Unix seconds>`; the parts are lower-case
/// letters and digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LeaseTag {
    /// Owner of the ledger that rented it.
    pub owner: String,
    /// Id of the run.
    pub run: String,
    /// Unique per create call.
    pub nonce: String,
    /// Time after which the instance must not exist, in Unix seconds.
    pub deadline: u64,
}

impl fmt::Display for LeaseTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "outliers-{}-{}-{}-{}", self.owner, self.run, self.nonce, self.deadline)
    }
}

impl FromStr for LeaseTag {
    type Err = NotOurs;

    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let parts: Vec<&str> = text.split('-').collect();
        let ["outliers", owner, run, nonce, deadline] = parts[..] else { return Err(NotOurs) };
        let word = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !(word(owner) && word(run) && word(nonce)) {
            return Err(NotOurs);
        }
        let deadline = deadline.parse().map_err(|_| NotOurs)?;
        Ok(Self { owner: owner.to_owned(), run: run.to_owned(), nonce: nonce.to_owned(), deadline })
    }
}

/// The name is not a lease tag. The instance was not rented by this program and is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a lease tag")]
pub struct NotOurs;

/// A broker's id of an instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(pub String);

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An instance as the broker lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Name of the broker.
    pub broker: String,
    /// The broker's id.
    pub id: InstanceId,
    /// Name, label or tag of the instance; this program's parse as [`LeaseTag`].
    pub name: String,
    /// State of the instance.
    pub state: InstanceState,
    /// Price that it bills.
    pub price: Option<UsdPerHour>,
    /// Hardware as text for tables: `2 x A100-80GB`, `8 CPU cores`.
    pub hardware: String,
    /// Creation time in Unix seconds.
    pub created_at: Option<u64>,
}

impl Instance {
    /// An instance without price, hardware and creation time.
    pub fn new(broker: &str, id: impl Into<String>, name: impl Into<String>, state: InstanceState) -> Self {
        let (broker, id, name) = (broker.to_owned(), InstanceId(id.into()), name.into());
        Self { broker, id, name, state, price: None, hardware: String::new(), created_at: None }
    }

    /// Whether neither its name nor its tag can be read, so that it may be this program's.
    pub fn is_nameless(&self) -> bool {
        matches!(self.state, InstanceState::Unreadable(_)) && self.name.is_empty()
    }

    /// The lease tag; `None` for instances of other programs.
    pub fn tag(&self) -> Option<LeaseTag> {
        self.name.parse().ok()
    }
}

/// State of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Not reachable yet.
    Booting,
    /// In a queue, for this reason. It bills nothing meanwhile.
    Queued(String),
    /// The cloud states its address. Whether it answers is unknown.
    Ready(SshEndpoint),
    /// It will not start; it may still bill.
    Failed(String),
    /// Stopped, possibly still billing its disk.
    Stopped,
    /// Being terminated.
    Terminating,
    /// An unknown state of the cloud.
    Unknown(String),
    /// The cloud's entry cannot be parsed, for this reason. Its name and id are empty if they are
    /// unreadable; then it may be any instance.
    Unreadable(String),
}
