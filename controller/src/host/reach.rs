//! Connects to a new instance and waits until it accepts the login.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use super::retry::next_attempt;
use super::{HostError, HostErrorKind, HostEvent, OnEvent, RemoteHost};
use crate::host::transport::ssh::{HostKeyPin, SshTransport};
use crate::host::transport::{SshEndpoint, TransportError, TransportErrorKind};

/// Connects and logs in. Retries transient failures until `deadline`.
///
/// A cloud may list an instance as ready before its SSH server is. Without a pin the host key is
/// accepted and returned, to be stored with the instance. A refused key is retried for half a
/// minute, since clouds install keys late; a changed host key is not retried. The final error has
/// the most frequent kind of failure and counts all of them.
pub async fn reach(
    endpoint: &SshEndpoint,
    private_key: &Path,
    pin: Option<HostKeyPin>,
    deadline: Instant,
    on: OnEvent<'_>,
) -> Result<(RemoteHost, HostKeyPin), HostError> {
    let started = Instant::now();
    let mut met = ConnectFailures::default();
    let mut refused_key_since = None;
    for attempt in 1.. {
        let connect = SshTransport::connect(endpoint, private_key, pin.as_ref());
        let error = match timeout_at(deadline, connect).await {
            Ok(Ok((transport, pin))) => {
                on(HostEvent::Connected);
                return Ok((RemoteHost::new(Arc::new(transport), endpoint.to_string()), pin));
            }
            Ok(Err(error)) => error,
            Err(_) => break,
        };
        met.add(&error);
        let (what, kind) = (error.message.clone(), error.kind);
        let Some(pause) = next_attempt(&error.into(), attempt, Instant::now(), &mut refused_key_since) else { break };
        on(HostEvent::Waiting { what, kind, attempt });
        sleep_until(deadline.min(Instant::now() + pause)).await;
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(met.verdict(endpoint, started.elapsed()))
}

/// Failures so far.
#[derive(Default)]
struct ConnectFailures {
    counts: Vec<(TransportErrorKind, u32)>,
    last: Option<TransportError>,
}

impl ConnectFailures {
    fn add(&mut self, error: &TransportError) {
        match self.counts.iter_mut().find(|(kind, _)| *kind == error.kind) {
            Some((_, count)) => *count += 1,
            None => self.counts.push((error.kind, 1)),
        }
        self.last = Some(error.clone());
    }

    fn verdict(self, endpoint: &SshEndpoint, lasted: Duration) -> HostError {
        let Some(last) = self.last else {
            let message = format!("{endpoint}: no answer within the {} s there were", lasted.as_secs());
            return HostError::new(HostErrorKind::Connection(TransportErrorKind::TimedOut), message);
        };
        // A permanent failure ended the retries and decides, whatever came before.
        let worst = Some(last.kind).filter(|kind| !kind.is_transient());
        let most = self.counts.iter().max_by_key(|(_, count)| *count).map(|(kind, _)| *kind);
        let kind = worst.or(most).unwrap_or(last.kind);
        let counts: Vec<String> = self.counts.iter().map(|(kind, n)| format!("{} {n} x", word(*kind))).collect();
        let message = format!(
            "{endpoint}: not reached after {} s ({}); last: {}",
            lasted.as_secs(),
            counts.join(", "),
            last.message
        );
        HostError { message, ..TransportError::new(kind, "").into() }
    }
}

fn word(kind: TransportErrorKind) -> &'static str {
    use TransportErrorKind as T;
    match kind {
        T::Refused => "connection refused",
        T::Unreachable => "unreachable",
        T::AuthFailed => "login refused",
        T::HostKeyChanged => "host key changed",
        T::Reset => "reset by peer",
        T::Gone => "gone",
        T::TimedOut => "timed out",
        T::NoChannel => "no channel",
        T::NoSpace => "no space",
        T::Remote => "protocol error",
        T::Local => "error on this side",
    }
}
