//! From an endpoint to an authenticated connection, with the reason told apart where it fails.

use std::borrow::Cow;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use russh::client::{self, AuthResult, Handle};
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{Limits, Preferred, cipher};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout, timeout_at};

use super::{HostKeyPin, Tuning};
use crate::broker::SshEndpoint;
use crate::text::clean;
use crate::transport::{TransportError, TransportErrorKind as Kind};

/// One TCP connect; packets to a machine that is still booting are often just dropped.
const TCP_LIMIT: Duration = Duration::from_secs(15);
/// From the open TCP connection to the server's greeting.
const BANNER_LIMIT: Duration = Duration::from_secs(20);
/// From the first bytes to the greeting: a server may send lines of text before it.
const PREFACE_LIMIT: Duration = Duration::from_secs(2);
/// Key exchange, and again login.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);

/// New keys at the latest after so long, as RFC 4253 (section 9) wants it.
const REKEY_TIME: Duration = Duration::from_secs(3600);

/// What russh calls back.
pub(super) struct Client {
    pin: Option<HostKeyPin>,
    seen: Arc<Mutex<Option<PublicKey>>>,
}

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let key = key.public_key();
        let trusted = self.pin.as_ref().is_none_or(|pin| pin.matches(&key));
        *self.seen.lock().expect("no code panics while holding this lock") = Some(key);
        Ok(trusted)
    }
}

/// TCP, greeting, key exchange, host key, login.
pub(super) async fn open(
    endpoint: &SshEndpoint,
    key: &Arc<PrivateKey>,
    pin: Option<&HostKeyPin>,
    tuning: &Tuning,
) -> Result<(Handle<Client>, HostKeyPin), TransportError> {
    let stream = dial(endpoint).await?;
    wait_for_greeting(endpoint, &stream).await?;
    let (mut handle, seen) = handshake(endpoint, stream, pin, tuning).await?;
    let login = log_in(endpoint, &mut handle, key);
    timeout(HANDSHAKE_LIMIT, login).await.map_err(|_| too_long(endpoint, "login", HANDSHAKE_LIMIT))??;
    Ok((handle, seen))
}

async fn dial(endpoint: &SshEndpoint) -> Result<TcpStream, TransportError> {
    let connect = async {
        // Resolved apart from connecting: an unknown name must not look like a refused connection.
        let addresses: Vec<_> = lookup_host((endpoint.host.as_str(), endpoint.port)).await?.collect();
        TcpStream::connect(&addresses[..]).await
    };
    let stream = match timeout(TCP_LIMIT, connect).await {
        Err(_) => {
            let message = format!("{endpoint}: no answer within {} s", TCP_LIMIT.as_secs());
            return Err(TransportError::new(Kind::Unreachable, message));
        }
        Ok(Err(e)) => return Err(TransportError::new(dial_kind(&e), format!("{endpoint}: {e}"))),
        Ok(Ok(stream)) => stream,
    };
    stream.set_nodelay(true).map_err(|e| broken(endpoint, &russh::Error::IO(e)))?;
    Ok(stream)
}

fn dial_kind(error: &io::Error) -> Kind {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Kind::Refused,
        io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => Kind::Reset,
        // Unknown name, no route, filtered, timed out in the kernel: from here they are one thing.
        _ => Kind::Unreachable,
    }
}

/// Waits for the server's first bytes without taking them. A server that is not ready closes here, some with a line of text.
async fn wait_for_greeting(endpoint: &SshEndpoint, stream: &TcpStream) -> Result<(), TransportError> {
    let since = Instant::now();
    let mut first = [0; 256];
    loop {
        let seen = match timeout_at(since + BANNER_LIMIT, stream.peek(&mut first)).await {
            Err(_) => return Err(too_long(endpoint, "the server's greeting", BANNER_LIMIT)),
            Ok(Err(e)) => return Err(broken(endpoint, &russh::Error::IO(e))),
            Ok(Ok(0)) => {
                let message = format!("{endpoint}: the connection was closed before the server's greeting");
                return Err(TransportError::new(Kind::Reset, message));
            }
            Ok(Ok(n)) => &first[..n],
        };
        if seen.starts_with(b"SSH-") || seen.windows(5).any(|w| w == b"\nSSH-") {
            return Ok(());
        }
        if seen.len() >= 4 && since.elapsed() > PREFACE_LIMIT {
            let message = format!("{endpoint}: not an SSH greeting: {:?}", clean(seen, 80));
            return Err(TransportError::new(Kind::Reset, message));
        }
        // What was seen stays readable, so that the next look would return at once.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn handshake(
    endpoint: &SshEndpoint,
    stream: TcpStream,
    pin: Option<&HostKeyPin>,
    tuning: &Tuning,
) -> Result<(Handle<Client>, HostKeyPin), TransportError> {
    let seen = Arc::new(Mutex::new(None));
    let client = Client { pin: pin.cloned(), seen: seen.clone() };
    let shake = client::connect_stream(Arc::new(config(pin, tuning)), stream, client);
    let result =
        timeout(HANDSHAKE_LIMIT, shake).await.map_err(|_| too_long(endpoint, "key exchange", HANDSHAKE_LIMIT))?;
    let seen = seen.lock().expect("no code panics while holding this lock").take();
    match (result, seen) {
        (Ok(handle), Some(key)) => Ok((handle, HostKeyPin::of(&key)?)),
        (Ok(_), None) => Err(broken(endpoint, &russh::Error::Inconsistent)),
        (Err(russh::Error::UnknownKey), Some(key)) => Err(changed(endpoint, pin, &key)),
        (Err(e), _) => Err(broken(endpoint, &e)),
    }
}

fn changed(endpoint: &SshEndpoint, pin: Option<&HostKeyPin>, key: &PublicKey) -> TransportError {
    let was = pin.map(HostKeyPin::fingerprint).unwrap_or_default();
    let is = key.fingerprint(russh::keys::HashAlg::Sha256);
    let message = format!("{endpoint}: the host key changed from {was} to {is}; this is not the machine we rented");
    TransportError::new(Kind::HostKeyChanged, message)
}

fn config(pin: Option<&HostKeyPin>, tuning: &Tuning) -> client::Config {
    let mut keys = Preferred::DEFAULT.key.to_vec();
    if let Some(pinned) = pin.and_then(HostKeyPin::algorithm) {
        // RSA is one key under several signature names.
        let rsa = pinned.clone().is_rsa();
        keys.sort_by_key(|a| *a != pinned && !(rsa && a.clone().is_rsa()));
    }
    let ciphers = [cipher::AES_256_GCM, cipher::CHACHA20_POLY1305, cipher::AES_256_CTR];
    client::Config {
        nodelay: true,
        // Ours bounds downloads: 16 MiB carry 100 MB/s over 150 ms.
        window_size: 16 << 20,
        channel_buffer_size: 4096,
        // Anything that comes counts as an answer: a slow upload is kept alive by its acknowledgements.
        keepalive_interval: Some(tuning.keepalive),
        keepalive_max: 3,
        limits: Limits::new(tuning.rekey_after, tuning.rekey_after, REKEY_TIME),
        preferred: Preferred { key: Cow::Owned(keys), cipher: Cow::Owned(ciphers.to_vec()), ..Preferred::DEFAULT },
        ..client::Config::default()
    }
}

async fn log_in(
    endpoint: &SshEndpoint,
    handle: &mut Handle<Client>,
    key: &Arc<PrivateKey>,
) -> Result<(), TransportError> {
    let hash = match key.algorithm().is_rsa() {
        true => handle.best_supported_rsa_hash().await.map_err(|e| broken(endpoint, &e))?.flatten(),
        false => None,
    };
    let key = PrivateKeyWithHashAlg::new(key.clone(), hash);
    match handle.authenticate_publickey(&endpoint.user, key).await {
        Ok(AuthResult::Success) => Ok(()),
        Ok(AuthResult::Failure { partial_success: true, .. }) => {
            let message = format!("{endpoint}: the server wants more than our key");
            Err(TransportError::new(Kind::AuthFailed, message))
        }
        Ok(AuthResult::Failure { .. }) => {
            let message = format!("{endpoint}: the server does not accept our key for this user");
            Err(TransportError::new(Kind::AuthFailed, message))
        }
        Err(e) => Err(broken(endpoint, &e)),
    }
}

/// A failure of the connection or the protocol, in our kinds.
pub(super) fn broken(place: &dyn std::fmt::Display, error: &russh::Error) -> TransportError {
    use russh::Error as E;
    let kind = match error {
        E::IO(e) if e.kind() == io::ErrorKind::TimedOut => Kind::TimedOut,
        E::IO(_) | E::Disconnect | E::HUP | E::SendError | E::RecvError => Kind::Reset,
        E::KeepaliveTimeout | E::InactivityTimeout | E::ConnectionTimeout | E::Elapsed(_) => Kind::TimedOut,
        E::UnknownKey => Kind::HostKeyChanged,
        E::Keys(_) | E::CouldNotReadKey | E::InvalidConfig(_) => Kind::Local,
        _ => Kind::Remote,
    };
    let what = match error {
        E::Disconnect | E::HUP | E::SendError | E::RecvError => "the connection broke off".to_owned(),
        other => other.to_string(),
    };
    TransportError::new(kind, format!("{place}: {what}"))
}

fn too_long(endpoint: &SshEndpoint, what: &str, limit: Duration) -> TransportError {
    TransportError::new(Kind::TimedOut, format!("{endpoint}: {what} took longer than {} s", limit.as_secs()))
}
