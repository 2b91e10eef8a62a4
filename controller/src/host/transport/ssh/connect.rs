//! Opens an authenticated connection to an endpoint. Failures have distinct kinds.

use std::borrow::Cow;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use russh::client::{self, AuthResult, ChannelOpenHandle, Handle, Session};
use russh::keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{ChannelId, Limits, Preferred, cipher};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::exec::Channel;
use super::{HostKeyPin, Tuning};
use crate::host::transport::{SshEndpoint, TransportError, TransportErrorKind as Kind};
use crate::text::clean;

/// Time limit of one TCP connect. Packets to a booting machine are often dropped.
const TCP_LIMIT: Duration = Duration::from_secs(15);
/// Time limit from the open TCP connection to the server's greeting.
const BANNER_LIMIT: Duration = Duration::from_secs(20);
/// Prefix of a greeting. A server may send lines of text before it (RFC 4253, section 4.2). The
/// limits on them are OpenSSH's.
const GREETING: &[u8] = b"SSH-";
const MAX_LINES: usize = 1023;
const LONGEST_LINE: usize = 8192;
/// Characters of such lines that are kept for messages.
const SHOWN: usize = 200;
/// Pause between two looks at an incomplete greeting.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Time limit of the key exchange, and of the login.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(30);

/// Maximum time between new keys, from RFC 4253 (section 9).
const REKEY_TIME: Duration = Duration::from_secs(3600);

/// Channels that a server may try to open before its connection is closed.
const MAX_OPENED: u32 = 10;

/// Number of channels that a host has tried to open to this machine. None is requested and none
/// accepted.
#[derive(Clone, Default)]
pub(super) struct ChannelCount(Arc<AtomicU32>);

impl ChannelCount {
    /// Counts one attempt. Too many are an error, which ends the connection.
    fn note(&self) -> Result<(), russh::Error> {
        match self.0.fetch_add(1, Ordering::Relaxed) < MAX_OPENED {
            true => Ok(()),
            false => Err(russh::Error::Disconnect),
        }
    }

    /// The error for a host that opened too many channels.
    pub(super) fn too_many_channels(&self, endpoint: &SshEndpoint) -> Option<TransportError> {
        let message = format!(
            "{endpoint}: the host misbehaves: it tried to open more than {MAX_OPENED} channels to this machine, \
             and was asked for none"
        );
        let too_many = self.0.load(Ordering::Relaxed) > MAX_OPENED;
        too_many.then(|| TransportError::new(Kind::Remote, message))
    }
}

/// Callbacks of russh.
pub(super) struct Client {
    pin: Option<HostKeyPin>,
    seen: Arc<Mutex<Option<PublicKey>>>,
    opened: ChannelCount,
}

/// Methods that take note of a channel that a server opens, and drop the reply, which refuses it.
/// Each is named with the types between the channel and the reply.
macro_rules! refused {
    ($($method:ident($($detail:ty),*);)*) => {
        $(
            async fn $method(
                &mut self,
                _: Channel,
                $(_: $detail,)*
                _: ChannelOpenHandle,
                _: &mut Session,
            ) -> Result<(), russh::Error> {
                self.opened.note()
            }
        )*
    };
}

/// Every channel that a server opens is refused.
impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let key = key.public_key();
        let trusted = self.pin.as_ref().is_none_or(|pin| pin.matches(&key));
        *self.seen.lock().expect("no code panics while holding this lock") = Some(key);
        Ok(trusted)
    }

    refused! {
        server_channel_open_session();
        server_channel_open_direct_tcpip(&str, u32, &str, u32);
        server_channel_open_direct_streamlocal(&str);
        server_channel_open_forwarded_tcpip(&str, u32, &str, u32);
        server_channel_open_forwarded_streamlocal(&str);
        server_channel_open_agent_forward();
        server_channel_open_x11(&str, u32);
        server_channel_open_unknown();
    }

    /// Counts channels of unknown kinds, too. The default implementation refuses them.
    async fn should_accept_unknown_server_channel(&mut self, _id: ChannelId, _kind: &str) -> bool {
        true
    }
}

/// Opens TCP, waits for the greeting, exchanges keys, checks the host key, logs in.
pub(super) async fn open(
    endpoint: &SshEndpoint,
    key: &Arc<PrivateKey>,
    pin: Option<&HostKeyPin>,
    tuning: &Tuning,
    opened: &ChannelCount,
) -> Result<(Handle<Client>, HostKeyPin), TransportError> {
    let mut stream = dial(endpoint).await?;
    wait_for_greeting(endpoint, &mut stream).await?;
    let (mut handle, seen) = handshake(endpoint, stream, pin, tuning, opened).await?;
    let login = timeout(HANDSHAKE_LIMIT, log_in(endpoint, &mut handle, key)).await;
    let login = login.unwrap_or_else(|_| Err(too_long(endpoint, "login", HANDSHAKE_LIMIT)));
    login.map_err(|error| opened.too_many_channels(endpoint).unwrap_or(error))?;
    Ok((handle, seen))
}

async fn dial(endpoint: &SshEndpoint) -> Result<TcpStream, TransportError> {
    let connect = async {
        // Resolved separately, so that an unknown name differs from a refused connection.
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
        // Unknown name, no route, filtered and kernel timeout cannot be distinguished here.
        _ => Kind::Unreachable,
    }
}

/// Waits for the server's greeting, which stays in the stream, and removes the lines before it,
/// since the SSH library accepts few of them. A server that is not ready closes the connection
/// here, some after a line of text.
async fn wait_for_greeting(endpoint: &SshEndpoint, stream: &mut TcpStream) -> Result<(), TransportError> {
    let mut said = Vec::new();
    let began = timeout(BANNER_LIMIT, take_preface(stream, &mut said)).await;
    let words = match said.is_empty() {
        true => String::new(),
        false => format!("; it said {:?}", clean(&said, 80)),
    };
    let what = match began {
        Ok(Ok(FirstBytes::Greeting)) => return Ok(()),
        Ok(Ok(FirstBytes::Closed)) => "the connection was closed before the server's greeting",
        Ok(Ok(FirstBytes::Flood)) => "more text than a server may send comes before its greeting",
        Ok(Err(e)) => return Err(broken(endpoint, &russh::Error::IO(e))),
        Err(_) => {
            let error = too_long(endpoint, "the server's greeting", BANNER_LIMIT);
            return Err(TransportError { message: error.message + &words, ..error });
        }
    };
    Err(TransportError::new(Kind::Reset, format!("{endpoint}: {what}{words}")))
}

/// First bytes from a server.
enum FirstBytes {
    Greeting,
    Closed,
    Flood,
}

/// Reads the text before the greeting and keeps its start in `said`.
async fn take_preface(stream: &mut TcpStream, said: &mut Vec<u8>) -> io::Result<FirstBytes> {
    let mut seen = [0; 4096];
    // Length of the current line.
    let (mut lines, mut length) = (0, 0);
    loop {
        let n = stream.peek(&mut seen).await?;
        let there = &seen[..n];
        if n == 0 {
            return Ok(FirstBytes::Closed);
        }
        if length == 0 && there.starts_with(GREETING) {
            return Ok(FirstBytes::Greeting);
        }
        if length == 0 && GREETING.starts_with(there) {
            // The peeked bytes stay readable, so that the next look would return at once.
            tokio::time::sleep(POLL_INTERVAL).await;
            continue;
        }
        let end = there.iter().position(|b| *b == b'\n');
        let taken = end.map_or(n, |end| end + 1);
        said.extend_from_slice(&there[..taken.min(SHOWN.saturating_sub(said.len()))]);
        stream.read_exact(&mut seen[..taken]).await?;
        length += taken;
        if lines == MAX_LINES || length > LONGEST_LINE + "\r\n".len() {
            return Ok(FirstBytes::Flood);
        }
        if end.is_some() {
            (lines, length) = (lines + 1, 0);
        }
    }
}

async fn handshake(
    endpoint: &SshEndpoint,
    stream: TcpStream,
    pin: Option<&HostKeyPin>,
    tuning: &Tuning,
    opened: &ChannelCount,
) -> Result<(Handle<Client>, HostKeyPin), TransportError> {
    let seen = Arc::new(Mutex::new(None));
    let client = Client { pin: pin.cloned(), seen: seen.clone(), opened: opened.clone() };
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
        // An RSA key has several signature names.
        let rsa = pinned.clone().is_rsa();
        keys.sort_by_key(|a| *a != pinned && !(rsa && a.clone().is_rsa()));
    }
    let ciphers = [cipher::AES_256_GCM, cipher::CHACHA20_POLY1305, cipher::AES_256_CTR];
    client::Config {
        nodelay: true,
        // The window bounds downloads: 16 MiB carry 100 MB/s over 150 ms.
        window_size: 16 << 20,
        channel_buffer_size: 4096,
        // Any received packet counts as an answer: acknowledgements keep a slow upload alive.
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
            let message = format!("{endpoint}: the server requires more than the run's key");
            Err(TransportError::new(Kind::AuthFailed, message))
        }
        Ok(AuthResult::Failure { .. }) => {
            let message = format!("{endpoint}: the server does not accept our key for this user");
            Err(TransportError::new(Kind::AuthFailed, message))
        }
        Err(e) => Err(broken(endpoint, &e)),
    }
}

/// Converts a failure of the connection or the protocol.
pub(super) fn broken(place: &dyn std::fmt::Display, error: &russh::Error) -> TransportError {
    use russh::Error as E;
    let kind = match error {
        E::IO(e) if e.kind() == io::ErrorKind::TimedOut => Kind::TimedOut,
        E::IO(_) | E::Disconnect | E::HUP | E::SendError | E::RecvError => Kind::Reset,
        E::KeepaliveTimeout | E::InactivityTimeout | E::ConnectionTimeout | E::Elapsed(_) => Kind::TimedOut,
        E::UnknownKey => Kind::HostKeyChanged,
        E::ChannelOpenFailure(_) => Kind::NoChannel,
        E::Keys(_) | E::CouldNotReadKey | E::InvalidConfig(_) => Kind::Local,
        _ => Kind::Remote,
    };
    let what = match error {
        E::Disconnect | E::HUP | E::SendError | E::RecvError => "the connection broke off".to_owned(),
        E::ChannelOpenFailure(reason) => format!("the server opens no channel for it ({reason:?})"),
        other => other.to_string(),
    };
    TransportError::new(kind, format!("{place}: {what}"))
}

fn too_long(endpoint: &SshEndpoint, what: &str, limit: Duration) -> TransportError {
    TransportError::new(Kind::TimedOut, format!("{endpoint}: {what} took longer than {} s", limit.as_secs()))
}
