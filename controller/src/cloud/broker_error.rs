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
        match (self.kind, self.broker) {
            (BrokerErrorKind::Auth, slurm::NAME) => {
                Some("`ssh HOST true` with the login node as HOST must work without a prompt".to_owned())
            }
            (BrokerErrorKind::Auth, cloud) => Some(format!("check the key for {cloud}")),
            (BrokerErrorKind::Budget, slurm::NAME) => Some(
                "check --account, --qos and the quotas: `sacctmgr show assoc user=$USER` there lists them".to_owned(),
            ),
            (BrokerErrorKind::Budget, cloud) => {
                Some(format!("check the balance and the limits of the {cloud} account"))
            }
            _ => None,
        }
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
