//! Instances are told to end, and whoever pays for them hears soon when they do not.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::{DeployEvent, NotEnding, OnEvent};
use crate::cloud::broker::{BrokerError, InstanceId};
use crate::cloud::clouds::Cloud;
use crate::units::{Usd, UsdPerHour};
use crate::waiting::{Failed, told};

/// Between two words about the same.
const PAUSE: Duration = Duration::from_secs(30);

/// Ends instances of one cloud.
pub(super) struct Ender<'a> {
    cloud: &'a Cloud,
    on: &'a OnEvent<'a>,
    said: Mutex<Option<Instant>>,
}

/// What an instance bills, and has cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bill {
    pub(super) price: Option<UsdPerHour>,
    pub(super) cost: Option<Usd>,
}

impl<'a> Ender<'a> {
    pub(super) fn new(cloud: &'a Cloud, on: &'a OnEvent<'a>) -> Self {
        Self { cloud, on, said: Mutex::default() }
    }

    /// Tells it to end; why not, if the cloud refuses.
    pub(super) async fn end(&self, id: &InstanceId, bill: Bill) -> Option<BrokerError> {
        (self.on)(DeployEvent::Terminating(id.clone()));
        let slow = |failed: Option<&Failed>| match failed {
            Some(Failed { words, pause }) => self.say(id, bill, words, *pause),
            None => self.say(id, bill, "no answer yet", self.cloud.timeouts.call),
        };
        let ended = told(slow, self.cloud.call(self.cloud.broker.terminate(id))).await;
        if let Err(error) = &ended {
            self.say(id, bill, &error.to_string(), self.cloud.timeouts.listing_interval);
        }
        ended.err()
    }

    fn say(&self, id: &InstanceId, Bill { price, cost }: Bill, why: &str, pause: Duration) {
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if said.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        *said = Some(Instant::now());
        let (broker, instance, why) = (self.cloud.name().to_owned(), id.clone(), why.to_owned());
        (self.on)(DeployEvent::NotEnding(Box::new(NotEnding { broker, instance, why, pause, price, cost })));
    }
}
