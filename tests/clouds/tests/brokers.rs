//! Every broker against a fake of its cloud, one test per property.

use outliers::cloud::broker::{Broker, CLOUDS, GpuRequest, local::LocalBroker};
use outliers::units::Bytes;
use outliers_clouds::conformance::{creation, life, listing, offers, responses};
use outliers_clouds::{Dialect, FakeCloud, dialect};

macro_rules! properties {
    ($dialect:expr => $($part:ident { $($property:ident)* })*) => {
        $($(
            #[tokio::test]
            async fn $property() {
                $part::$property(&FakeCloud::start($dialect)).await;
            }
        )*)*
    };
}

macro_rules! clouds {
    ($($cloud:ident = $dialect:expr;)*) => {
        $(mod $cloud {
            use super::*;

            #[tokio::test]
            async fn create_list_and_terminate_work() {
                let cloud = FakeCloud::start($dialect);
                lives_of(&*cloud.broker(), Bytes::from_gib(100)).await;
                assert_eq!(cloud.state().live().count(), 0);
            }

            properties! { $dialect =>
                offers {
                    are_in_our_units are_priced_whole are_what_can_be_had may_be_taken_back_only_if_wanted
                    left_out_are_none_that_the_market_keeps may_be_none of_others_are_refused may_be_many
                }
                creation {
                    carries_the_lease leaves_nothing_behind sweeps_old_keys knows_no_capacity knows_no_funds
                    knows_a_wrong_request waits_when_told_to waits_when_not_told_how_long
                    gives_up_when_always_too_early failing_before_it_is_done failing_after_it_is_done
                    unanswered_before_it_is_done unanswered_after_it_is_done cut_off answered_with_nonsense
                }
                listing {
                    goes_to_the_last_page that_is_cut_short_is_an_error may_be_empty shows_what_is_not_ours
                    says_where_to_log_in survives_unknown_words knows_what_does_not_serve may_be_late forgets_what_ended
                    terminate_says_when_it_cannot reads_each_entry_by_itself counts_what_it_cannot_read
                }
                responses {
                    a_wrong_key_is_told readings_are_tried_again terminations_are_tried_again
                    unanswered_terminations_are_tried_again nonsense_is_no_list silence_is_no_list nonsense_is_no_offer
                    nonsense_is_not_gone keys_are_shown_nowhere ids_stay_ids
                }
            }
        })*

        #[test]
        fn every_built_in_cloud_is_tested() {
            let tested = [$($dialect.cloud().name),*];
            let built_in: Vec<&str> = CLOUDS.iter().map(|cloud| cloud.name).collect();
            assert!(built_in.iter().all(|name| tested.contains(name)), "{built_in:?}");
        }
    };
}

clouds! {
    lambda = dialect::lambda::Lambda;
    prime = dialect::prime::Prime;
    vast = dialect::vast::Vast;
    runpod = dialect::runpod::RunPod::default();
}

/// Properties of every broker, the local one included.
async fn lives_of(broker: &dyn Broker, disk: Bytes) {
    let want = GpuRequest { min_disk: Some(disk), ..GpuRequest::default() };
    let found = broker.offers(&want).await.expect("there are offers").offers;
    let offer = found.first().expect("there is something to rent");
    life::capabilities_are_true(broker);
    life::a_good_key_is_good(broker).await;
    life::a_life(broker, offer, disk).await;
    life::instances_are_apart(broker, offer, disk).await;
}

#[tokio::test]
async fn local_broker_creates_lists_and_terminates() {
    let folder = tempfile::tempdir().expect("a folder");
    let broker = LocalBroker::new(folder.path().to_owned(), env!("CARGO_BIN_EXE_outliers-instance").into())
        .with_nvidia_smi("/bin/false".into());
    lives_of(&broker, Bytes::from_gib(1)).await;
}
