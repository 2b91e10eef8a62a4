//! A creation whose answer is lost is not repeated; its instance is found by its tag.

use std::time::{Duration, Instant};

use outliers::cloud::broker::{Broker, BrokerErrorKind};

use super::{first_offer, found, kind, lease, live, rent};
use crate::{FakeCloud, Fault, How, Op, Refusal};

/// The instance has the lease's tag, key and disk from the start.
pub async fn carries_the_lease(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (lease, made) = rent(&*broker).await;
    let state = cloud.state();
    let [instance] = &state.instances[..] else { panic!("one was asked for: {:?}", state.instances) };
    assert_eq!(instance.id, made.id.0);
    assert_eq!(instance.name, lease.tag.to_string());
    let key = instance.public_key.as_deref().unwrap_or_default().trim();
    assert_eq!(key, lease.ssh_public_key, "the run's key may log in, and no other");
    assert!(instance.disk_gib >= super::DISK_GIB, "{instance:?}");
    assert_eq!(state.count(Op::Create), 1);
}

/// Nothing of a lease is in the account after its instance ended.
pub async fn leaves_nothing_behind(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    broker.terminate(&made.id).await.expect("it can be ended");
    assert_eq!(cloud.state().keys, []);
}

/// A termination removes keys of expired leases, and keeps those of others.
pub async fn sweeps_old_keys(cloud: &FakeCloud) {
    let key = |id: &str, name: &str| crate::SshKey {
        id: id.to_owned(),
        name: name.to_owned(),
        public_key: "ssh-ed25519 AAAA".to_owned(),
    };
    let now = cloud.state().now;
    let young = format!("outliers-b2-r1-n1-{}", now + 3600);
    cloud.state().keys = vec![key("501", "mine"), key("502", "outliers-b2-r1-n0-1000"), key("503", &young)];
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    broker.terminate(&made.id).await.expect("it can be ended");
    let state = cloud.state();
    let uses_keys = state.count(Op::Keys) > 0;
    let left: Vec<&str> = state.keys.iter().map(|key| key.id.as_str()).collect();
    let expected: &[&str] = if uses_keys { &["501", "503"] } else { &["501", "502", "503"] };
    assert_eq!(left, expected);
}

/// Missing capacity is reported in the cloud's words, and nothing is rented.
pub async fn knows_no_capacity(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let offer = first_offer(&*broker).await;
    // Another customer rented it first.
    cloud.state().stock[0].left = 0;
    let made = broker.create(&offer, &lease()).await;
    assert_eq!(kind(&made), Some(BrokerErrorKind::NoCapacity), "{made:?}");
    assert!(made.is_err_and(|error| error.message.len() > 20), "the cloud's own words are handed on");
    assert_eq!(live(cloud), []);
    assert_eq!(cloud.state().keys, [], "and no key of it stays");
    assert_eq!(cloud.state().count(Op::Create), 1);
}

/// An account without funds is reported.
pub async fn knows_no_funds(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let offer = first_offer(&*broker).await;
    cloud.state().funds = false;
    let made = broker.create(&offer, &lease()).await;
    assert_eq!(kind(&made), Some(BrokerErrorKind::Budget), "{made:?}");
    assert_eq!(live(cloud), []);
}

/// A request that the cloud refuses as invalid is not repeated.
pub async fn knows_a_wrong_request(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let offer = first_offer(&*broker).await;
    let said = "the field `image` is not a valid image reference";
    cloud.state().fail(Op::Create, How::Refuse(Refusal::Invalid(said.to_owned())));
    let made = broker.create(&offer, &lease()).await;
    assert_eq!(kind(&made), Some(BrokerErrorKind::Rejected), "{made:?}");
    assert!(made.is_err_and(|error| error.message.contains("valid image reference")));
    assert_eq!(cloud.state().count(Op::Create), 1);
}

/// After `Retry-After`, the request is repeated when that time is over, and one instance is
/// created.
pub async fn waits_when_told_to(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (offer, lease) = (first_offer(&*broker).await, lease());
    cloud.state().fail(Op::Create, How::Refuse(Refusal::RateLimited(Some(1))));
    let begun = Instant::now();
    broker.create(&offer, &lease).await.expect("the second try is taken");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert_eq!(cloud.state().count(Op::Create), 2);
    assert_eq!(found(&*broker, &lease).await.len(), 1);
}

/// The same without a time.
pub async fn waits_when_not_told_how_long(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (offer, lease) = (first_offer(&*broker).await, lease());
    cloud.state().fail(Op::Create, How::Refuse(Refusal::RateLimited(None)));
    broker.create(&offer, &lease).await.expect("the second try is taken");
    assert_eq!(cloud.state().count(Op::Create), 2);
    assert_eq!(found(&*broker, &lease).await.len(), 1);
}

/// If every request is throttled, that is reported and nothing is rented.
pub async fn gives_up_when_always_too_early(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let offer = first_offer(&*broker).await;
    cloud.state().fail_always(Op::Create, How::Refuse(Refusal::RateLimited(None)));
    let made = broker.create(&offer, &lease()).await;
    assert_eq!(kind(&made), Some(BrokerErrorKind::RateLimited), "{made:?}");
    assert_eq!(live(cloud), []);
}

/// A server error before the creation: the outcome is unknown, and the list shows no instance.
pub async fn failing_before_it_is_done(cloud: &FakeCloud) {
    for status in [500, 502, 503, 504] {
        lost(cloud, How::Refuse(Refusal::Broken(status)), false).await;
    }
}

/// A server error after the creation: the outcome is unknown, and the list shows the instance.
pub async fn failing_after_it_is_done(cloud: &FakeCloud) {
    for status in [500, 502, 503, 504] {
        lost(cloud, How::Refuse(Refusal::Broken(status)), true).await;
    }
}

/// No answer; nothing was created.
pub async fn unanswered_before_it_is_done(cloud: &FakeCloud) {
    lost(cloud, How::Hang, false).await;
}

/// No answer; the instance was created.
pub async fn unanswered_after_it_is_done(cloud: &FakeCloud) {
    lost(cloud, How::Hang, true).await;
}

/// The connection breaks within the answer.
pub async fn cut_off(cloud: &FakeCloud) {
    lost(cloud, How::CutBody, false).await;
    lost(cloud, How::CutBody, true).await;
}

/// An invalid answer leaves the outcome unknown.
pub async fn answered_with_nonsense(cloud: &FakeCloud) {
    for how in [How::NotJson, How::OtherJson, How::Html, How::Empty] {
        lost(cloud, how.clone(), false).await;
        lost(cloud, how, true).await;
    }
}

/// After a creation whose answer is lost, the list shows exactly the instances that the cloud
/// created.
async fn lost(cloud: &FakeCloud, how: How, applied: bool) {
    let patient = cloud.broker();
    let (offer, lease) = (first_offer(&*patient).await, lease());
    let before = cloud.state().count(Op::Create);
    cloud.state().faults.push(Fault { on: Op::Create, applied, how: how.clone(), times: 1 });
    let hangs = matches!(how, How::Hang);
    let broker: Box<dyn Broker> = if hangs { cloud.impatient_broker() } else { cloud.broker() };
    let made = broker.create(&offer, &lease).await;
    assert_eq!(kind(&made), Some(BrokerErrorKind::Maybe), "{how:?}, applied {applied}: {made:?}");
    assert_eq!(cloud.state().count(Op::Create), before + 1, "{how:?}: it is not made again");
    let found = found(&*patient, &lease).await;
    assert_eq!(found.len(), usize::from(applied), "{how:?}: {found:?}");
    for instance in found {
        patient.terminate(&instance.id).await.expect("what is found can be ended");
    }
    assert_eq!(live(cloud), []);
}
