//! The evidence that the schedules are evidence: each bug of [`Mutant`] is planted, and must be caught.

use outliers_tests::tell;

use super::schedules::play;
use crate::mutant::Mutant;

/// Schedules within which a bug must be caught.
const WITHIN: u64 = 2000;

const ALL: [Mutant; 19] = [
    Mutant::GivesUpOnTerminate,
    Mutant::FailedListIsEmpty,
    Mutant::AbsentOnceIsGone,
    Mutant::CreatesAgainBlindly,
    Mutant::UnknownIsRefused,
    Mutant::TerminatesBeforeSync,
    Mutant::BusyEndsTheRun,
    Mutant::FailoverForgets,
    Mutant::NoGuard,
    Mutant::StopsInsteadOfEnding,
    Mutant::NameWithoutNonce,
    Mutant::NoDeadline,
    Mutant::EndingOverwritten,
    Mutant::LostStatusIsSuccess,
    Mutant::FirstPageOnly,
    Mutant::JudgesAtOnce,
    Mutant::EndsForeignInstances,
    Mutant::BudgetIgnored,
    Mutant::ConsentIgnored,
];

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = Vec::new();
    tell(&format!("{:<22} {:>9}  caught by", "planted", "schedules"));
    for mutant in ALL {
        let caught = (0..WITHIN).find_map(|seed| play(seed, Some(mutant)).err().map(|why| (seed, why)));
        match caught {
            Some((seed, why)) => {
                play(seed, None).unwrap_or_else(|why| panic!("seed {seed} fails without {mutant:?} too: {why}"));
                let why: String = why.lines().next().unwrap_or_default().chars().take(100).collect();
                tell(&format!("{:<22} {:>9}  {why}", format!("{mutant:?}"), seed + 1));
            }
            None => missed.push(mutant),
        }
    }
    assert!(missed.is_empty(), "not caught within {WITHIN} schedules: {missed:?}");
}
