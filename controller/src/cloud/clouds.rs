//! The clouds of a command, queried concurrently.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;

use crate::cloud::broker::{Broker, BrokerError, BrokerErrorKind, Dropped, GpuRequest, Instance, InstanceId, Offer};
use crate::units::Span;

/// Separator between names of brokers.
pub const BETWEEN_BROKERS: &str = ", ";
/// Maximum difference in seconds between this machine's clock and a cloud's for renting, since
/// instances end at a time of day.
const MAX_SKEW: i64 = 5 * 60;

/// A cloud with its timeouts.
#[derive(Clone)]
pub struct Cloud {
    /// The cloud.
    pub broker: Arc<dyn Broker>,
    /// Its timeouts.
    pub timeouts: Timeouts,
    /// Whether it is this machine: nothing is billed, and paths are the same.
    pub is_local: bool,
}

impl fmt::Debug for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cloud").field("broker", &self.name()).finish_non_exhaustive()
    }
}

impl Cloud {
    /// Its broker's name.
    pub fn name(&self) -> &'static str {
        self.broker.name()
    }

    /// The cloud's clock in Unix seconds when the local one is `now`.
    pub fn time(&self, now: u64) -> u64 {
        now.saturating_add_signed(self.broker.clock_skew().unwrap_or_default())
    }

    /// Applies the call's timeout, after which the call may have been executed.
    ///
    /// # Errors
    /// Errors of the call, and [`BrokerErrorKind::Maybe`].
    pub async fn call<T>(&self, call: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
        tokio::time::timeout(self.timeouts.call, call).await.unwrap_or_else(|_| {
            let message = format!("no answer within {} s", self.timeouts.call.as_secs());
            Err(BrokerError { broker: self.name(), kind: BrokerErrorKind::Maybe, message })
        })
    }

    /// The list, in which these instances surely are if they are there: an entry without a
    /// readable id may be any of them, so that the cloud's word on each decides.
    ///
    /// # Errors
    /// Errors of the list, and of a query that is needed.
    pub async fn list(&self, known: &[&InstanceId]) -> Result<Vec<Instance>, BrokerError> {
        let mut listed = self.call(self.broker.list()).await?;
        if listed.iter().any(|instance| instance.id.0.is_empty()) {
            for id in known {
                if !listed.iter().any(|instance| instance.id == **id) {
                    listed.extend(self.call(self.broker.get(id)).await?);
                }
            }
        }
        Ok(listed)
    }

    /// The instance with this name, if there is one.
    ///
    /// # Errors
    /// Errors of the list; also if an unreadable entry may be the instance.
    pub async fn named(&self, name: &str) -> Result<Option<Instance>, BrokerError> {
        let listed = self.call(self.broker.list()).await?;
        let unclear = |message: &str| {
            Err(BrokerError { broker: self.name(), kind: BrokerErrorKind::Unavailable, message: message.to_owned() })
        };
        let nameless = listed.iter().any(Instance::is_nameless);
        match listed.into_iter().find(|instance| instance.name == name) {
            Some(found) if found.id.0.is_empty() => unclear("it lists the instance, and its id cannot be read"),
            None if nameless => unclear("an entry of its list cannot be read, and may be the instance"),
            found => Ok(found),
        }
    }

    /// The existing ones of these instances: by the list or, if it fails, by a query for each.
    ///
    /// # Errors
    /// The list's error, if queries fail as well.
    pub async fn those_of(&self, ids: &[&InstanceId]) -> Result<Vec<Instance>, BrokerError> {
        let unlisted = match self.list(ids).await {
            Ok(listed) => return Ok(listed.into_iter().filter(|instance| ids.contains(&&instance.id)).collect()),
            Err(error) => error,
        };
        let mut there = Vec::new();
        for id in ids {
            let alone = self.call(self.broker.get(id)).await;
            there.extend(alone.map_err(|_| unlisted.clone())?);
        }
        Ok(there)
    }
}

/// Time limits, and numbers of attempts.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeouts {
    /// One call to a broker. After it the call's outcome is unknown.
    pub call: Duration,
    /// From the create call, or the end of the queue, to an address.
    pub boot: Duration,
    /// Time in the queue of a cloud that has one. A lease is extended by it.
    pub queue: Duration,
    /// From an address to an SSH session.
    pub ssh: Duration,
    /// From the login to the worker's start. Uploads at a usable rate extend it.
    pub ready: Duration,
    /// To find out whether an unanswered create call made an instance.
    pub settle: Duration,
    /// To fetch the files.
    pub sync: Duration,
    /// To confirm that a terminated instance is gone.
    pub terminate: Duration,
    /// Minimum time between two listings.
    pub listing_interval: Duration,
    /// Complete listings without an instance after which it counts as gone.
    pub absences: u32,
    /// First pause after a failure. It doubles up to 30 times this.
    pub backoff: Duration,
}

impl Timeouts {
    /// For clouds. An image of 10 GB takes long to load, and a new instance may appear only in the
    /// third listing.
    pub const CLOUD: Self = Self {
        call: Duration::from_secs(120),
        boot: Duration::from_secs(20 * 60),
        queue: Duration::ZERO,
        ssh: Duration::from_secs(10 * 60),
        ready: Duration::from_secs(5 * 60),
        settle: Duration::from_secs(10 * 60),
        sync: Duration::from_secs(30 * 60),
        terminate: Duration::from_secs(15 * 60),
        listing_interval: Duration::from_secs(10),
        absences: 3,
        backoff: Duration::from_secs(1),
    };

    /// For this machine, which is fast and consistent.
    pub const LOCAL: Self = Self {
        call: Duration::from_secs(60),
        boot: Duration::from_secs(60),
        queue: Duration::ZERO,
        ssh: Duration::from_secs(60),
        ready: Duration::from_secs(5 * 60),
        settle: Duration::from_secs(60),
        sync: Duration::from_secs(10 * 60),
        terminate: Duration::from_secs(60),
        listing_interval: Duration::from_millis(200),
        absences: 2,
        backoff: Duration::from_millis(200),
    };
}

/// One or more clouds, in the order given.
#[derive(Clone, Debug)]
pub struct Clouds(Vec<Cloud>);

impl From<Vec<Cloud>> for Clouds {
    fn from(clouds: Vec<Cloud>) -> Self {
        Self(clouds)
    }
}

/// Offers of all clouds.
#[derive(Debug, Default)]
pub struct Offered {
    /// Offers of all clouds that answered.
    pub offers: Vec<Offer>,
    /// Offers left out before any filter: broker, reason, number.
    pub dropped: Vec<(&'static str, Dropped)>,
    /// Errors of the clouds that did not answer.
    pub silent: Vec<BrokerError>,
}

impl Clouds {
    /// All clouds, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Cloud> {
        self.0.iter()
    }

    /// The cloud with this name.
    pub fn get(&self, name: &str) -> Option<&Cloud> {
        self.0.iter().find(|cloud| cloud.name() == name)
    }

    /// The one whose offer this is.
    pub fn of(&self, offer: &Offer) -> Option<&Cloud> {
        self.0.iter().find(|cloud| cloud.broker.made(offer))
    }

    /// Their names, as a run keeps them.
    pub fn names(&self) -> String {
        self.0.iter().map(Cloud::name).collect::<Vec<_>>().join(BETWEEN_BROKERS)
    }

    /// Whether this machine is the only cloud.
    pub fn is_local(&self) -> bool {
        self.0.iter().all(|cloud| cloud.is_local)
    }

    /// Why this machine's clock does not allow renting, by the clouds that have answered.
    pub fn wrong_clock(&self) -> Option<String> {
        let skew = |cloud: &Cloud| Some((cloud.name(), cloud.broker.clock_skew()?));
        let (name, skew) = self.0.iter().filter_map(skew).find(|(_, skew)| skew.abs() > MAX_SKEW)?;
        let by = Span(Duration::from_secs(skew.unsigned_abs()));
        let way = if skew > 0 { "behind" } else { "ahead of" };
        Some(format!("this machine's clock is {by} {way} that of {name}: an instance would end at the wrong time"))
    }

    /// Queries all clouds at once.
    ///
    /// # Errors
    /// The first error, if no cloud answers.
    pub async fn offers(&self, want: &GpuRequest) -> Result<Offered, BrokerError> {
        let ask = |cloud: &Cloud| {
            let cloud = cloud.clone();
            async move { (cloud.name(), cloud.call(cloud.broker.offers(want)).await) }
        };
        let mut all = Offered::default();
        for (name, answer) in join_all(self.0.iter().map(ask)).await {
            match answer {
                Ok(found) => {
                    all.offers.extend(found.offers);
                    all.dropped.extend(found.dropped.into_iter().map(|dropped| (name, dropped)));
                }
                Err(error) => all.silent.push(error),
            }
        }
        match all.silent.first() {
            Some(error) if all.silent.len() == self.0.len() => Err(error.clone()),
            _ => Ok(all),
        }
    }
}

/// Unfit machines, by broker and the broker's machine id. Shared by all runs of a batch.
#[derive(Clone, Debug, Default)]
pub struct BadHosts(Arc<Mutex<BTreeSet<(String, String)>>>);

impl BadHosts {
    /// Adds the machine of `offer`, if the cloud identifies it.
    pub fn remember(&self, offer: &Offer) {
        if let Some(machine) = &offer.machine {
            self.0.lock().expect("nothing panics while it is held").insert((offer.broker.clone(), machine.clone()));
        }
    }

    /// Whether the machine of `offer` is unfit.
    pub fn has(&self, offer: &Offer) -> bool {
        let known = self.0.lock().expect("nothing panics while it is held");
        offer.machine.as_ref().is_some_and(|machine| known.contains(&(offer.broker.clone(), machine.clone())))
    }
}
