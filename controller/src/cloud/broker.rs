//! A broker is one cloud: it knows offers and instances, and nothing of runs, ledgers, hosts or
//! other brokers.
//!
//! Implementations return values, not live objects. An error is never an empty list, and an
//! outcome that is not known is [`BrokerErrorKind::Maybe`], never a guess.

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

/// Declares the clouds' modules and lists them: a new cloud is its file and its line here.
macro_rules! clouds {
    ($($(#[$doc:meta])* $module:ident),* $(,)?) => {
        $($(#[$doc])* pub mod $module;)*

        /// Every cloud that is built in, beside this machine.
        pub const CLOUDS: &[&CloudKind] = &[$(&$module::CLOUD),*];
    };
}

clouds! { lambda, prime, runpod, vast }

/// One cloud.
#[async_trait]
pub trait Broker: Send + Sync {
    /// The name used in settings, ledgers and on the command line.
    fn name(&self) -> &'static str;

    /// What this cloud can do beyond renting.
    fn capabilities(&self) -> Capabilities;

    /// Whether the key is good. Costs nothing and changes nothing.
    async fn check(&self) -> Result<Account, BrokerError>;

    /// What can be rented now. `want` lets a cloud filter on its side; the market filters again.
    async fn offers(&self, want: &GpuRequest) -> Result<Offers, BrokerError>;

    /// Rents. The lease's tag is on the instance from the first moment it exists.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Maybe`] when an instance may have come of it; every other kind says that none did.
    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError>;

    /// Every instance of this account, ours or not, to the last page. What cannot be read is
    /// [`InstanceState::Unreadable`], never missing.
    async fn list(&self) -> Result<Vec<Instance>, BrokerError>;

    /// One instance; `None` when the cloud says that there is none, which may be too early to know.
    async fn get(&self, id: &InstanceId) -> Result<Option<Instance>, BrokerError> {
        Ok(self.list().await?.into_iter().find(|instance| instance.id == *id))
    }

    /// Ends an instance and its billing, and takes back what its creation left in the account. One
    /// that is gone already is a success.
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

    /// The price that an instance's host wants from some time on, in words, where a cloud lets
    /// hosts ask and nobody has answered. Nothing here ever says yes.
    async fn price_rise(&self, _id: &InstanceId) -> Result<Option<String>, BrokerError> {
        Ok(None)
    }

    /// Whether a checkpoint lies in this folder on the file system that all instances share;
    /// `None` where they share none.
    ///
    /// # Errors
    /// The call's.
    async fn has_checkpoint(&self, _folder: &str) -> Result<Option<bool>, BrokerError> {
        Ok(None)
    }

    /// The way to an instance that is no SSH server of its own; `None`: the address in its state
    /// is one.
    fn way(&self, _id: &InstanceId) -> Option<Way> {
        None
    }

    /// When the cloud itself ends an instance, or has ended it, as it was last listed; Unix
    /// seconds by its clock. `None`: at its lease's deadline.
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
    /// The cloud's own name for the variable that holds its key.
    pub key_variable: &'static str,
    /// Where its API answers.
    pub base_url: &'static str,
    /// Container image for instances; empty where a cloud rents virtual machines.
    pub image: &'static str,
    /// Where a person gets a key.
    pub key_page: &'static str,
    /// Speaks to it.
    pub connect: fn(Access) -> Box<dyn Broker>,
}

/// A cloud's API as one account reaches it.
pub struct Access {
    /// Speaks HTTP, with the account's key.
    pub http: Http,
    /// Container image for instances.
    pub image: String,
    /// Who logs in, where the cloud does not say and the settings do.
    pub ssh_user: Option<String>,
    /// Where SSH servers listen, where the cloud does not say and the settings do.
    pub ssh_port: Option<u16>,
}

/// The way to an instance that is no SSH server of its own.
pub struct Way {
    /// Commands and files there. The far side is trusted as far as this way checks it: no host key
    /// is pinned.
    pub transport: Arc<dyn Transport>,
    /// Stands for the instance in messages.
    pub name: String,
    /// The command line with which a person opens a shell there.
    pub shell: Vec<String>,
    /// Whether our guard has to watch over what runs there: nothing else ends a worker that nobody
    /// looks after.
    pub needs_guard: bool,
}

/// What a cloud can do beyond renting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// The cloud ends an instance at its lease's deadline by itself.
    pub server_deadline: bool,
    /// An instance can end itself, billing included.
    pub self_destruct: bool,
    /// It rents what it may take back.
    pub spot: bool,
}

impl Capabilities {
    /// Whether an instance ends at its deadline without any controller.
    pub fn ends_by_itself(self) -> bool {
        self.server_deadline || self.self_destruct
    }
}

/// What a cloud tells about an account.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Account {
    /// Whose it is, in the cloud's words.
    pub who: Option<String>,
    /// What is left to spend.
    pub balance: Option<Usd>,
}

/// What a cloud offers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Offers {
    /// Those that can be compared.
    pub offers: Vec<Offer>,
    /// Those that cannot, and why.
    pub dropped: Vec<Dropped>,
}

/// Offers that were left out before any filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// In words: `priced in EUR`, `paid in advance`.
    pub reason: String,
    /// How many.
    pub count: usize,
}

impl Offers {
    /// Sorts items into offers and reasons to leave them out.
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

/// What an instance is rented for.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    /// Carried by the instance.
    pub tag: LeaseTag,
    /// OpenSSH public key that may log in.
    pub ssh_public_key: String,
    /// Disk to reserve, where the cloud asks.
    pub disk: Bytes,
    /// What has to lie beside the instance before its own time begins.
    pub stage: Option<Stage>,
}

/// A model of the hub that is to be fetched to the file system that all instances share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Its id, `owner/name`.
    pub model: String,
    /// The commit.
    pub commit: String,
    /// Its files, with plain names.
    pub files: Vec<FileBytes>,
}

impl Stage {
    /// All of it.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.files.iter().fold(0_u64, |sum, file| sum.saturating_add(file.bytes)))
    }
}

/// The mark on every instance of ours: owner, run, nonce and deadline. A reaper can judge an
/// instance by it alone.
///
/// Written `outliers-<owner>-<run>-<nonce>-<deadline as Unix seconds>`; the parts are lower-case
/// letters and digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LeaseTag {
    /// Whose ledger rented it.
    pub owner: String,
    /// For which run.
    pub run: String,
    /// One per create call.
    pub nonce: String,
    /// After this the instance has no right to exist. Unix seconds.
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

/// The name is not a lease tag. The instance belongs to others and is never touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a lease tag")]
pub struct NotOurs;

/// A broker's name for an instance.
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
    /// Name, label or tag it carries; ours parse as [`LeaseTag`].
    pub name: String,
    /// Where it is in its life.
    pub state: InstanceState,
    /// What it bills.
    pub price: Option<UsdPerHour>,
    /// In words, for tables: `2 x A100-80GB`, `8 CPU cores`.
    pub hardware: String,
    /// Unix seconds.
    pub created_at: Option<u64>,
}

impl Instance {
    /// Whether neither its name nor its tag can be read: it may be ours.
    pub fn is_nameless(&self) -> bool {
        matches!(self.state, InstanceState::Unreadable(_)) && self.name.is_empty()
    }

    /// The lease, if the instance is one of ours.
    pub fn tag(&self) -> Option<LeaseTag> {
        self.name.parse().ok()
    }
}

/// An instance's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Not reachable yet.
    Booting,
    /// It waits for its turn, for this reason. That is no fault of it, and bills nothing.
    Queued(String),
    /// The cloud gives an address. Whether it answers is for us to find out.
    Ready(SshEndpoint),
    /// It will not come up; it may still bill.
    Failed(String),
    /// Stopped, possibly still billing its disk.
    Stopped,
    /// On its way out.
    Terminating,
    /// A word of the cloud that we do not know.
    Unknown(String),
    /// What the cloud shows of it cannot be read, for this reason. Its name is empty where that is
    /// why, and so is its id: then it may be any instance.
    Unreadable(String),
}
