//! Bugs that programs of this kind have had, planted one at a time in tests only.
//!
//! A suite that does not notice one of them is no evidence: `deploy/mutants.rs` plants each and counts how soon it is caught.
//! Outside tests [`planted`] is `false` for the compiler, and nothing of this is left in the program.

/// One bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// Terminate is called once, and the instance taken for gone.
    GivesUpOnTerminate,
    /// A listing that failed is taken for an empty one.
    FailedListIsEmpty,
    /// One listing without an instance, and it is gone.
    AbsentOnceIsGone,
    /// A create call that was not answered is made again at once.
    CreatesAgainBlindly,
    /// A create call that was not answered is taken for refused.
    UnknownIsRefused,
    /// The instance is ended before its files are at home.
    TerminatesBeforeSync,
    /// A cloud that is busy for a moment ends the run.
    BusyEndsTheRun,
    /// An instance that does not serve is left for the next without being seen gone.
    FailoverForgets,
    /// Only the controller would ever end the instance.
    NoGuard,
    /// Terminate stops the instance, which goes on billing its disk.
    StopsInsteadOfEnding,
    /// All instances of a run have the same name.
    NameWithoutNonce,
    /// The tag's deadline is no deadline.
    NoDeadline,
    /// What the files say replaces the reason for which the run was stopped.
    EndingOverwritten,
    /// A worker whose exit status was lost counts as one that ended well.
    LostStatusIsSuccess,
    /// Of the cloud's list only the first page is read.
    FirstPageOnly,
    /// After a start the first listing is believed.
    JudgesAtOnce,
    /// Whatever is overdue or unknown is ended, whosever it is.
    EndsForeignInstances,
    /// What an instance can cost until its time limit is not held against the budget.
    BudgetIgnored,
    /// What was agreed to before anything was rented is not held to.
    ConsentIgnored,
}

#[cfg(test)]
thread_local! {
    /// The bug of the tests that run on this thread.
    static PLANTED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Whether the bug is in.
#[cfg(test)]
pub fn planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// Whether the bug is in: never.
#[cfg(not(test))]
#[inline(always)]
pub const fn planted(_: Mutant) -> bool {
    false
}

/// Plants a bug, or none, for all that this thread does from here on.
#[cfg(test)]
pub(crate) fn plant(mutant: Option<Mutant>) {
    PLANTED.set(mutant);
}
