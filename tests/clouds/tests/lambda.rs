//! Properties of Lambda only.

use outliers::cloud::broker::{BrokerErrorKind, GpuRequest, Instance, Lease, Offer};
use outliers_clouds::conformance::lease;
use outliers_clouds::dialect::lambda::Lambda;
use outliers_clouds::{ApiResponse, FakeCloud, How, Op, SshKey};
use serde_json::{Value, json};

async fn offer(cloud: &FakeCloud) -> Offer {
    let offers = cloud.broker().offers(&GpuRequest::default()).await.expect("there are offers").offers;
    offers.into_iter().find(|offer| offer.gpu_count == 1).expect("there is a small one")
}

async fn rent(cloud: &FakeCloud) -> (Lease, Instance) {
    let (offer, lease) = (offer(cloud).await, lease());
    let made = cloud.broker().create(&offer, &lease).await.expect("it can be rented");
    (lease, made)
}

fn refusal(code: &str) -> How {
    How::Say(ApiResponse::json(400, &json!({"error": {"code": code, "message": "It says so."}})))
}

#[tokio::test]
async fn termination_of_a_booting_instance_is_unavailable() {
    let cloud = FakeCloud::start(Lambda);
    let (_, made) = rent(&cloud).await;
    let action = json!({"available": false, "reason_code": "vm-has-not-launched"});
    let shown = json!({"data": {"id": made.id, "status": "booting", "actions": {"terminate": action}}});
    cloud.state().fail(Op::Terminate, refusal("global/conflict"));
    cloud.state().fail(Op::Get, How::Say(ApiResponse::json(200, &shown)));
    let ended = cloud.broker().terminate(&made.id).await.expect_err("not yet");
    assert_eq!(ended.kind, BrokerErrorKind::Unavailable);
    assert!(ended.message.contains("vm-has-not-launched") && ended.message.contains("It says so"), "{ended}");
    cloud.broker().terminate(&made.id).await.expect("now it can");
    assert_eq!(cloud.state().live().count(), 0);
}

#[tokio::test]
async fn surviving_instance_is_not_reported_as_terminated() {
    let cloud = FakeCloud::start(Lambda);
    let (_, made) = rent(&cloud).await;
    for (how, kind) in [
        (refusal("global/unknown"), BrokerErrorKind::Unavailable),
        (refusal("global/forbidden"), BrokerErrorKind::Auth),
        (
            How::Say(ApiResponse::json(200, &json!({"data": {"terminated_instances": []}}))),
            BrokerErrorKind::Unavailable,
        ),
    ] {
        cloud.state().fail(Op::Terminate, how);
        let ended = cloud.broker().terminate(&made.id).await.expect_err("it lives");
        assert_eq!(ended.kind, kind, "{ended}");
    }
}

#[tokio::test]
async fn refusals_map_to_error_kinds() {
    let cloud = FakeCloud::start(Lambda);
    let (offer, broker) = (offer(&cloud).await, cloud.broker());
    for (code, kind) in [
        ("instance-operations/launch/insufficient-capacity", BrokerErrorKind::NoCapacity),
        ("global/quota-exceeded", BrokerErrorKind::Budget),
        ("global/account-inactive", BrokerErrorKind::Budget),
        ("global/invalid-parameters", BrokerErrorKind::Rejected),
        ("global/object-does-not-exist", BrokerErrorKind::NotFound),
        ("global/something-new", BrokerErrorKind::Rejected),
        // The cloud's internal errors, under any status, leave the outcome unknown.
        ("global/internal-error", BrokerErrorKind::Maybe),
        ("provider/internal-unavailable", BrokerErrorKind::Maybe),
    ] {
        cloud.state().fail(Op::Create, refusal(code));
        let made = broker.create(&offer, &lease()).await.expect_err(code);
        assert_eq!(made.kind, kind, "{code}: {made}");
        assert!(made.message.contains("It says so"));
    }
    let left = cloud.state().keys.len();
    assert_eq!(left, 2, "what may have been launched keeps its key");
}

#[tokio::test]
async fn registered_key_is_reused() {
    let cloud = FakeCloud::start(Lambda);
    let (offer, lease) = (offer(&cloud).await, lease());
    let public_key = lease.ssh_public_key.replace(" run", " another comment");
    cloud.state().keys.push(SshKey { id: "1".to_owned(), name: "earlier".to_owned(), public_key: public_key.clone() });
    cloud.state().fail(Op::Keys, refusal("global/duplicate"));
    cloud.broker().create(&offer, &lease).await.expect("it can be rented");
    assert_eq!(cloud.state().instances[0].public_key.as_ref(), Some(&public_key));
}

#[tokio::test]
async fn key_with_a_failed_registration_reply_is_found() {
    let cloud = FakeCloud::start(Lambda);
    let (offer, lease) = (offer(&cloud).await, lease());
    cloud.state().fail_after(Op::Keys, How::CutBody);
    let made = cloud.broker().create(&offer, &lease).await.expect("it can be rented");
    assert_eq!(cloud.state().keys.len(), 1);
    cloud.broker().terminate(&made.id).await.expect("it can be ended");
    assert_eq!(cloud.state().keys, []);
}

#[tokio::test]
async fn nothing_is_launched_without_its_key() {
    let cloud = FakeCloud::start(Lambda);
    let offer = offer(&cloud).await;
    cloud.state().fail_always(Op::Keys, refusal("global/invalid-parameters"));
    let made = cloud.broker().create(&offer, &lease()).await;
    assert!(made.is_err(), "{made:?}");
    assert_eq!(cloud.state().count(Op::Create), 0);
}

#[tokio::test]
async fn remaining_keys_do_not_fail_a_termination() {
    let cloud = FakeCloud::start(Lambda);
    let (_, made) = rent(&cloud).await;
    cloud.state().fail_always(Op::Keys, How::Html);
    cloud.broker().terminate(&made.id).await.expect("it is ended");
    assert_eq!(cloud.state().live().count(), 0);
}

#[tokio::test]
async fn two_ids_of_one_launch_are_resolved() {
    let cloud = FakeCloud::start(Lambda);
    let (offer, broker) = (offer(&cloud).await, cloud.broker());
    for ids in [json!([]), json!(["1", "2"]), Value::Null] {
        let answer = ApiResponse::json(200, &json!({"data": {"instance_ids": ids}}));
        cloud.state().fail(Op::Create, How::Say(answer));
        let made = broker.create(&offer, &lease()).await.expect_err("one was asked for");
        assert_eq!(made.kind, BrokerErrorKind::Maybe, "{made}");
    }
}
