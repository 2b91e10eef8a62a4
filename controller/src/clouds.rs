//! The clouds that a command speaks to, side by side.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;

use crate::broker::{Broker, BrokerError, BrokerErrorKind, Dropped, GpuRequest, Offer};
use crate::run::BETWEEN_BROKERS;

/// A cloud and how it is dealt with.
#[derive(Clone)]
pub struct Cloud {
    /// The cloud.
    pub broker: Arc<dyn Broker>,
    /// How long things take there.
    pub patience: Patience,
    /// It is this machine: nothing costs real money, and paths are the same there.
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

    /// A call that does not answer in time may have happened.
    ///
    /// # Errors
    /// The call's own, and [`BrokerErrorKind::Maybe`].
    pub async fn call<T>(&self, call: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
        tokio::time::timeout(self.patience.call, call).await.unwrap_or_else(|_| {
            let message = format!("no answer within {} s", self.patience.call.as_secs());
            Err(BrokerError { broker: self.name(), kind: BrokerErrorKind::Maybe, message })
        })
    }
}

/// How long each thing may take, and how often it is tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Patience {
    /// One call to a broker; beyond it the call's outcome is unknown.
    pub call: Duration,
    /// From the create call to an address.
    pub boot: Duration,
    /// From an address to an SSH session.
    pub ssh: Duration,
    /// To learn whether an unanswered create call made an instance.
    pub settle: Duration,
    /// To bring the files home.
    pub sync: Duration,
    /// To see an instance gone that was told to go.
    pub terminate: Duration,
    /// Between two listings.
    pub listing_interval: Duration,
    /// Complete listings without an instance before it counts as gone.
    pub absences: u32,
    /// First pause after a failure; doubles up to 30 times itself.
    pub backoff: Duration,
}

impl Patience {
    /// For clouds. An image of 10 GB takes its time to arrive; a new instance may show in the third listing only.
    pub const CLOUD: Self = Self {
        call: Duration::from_secs(120),
        boot: Duration::from_secs(20 * 60),
        ssh: Duration::from_secs(10 * 60),
        settle: Duration::from_secs(10 * 60),
        sync: Duration::from_secs(30 * 60),
        terminate: Duration::from_secs(15 * 60),
        listing_interval: Duration::from_secs(10),
        absences: 3,
        backoff: Duration::from_secs(1),
    };

    /// For this machine, where everything is near and nothing is eventual.
    pub const LOCAL: Self = Self {
        call: Duration::from_secs(60),
        boot: Duration::from_secs(60),
        ssh: Duration::from_secs(60),
        settle: Duration::from_secs(60),
        sync: Duration::from_secs(10 * 60),
        terminate: Duration::from_secs(60),
        listing_interval: Duration::from_millis(200),
        absences: 2,
        backoff: Duration::from_millis(200),
    };
}

/// One or more clouds, in the order in which they were named.
#[derive(Clone, Debug)]
pub struct Clouds(Vec<Cloud>);

impl From<Vec<Cloud>> for Clouds {
    fn from(clouds: Vec<Cloud>) -> Self {
        Self(clouds)
    }
}

/// What all clouds together offer.
#[derive(Debug, Default)]
pub struct Offered {
    /// Of all clouds that answered.
    pub offers: Vec<Offer>,
    /// Left out before any filter: broker, why, how many.
    pub dropped: Vec<(&'static str, Dropped)>,
    /// Clouds that did not answer.
    pub silent: Vec<BrokerError>,
}

impl Clouds {
    /// Each.
    pub fn iter(&self) -> impl Iterator<Item = &Cloud> {
        self.0.iter()
    }

    /// By its name.
    pub fn get(&self, name: &str) -> Option<&Cloud> {
        self.0.iter().find(|cloud| cloud.name() == name)
    }

    /// Their names, as a run keeps them.
    pub fn names(&self) -> String {
        self.0.iter().map(Cloud::name).collect::<Vec<_>>().join(BETWEEN_BROKERS)
    }

    /// Only this machine.
    pub fn is_local(&self) -> bool {
        self.0.iter().all(|cloud| cloud.is_local)
    }

    /// Asks all of them at once.
    ///
    /// # Errors
    /// When none answers: what the first said.
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

/// Machines that did not serve, by broker and the broker's name for the machine. Shared by all runs of a batch.
#[derive(Clone, Debug, Default)]
pub struct BadHosts(Arc<Mutex<BTreeSet<(String, String)>>>);

impl BadHosts {
    /// Remembers the machine behind `offer`, where the cloud names it.
    pub fn remember(&self, offer: &Offer) {
        if let Some(machine) = &offer.machine {
            self.0.lock().expect("nothing panics while it is held").insert((offer.broker.clone(), machine.clone()));
        }
    }

    /// Whether the machine behind `offer` is one of them.
    pub fn has(&self, offer: &Offer) -> bool {
        let known = self.0.lock().expect("nothing panics while it is held");
        offer.machine.as_ref().is_some_and(|machine| known.contains(&(offer.broker.clone(), machine.clone())))
    }
}
