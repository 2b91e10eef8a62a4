//! Terminates instances, and reports those that do not end.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::{DeployEvent, OnEvent, StillBilling, Target};
use crate::cloud::broker::{BrokerError, Instance, InstanceId, InstanceState};
use crate::cloud::clouds::Cloud;
use crate::units::{Usd, UsdPerHour};
use crate::waiting::{Failed, told};

/// Interval of reports about the same instance.
const PAUSE: Duration = Duration::from_secs(30);

/// Terminates instances of one cloud.
pub(super) struct InstanceTerminator<'a> {
    cloud: &'a Cloud,
    on: &'a OnEvent<'a>,
    said: Mutex<Option<Instant>>,
}

/// Price and cost of an instance.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bill {
    pub(super) price: Option<UsdPerHour>,
    pub(super) cost: Option<Usd>,
}

impl<'a> InstanceTerminator<'a> {
    pub(super) fn new(cloud: &'a Cloud, on: &'a OnEvent<'a>) -> Self {
        Self { cloud, on, said: Mutex::default() }
    }

    /// Ends instances until complete lists show none of them. `bill` is asked each time one is told
    /// to end, `listed` for those of them that there are.
    ///
    /// # Errors
    /// Why they could not be seen gone.
    pub(super) async fn until_gone<List>(
        &self,
        mut left: Vec<Target>,
        bill: impl Fn(&Target) -> Bill,
        listed: impl Fn() -> List,
    ) -> Result<(), String>
    where
        List: Future<Output = Result<Vec<Instance>, BrokerError>>,
    {
        let timeouts = &self.cloud.timeouts;
        let deadline = Instant::now() + timeouts.terminate;
        let mut absences = 0;
        loop {
            let mut trouble = None;
            for target in &left {
                trouble = self.end(&target.id, bill(target)).await.or(trouble);
            }
            match listed().await {
                Ok(there) => {
                    absences = if there.is_empty() { absences + 1 } else { 0 };
                    if absences >= timeouts.absences {
                        return Ok(());
                    }
                    let bills = |instance: &&Instance| instance.state != InstanceState::Terminating;
                    left = there.iter().filter(bills).map(Target::from).collect();
                }
                // What cannot be listed can be ended.
                Err(error) => trouble = Some(error),
            }
            if Instant::now() >= deadline {
                return Err(trouble.map_or_else(|| "it is still listed".to_owned(), |error| error.to_string()));
            }
            tokio::time::sleep(timeouts.listing_interval).await;
        }
    }

    /// Tells it to end; why not, if the cloud refuses.
    async fn end(&self, id: &InstanceId, bill: Bill) -> Option<BrokerError> {
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
        (self.on)(DeployEvent::StillBilling(Box::new(StillBilling { broker, instance, why, pause, price, cost })));
    }
}
