//! Errors of calls to a cloud.

use crate::cloud::broker::slurm;

/// An error of a broker call.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{broker}: {message}")]
pub struct BrokerError {
    /// Name of the cloud.
    pub broker: &'static str,
    /// What a caller may do about it.
    pub kind: BrokerErrorKind,
    /// The cloud's message, if there is one. Never contains a key.
    pub message: String,
}

impl BrokerError {
    /// A remedy for people, if there is one.
    pub fn hint(&self) -> Option<String> {
        matches!(self.kind, BrokerErrorKind::Auth).then(|| match self.broker {
            slurm::NAME => "`ssh HOST true` with the login node as HOST must work without a prompt".to_owned(),
            cloud => format!("check the key for {cloud}"),
        })
    }
}

/// What a caller may do about a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerErrorKind {
    /// The offer is not available now: try the next.
    NoCapacity,
    /// Too many requests.
    RateLimited,
    /// The key is missing, wrong or lacks permission.
    Auth,
    /// No funds, or a limit of the account.
    Budget,
    /// The object does not exist.
    NotFound,
    /// The request is invalid.
    Rejected,
    /// The cloud did not accept the request.
    Unavailable,
    /// The call may have been executed: list by tag before anything else.
    Maybe,
}
