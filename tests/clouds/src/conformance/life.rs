//! The life of an instance without faults. Needs only a broker.

use outliers::cloud::broker::{Broker, Instance, InstanceState, Lease, Offer};
use outliers::units::Bytes;

use super::{LOOKS, lease};

/// The broker's capabilities are as declared.
pub fn capabilities_are_true(broker: &dyn Broker) {
    let capabilities = broker.capabilities();
    assert_eq!(capabilities.self_destruct, broker.self_destruct().is_some());
    if let Some(script) = broker.self_destruct() {
        assert!(!script.trim().is_empty());
    }
}

/// A valid key is accepted.
pub async fn a_good_key_is_good(broker: &dyn Broker) {
    broker.check().await.expect("the account is in order");
}

/// An instance has its lease's tag in the creation's answer, in lists and in single queries until
/// it ends. Ending it twice succeeds. `offer` gets the disk's size.
pub async fn a_life(broker: &dyn Broker, offer: &Offer, disk: Bytes) {
    let lease = Lease { disk, ..lease() };
    let made = broker.create(offer, &lease).await.expect("it can be rented");
    assert_eq!(made.tag().as_ref(), Some(&lease.tag), "the tag is on it: {made:?}");
    assert_eq!(made.broker, broker.name());
    assert!(!made.hardware.is_empty());

    let listed = find(broker, &made).await.expect("it is listed");
    assert_eq!(listed.tag().as_ref(), Some(&lease.tag));
    let alone = ready(broker, &made).await;
    assert_eq!(alone.tag().as_ref(), Some(&lease.tag));
    assert_eq!(alone.hardware, made.hardware, "it is called the same everywhere");
    assert_eq!(alone.price, Some(offer.price), "it bills what was offered");

    broker.terminate(&made.id).await.expect("it can be ended");
    broker.terminate(&made.id).await.expect("what has ended is ended");
    let after = find(broker, &made).await;
    assert!(after.is_none_or(|instance| instance.state == InstanceState::Terminating), "it is gone from the list");
    let after = broker.get(&made.id).await.expect("the cloud answers");
    assert!(after.is_none_or(|instance| instance.state == InstanceState::Terminating), "and alone");
}

/// Two leases are two instances; ending one does not affect the other.
pub async fn instances_are_apart(broker: &dyn Broker, offer: &Offer, disk: Bytes) {
    let (first, second) = (Lease { disk, ..lease() }, Lease { disk, ..lease() });
    let one = broker.create(offer, &first).await.expect("it can be rented");
    let two = broker.create(offer, &second).await.expect("and again");
    assert_ne!(one.id, two.id);
    broker.terminate(&one.id).await.expect("it can be ended");
    let left = find(broker, &two).await.expect("the other is still there");
    assert_eq!(left.tag().as_ref(), Some(&second.tag));
    broker.terminate(&two.id).await.expect("it can be ended");
}

async fn find(broker: &dyn Broker, made: &Instance) -> Option<Instance> {
    let listed = broker.list().await.expect("instances can be listed");
    listed.into_iter().find(|instance| instance.id == made.id)
}

/// The instance once it has an address.
pub(super) async fn ready(broker: &dyn Broker, made: &Instance) -> Instance {
    for _ in 0..LOOKS {
        let instance = broker.get(&made.id).await.expect("the cloud answers").expect("it is there");
        if matches!(instance.state, InstanceState::Ready(_)) {
            return instance;
        }
        let comes = matches!(instance.state, InstanceState::Booting | InstanceState::Queued(_));
        assert!(comes, "{instance:?}");
    }
    panic!("it does not come up in {LOOKS} looks");
}
