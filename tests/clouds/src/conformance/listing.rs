//! Lists are complete or an error, and instances are as the cloud has them.

use std::collections::BTreeSet;

use outliers::cloud::broker::{BrokerErrorKind, InstanceState};
use serde_json::{Value, json};

use super::life::ready;
use super::{found, kind, rent};
use crate::{FakeCloud, InstanceStatus, Odd, Op};

/// Every page is read, and each instance is listed once.
pub async fn goes_to_the_last_page(cloud: &FakeCloud) {
    let planted: BTreeSet<String> = {
        let mut state = cloud.state();
        state.page_size = 7;
        state.stock.iter_mut().for_each(|stock| stock.left = 1000);
        (0..40).map(|at| state.plant(&format!("somebody's box {at}"))).collect()
    };
    let listed = cloud.broker().list().await.expect("it is read");
    assert_eq!(listed.len(), planted.len(), "none comes twice");
    let listed: BTreeSet<String> = listed.into_iter().map(|instance| instance.id.0).collect();
    assert_eq!(listed, planted);
}

/// A list that announces more entries than it has is an error.
pub async fn that_is_cut_short_is_an_error(cloud: &FakeCloud) {
    if !cloud.dialect().tells_totals() {
        return;
    }
    {
        let mut state = cloud.state();
        (state.page_size, state.truncates) = (2, true);
        (0..5).for_each(|at| drop(state.plant(&format!("box {at}"))));
    }
    let listed = cloud.broker().list().await;
    assert!(listed.is_err(), "{listed:?}");
}

/// An empty account is an empty list.
pub async fn may_be_empty(cloud: &FakeCloud) {
    assert_eq!(cloud.broker().list().await.expect("it is read"), []);
}

/// Instances of other owners are listed as such.
pub async fn shows_what_is_not_ours(cloud: &FakeCloud) {
    let names = ["somebody's box", "", "outliers", "outliers-a-b-c-soon", "outliers-A-b-c-1"];
    names.iter().for_each(|name| drop(cloud.state().plant(name)));
    let listed = cloud.broker().list().await.expect("it is read");
    assert_eq!(listed.len(), names.len());
    assert!(listed.iter().all(|instance| instance.tag().is_none()), "{listed:?}");
}

/// A ready instance has the address of the cloud. An instance that is ready in a single query is
/// also ready in the list.
pub async fn says_where_to_log_in(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (lease, made) = rent(&*broker).await;
    let InstanceState::Ready(alone) = ready(&*broker, &made).await.state else { unreachable!("it is ready") };
    let ssh = cloud.state().instances[0].ssh.clone();
    assert_eq!(alone.host, ssh.host);
    let listed = found(&*broker, &lease).await;
    assert_eq!(listed[0].state, InstanceState::Ready(alone));
}

/// An unknown status is passed on as text; the instance is listed with its tag and can be ended.
pub async fn survives_unknown_words(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (lease, made) = rent(&*broker).await;
    cloud.state().change(&made.id.0, |instance| {
        instance.life = InstanceStatus::Running;
        instance.odd_status = Some("HIBERNATING_2".to_owned());
    });
    let listed = found(&*broker, &lease).await;
    assert_eq!(listed.len(), 1);
    for instance in [listed.into_iter().next(), broker.get(&made.id).await.expect("it is read")] {
        let state = instance.map(|instance| instance.state);
        let Some(InstanceState::Unknown(word)) = state else { panic!("{state:?} is unknown") };
        assert!(word.contains("HIBERNATING_2"), "{word}");
    }
    broker.terminate(&made.id).await.expect("it can be ended");
    assert_eq!(cloud.state().live().count(), 0);
}

/// If any field of an instance is missing, null or of another type, the other instances are listed
/// unchanged. The instance is listed by its id or tag, and can be ended.
pub async fn reads_each_entry_by_itself(cloud: &FakeCloud) {
    let stranger = cloud.state().plant("somebody's box");
    let broker = cloud.broker();
    let (lease, made) = rent(&*broker).await;
    assert_eq!(broker.list().await.expect("it is read").len(), 2);
    let fields = cloud.state().fields.clone();
    assert!(fields.contains_key("id") && fields.len() > 5, "{fields:?}");
    for (field, usual) in &fields {
        for value in [None, Some(Value::Null), Some(json!({"odd": true})), Some(of_another_type(usual))] {
            let odd = Odd { id: made.id.0.clone(), field: field.clone(), value };
            let what = format!("{odd:?}");
            cloud.state().odd = Some(odd);
            let listed = broker.list().await.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(listed.len(), 2, "{what}: {listed:?}");
            assert!(listed.iter().any(|instance| instance.id.0 == stranger), "{what}: {listed:?}");
            let ours = listed.iter().find(|instance| instance.id.0 != stranger).expect("there are two");
            let (named, tagged) = (ours.id == made.id, ours.tag().as_ref() == Some(&lease.tag));
            assert!(named || field == "id", "{what}: {ours:?}");
            assert!(tagged || ["name", "label"].contains(&field.as_str()), "{what}: {ours:?}");
            let alone = broker.get(&made.id).await;
            assert!(!matches!(alone, Ok(None)), "{what}: it is not gone");
        }
    }
    broker.terminate(&made.id).await.expect("it can be ended");
    assert_eq!(cloud.state().live().count(), 1);
}

/// The same value in another notation: a number as a string, a string as a number.
fn of_another_type(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(number.to_string()),
        Value::String(text) => text.parse::<u64>().map_or(json!(77), |number| json!(number)),
        _ => json!("odd"),
    }
}

/// An entry with neither id nor name is counted, because its owner is unknown.
pub async fn counts_what_it_cannot_read(cloud: &FakeCloud) {
    let id = cloud.state().plant("somebody's box");
    cloud.state().odd = Some(Odd { id, field: "id".to_owned(), value: Some(json!([7])) });
    let listed = cloud.broker().list().await.expect("it is read");
    assert_eq!(listed.len(), 1);
    assert!(matches!(listed[0].state, InstanceState::Unreadable(_)) && listed[0].id.0.is_empty(), "{listed:?}");
}

/// An instance that fails or is stopped is not reported as ready.
pub async fn knows_what_does_not_serve(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    for life in [InstanceStatus::Failed, InstanceStatus::Stopped] {
        cloud.state().change(&made.id.0, |instance| instance.life = life);
        let state = broker.get(&made.id).await.expect("it is read").expect("it is there").state;
        assert!(matches!(state, InstanceState::Failed(_) | InstanceState::Stopped), "{life:?}: {state:?}");
    }
}

/// A new instance that is not listed yet is missing, not an error. An ended one that is still
/// listed is not ready.
pub async fn may_be_late(cloud: &FakeCloud) {
    {
        let mut state = cloud.state();
        (state.shown_after, state.lingers) = (2, 2);
    }
    let broker = cloud.broker();
    let (lease, made) = rent(&*broker).await;
    assert_eq!(found(&*broker, &lease).await.len(), 0);
    assert_eq!(found(&*broker, &lease).await.len(), 0);
    assert_eq!(found(&*broker, &lease).await.len(), 1);
    ready(&*broker, &made).await;
    broker.terminate(&made.id).await.expect("it can be ended");
    let lingering = found(&*broker, &lease).await;
    assert!(lingering.iter().all(|instance| instance.state == InstanceState::Terminating), "{lingering:?}");
    broker.terminate(&made.id).await.expect("what has ended is ended");
}

/// An instance that ended by other means is gone; ending it succeeds.
pub async fn forgets_what_ended(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (lease, made) = rent(&*broker).await;
    assert!(cloud.state().end(&made.id.0));
    assert_eq!(found(&*broker, &lease).await, []);
    assert_eq!(broker.get(&made.id).await.expect("it is read"), None);
    broker.terminate(&made.id).await.expect("it is gone");
}

/// An instance that does not end is not reported as gone.
pub async fn terminate_says_when_it_cannot(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    cloud.state().fail_always(Op::Terminate, crate::How::Refuse(crate::Refusal::Broken(503)));
    let ended = broker.terminate(&made.id).await;
    assert_eq!(kind(&ended), Some(BrokerErrorKind::Unavailable), "{ended:?}");
    cloud.state().faults.clear();
    broker.terminate(&made.id).await.expect("now it can be ended");
    assert_eq!(cloud.state().live().count(), 0);
}
