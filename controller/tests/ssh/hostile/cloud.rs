//! A cloud whose first offer is a hostile host and whose second is a good one.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use outliers::cloud::broker::{
    Account, Broker, BrokerError, Capabilities, GpuRequest, Instance, InstanceId, InstanceState, Lease, Offer, Offers,
};
use outliers::run::ledger::now_ms;
use outliers::units::UsdPerHour;

use super::host::{Attack, Host, LoginCounts};

/// The only cloud.
pub(crate) const NAME: &str = "hostile";
/// The offer with the good host.
const GOOD: &str = "good";

/// See the module.
pub(crate) struct Cloud {
    bad: Attack,
    instances: Mutex<Vec<(Instance, Host)>>,
    created: Mutex<usize>,
    pub(crate) tally: Arc<LoginCounts>,
}

impl Cloud {
    pub(crate) fn new(bad: Attack) -> Self {
        Self { bad, instances: Mutex::default(), created: Mutex::default(), tally: Arc::default() }
    }

    /// Number of instances so far, and of running ones.
    pub(crate) fn count(&self) -> (usize, usize) {
        (*self.created.lock().unwrap(), self.instances.lock().unwrap().len())
    }
}

#[async_trait]
impl Broker for Cloud {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        Ok(Account::default())
    }

    async fn offers(&self, _want: &GpuRequest) -> Result<Offers, BrokerError> {
        let offer = |key: &str, price| Offer::new(NAME, key.to_owned(), 0, UsdPerHour::from_dollars(price));
        // The cheapest is rented first.
        Ok(Offers { offers: vec![offer("hostile", 1.0), offer(GOOD, 1.1)], dropped: Vec::new() })
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let bad = if offer.key == GOOD { Attack::Nothing } else { self.bad };
        let host = Host::start(bad, self.tally.clone()).await;
        let mut created = self.created.lock().unwrap();
        *created += 1;
        let instance = Instance {
            broker: NAME.to_owned(),
            id: InstanceId(format!("hostile-{created}")),
            name: lease.tag.to_string(),
            state: InstanceState::Ready(host.endpoint()),
            price: Some(offer.price),
            hardware: "this machine".to_owned(),
            created_at: Some(now_ms() / 1000),
        };
        self.instances.lock().unwrap().push((instance.clone(), host));
        Ok(instance)
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        Ok(self.instances.lock().unwrap().iter().map(|(instance, _)| instance.clone()).collect())
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        self.instances.lock().unwrap().retain(|(instance, _)| instance.id != *id);
        Ok(())
    }
}
