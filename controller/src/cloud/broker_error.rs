//! Why a call to a cloud failed, and what its caller may do.

/// Why a broker call did not give what was asked for.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{broker}: {message}")]
pub struct BrokerError {
    /// Which cloud.
    pub broker: &'static str,
    /// What a caller may do about it.
    pub kind: BrokerErrorKind,
    /// The cloud's own words where there are any. Never a key.
    pub message: String,
}

impl BrokerError {
    /// What a person may do about it, where something can be done.
    pub fn hint(&self) -> Option<String> {
        matches!(self.kind, BrokerErrorKind::Auth).then(|| format!("check the key for {}", self.broker))
    }
}

/// What a caller may do about a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerErrorKind {
    /// This offer cannot be had now: try the next.
    NoCapacity,
    /// Asked too often.
    RateLimited,
    /// The key is missing, wrong, or not allowed to.
    Auth,
    /// No funds, or a limit of the account.
    Budget,
    /// No such thing.
    NotFound,
    /// The request itself is wrong.
    Rejected,
    /// The cloud did not take the request.
    Unavailable,
    /// It may have happened: list by tag before anything else.
    Maybe,
}
