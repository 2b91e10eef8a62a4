//! Invalid answers: a failed read is an error, never an empty result; requests that can be
//! repeated are retried; keys are never shown.

use std::sync::{Arc, Mutex};

use outliers::cloud::broker::{BrokerError, BrokerErrorKind, Instance, InstanceId};
use outliers::cloud::http::Explain;

use super::{first_offer, kind, lease, live, rent, want};
use crate::{FakeCloud, How, KEY, Op, Refusal, limits};

/// An invalid key is reported as invalid.
pub async fn a_wrong_key_is_told(cloud: &FakeCloud) {
    let broker = cloud.connect("sk-wrong-0000", limits(), None);
    let offer = first_offer(&*cloud.broker()).await;
    let checked = broker.check().await;
    assert_eq!(kind(&checked), Some(BrokerErrorKind::Auth), "{checked:?}");
    let listed = broker.list().await;
    assert_eq!(kind(&listed), Some(BrokerErrorKind::Auth), "{listed:?}");
    let made = broker.create(&offer, &lease()).await;
    assert_eq!(kind(&made), Some(BrokerErrorKind::Auth), "{made:?}");
    // Offers may be public.
    let offers = broker.offers(&want()).await;
    assert!(matches!(kind(&offers), None | Some(BrokerErrorKind::Auth)), "{offers:?}");
    assert_eq!(live(cloud), []);
}

/// A read that fails once is retried.
pub async fn readings_are_tried_again(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    for how in [How::Refuse(Refusal::Broken(502)), How::CutBody, How::Refuse(Refusal::RateLimited(None))] {
        [Op::Offers, Op::List, Op::Get].into_iter().for_each(|op| cloud.state().fail(op, how.clone()));
        assert!(!broker.offers(&want()).await.expect("the second try is answered").offers.is_empty());
        assert_eq!(broker.list().await.expect("the second try is answered").len(), 1);
        assert!(broker.get(&made.id).await.expect("the second try is answered").is_some());
    }
}

/// A termination whose answer is lost is retried and succeeds.
pub async fn terminations_are_tried_again(cloud: &FakeCloud) {
    let broker = cloud.broker();
    for how in [How::Refuse(Refusal::Broken(500)), How::CutBody] {
        let (_, made) = rent(&*broker).await;
        cloud.state().fail_after(Op::Terminate, how);
        broker.terminate(&made.id).await.expect("it is gone");
        assert_eq!(live(cloud), []);
    }
}

/// The same without any answer.
pub async fn unanswered_terminations_are_tried_again(cloud: &FakeCloud) {
    let (_, made) = rent(&*cloud.broker()).await;
    cloud.state().fail_after(Op::Terminate, How::Hang);
    cloud.impatient_broker().terminate(&made.id).await.expect("it is gone");
    assert_eq!(live(cloud), []);
}

/// An invalid list is an error, not an empty list.
pub async fn nonsense_is_no_list(cloud: &FakeCloud) {
    let broker = cloud.broker();
    rent(&*broker).await;
    for how in nonsense() {
        cloud.state().fail_always(Op::List, how.clone());
        let listed = broker.list().await;
        cloud.state().faults.clear();
        assert!(kind(&listed).is_some_and(is_trouble), "{how:?}: {listed:?}");
    }
}

/// The same without any answer.
pub async fn silence_is_no_list(cloud: &FakeCloud) {
    cloud.state().fail_always(Op::List, How::Hang);
    let listed = cloud.impatient_broker().list().await;
    assert_eq!(kind(&listed), Some(BrokerErrorKind::Unavailable), "{listed:?}");
}

/// Invalid offers are an error.
pub async fn nonsense_is_no_offer(cloud: &FakeCloud) {
    let broker = cloud.broker();
    for how in nonsense() {
        cloud.state().fail_always(Op::Offers, how.clone());
        let offers = broker.offers(&want()).await;
        cloud.state().faults.clear();
        assert!(kind(&offers).is_some_and(is_trouble), "{how:?}: {offers:?}");
    }
}

/// An instance whose answer is unreadable is not reported as gone.
pub async fn nonsense_is_not_gone(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    for how in nonsense() {
        cloud.state().fail_always(Op::Get, how.clone());
        let read = broker.get(&made.id).await;
        cloud.state().faults.clear();
        assert!(kind(&read).is_some_and(is_trouble), "{how:?}: {read:?}");
    }
}

/// The account's key is in no error, debug output or explanation, even if the cloud repeats it.
pub async fn keys_are_shown_nowhere(cloud: &FakeCloud) {
    let heard = Arc::new(Mutex::new(String::new()));
    let listener = heard.clone();
    let explain: Explain = Arc::new(move |words: &str| {
        listener.lock().expect("nothing panics while it is held").push_str(words);
    });
    let broker = cloud.connect(KEY, limits(), Some(explain));
    let (offer, made) = (first_offer(&*broker).await, rent(&*broker).await.1);
    for op in [Op::Check, Op::Offers, Op::Create, Op::List, Op::Get, Op::Terminate, Op::Keys] {
        cloud.state().fail_always(op, How::EchoKey);
    }
    let said = [
        in_words(broker.check().await),
        in_words(broker.offers(&want()).await),
        in_words(broker.create(&offer, &lease()).await),
        in_words(broker.list().await),
        in_words(broker.get(&made.id).await),
        in_words(broker.terminate(&made.id).await),
    ];
    let heard = heard.lock().expect("nothing panicked").clone();
    assert!(heard.contains("Bearer ***"), "the explanation says that there is a key");
    assert!(said.iter().all(|said| said.contains("cannot parse")), "the cloud's words are handed on: {said:?}");
    for said in said.iter().chain([&heard]) {
        assert!(!said.contains(KEY), "{said}");
    }
}

/// An id that would change the path is refused.
pub async fn ids_stay_ids(cloud: &FakeCloud) {
    let broker = cloud.broker();
    let (_, made) = rent(&*broker).await;
    for id in [format!("x/../{}", made.id), format!("{}?x=1", made.id), String::new(), "..".to_owned()] {
        let id = InstanceId(id);
        let read: Result<Option<Instance>, BrokerError> = broker.get(&id).await;
        assert!(!matches!(read, Ok(Some(_))), "{id}: {read:?}");
        // Refused or not found: both are correct.
        let _ = broker.terminate(&id).await;
    }
    assert_eq!(live(cloud), [made.id]);
}

fn nonsense() -> [How; 7] {
    let teapot = crate::ApiResponse::text(418, "I'm a teapot");
    let broken = How::Refuse(Refusal::Broken(500));
    [How::NotJson, How::OtherJson, How::Html, How::Empty, How::CutBody, broken, How::Say(teapot)]
}

/// Whether the kind means unknown or unavailable.
fn is_trouble(kind: BrokerErrorKind) -> bool {
    matches!(kind, BrokerErrorKind::Unavailable | BrokerErrorKind::Rejected)
}

fn in_words<T>(result: Result<T, BrokerError>) -> String {
    match result {
        Ok(_) => panic!("the cloud refused"),
        Err(error) => format!("{error} {error:?}"),
    }
}
