//! A link between a client and a server on this machine, with a given latency, bandwidth or break.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use outliers::cloud::broker::SshEndpoint;

/// Bytes per piece.
const PIECE: usize = 64 << 10;
/// Pieces in flight on a fast link: enough for 1 GB/s over a quarter of a second.
const WIDE: usize = 4096;
/// Pieces in flight on a slow link: the queue of a common router.
const NARROW: usize = 32;

/// A TCP relay on a loopback port. It has neither slow start nor losses. Ends, with its
/// connections, when dropped.
pub struct FlakyLink {
    endpoint: SshEndpoint,
    shared: Arc<Shared>,
}

struct Shared {
    target: (String, u16),
    /// Bytes sent to the client before the server's.
    preface: Vec<u8>,
    /// Each way.
    delay: Duration,
    /// Bytes per second, each way.
    rate: Option<f64>,
    /// Bytes until the link breaks.
    until_cut: AtomicI64,
    /// Bytes that went up so far.
    carried: AtomicU64,
    over: AtomicBool,
    sockets: Mutex<Vec<TcpStream>>,
}

impl FlakyLink {
    /// A link to `server` with this round-trip time, without a bandwidth limit.
    pub fn long(server: &SshEndpoint, round_trip: Duration) -> Result<Self> {
        Self::new(server, Vec::new(), round_trip, None)
    }

    /// A link to `server` through a gateway that sends `preface` first.
    pub fn with_preface(server: &SshEndpoint, preface: &[u8]) -> Result<Self> {
        Self::new(server, preface.to_vec(), Duration::ZERO, None)
    }

    /// A link to `server` with this many bytes per second each way.
    pub fn narrow(server: &SshEndpoint, bytes_per_second: u64) -> Result<Self> {
        Self::new(server, Vec::new(), Duration::ZERO, Some(bytes_per_second as f64))
    }

    fn new(server: &SshEndpoint, preface: Vec<u8>, round_trip: Duration, rate: Option<f64>) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            target: (server.host.clone(), server.port),
            preface,
            delay: round_trip / 2,
            rate,
            until_cut: AtomicI64::new(i64::MAX),
            carried: AtomicU64::new(0),
            over: AtomicBool::new(false),
            sockets: Mutex::default(),
        });
        let theirs = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if theirs.over.load(Ordering::Relaxed) {
                    return;
                }
                // If the server is down, the client's connection ends at once.
                let _ = relay(&theirs, client);
            }
        });
        let endpoint = SshEndpoint { host: "127.0.0.1".to_owned(), port, user: server.user.clone() };
        Ok(Self { endpoint, shared })
    }

    /// Address of the link.
    pub fn endpoint(&self) -> SshEndpoint {
        self.endpoint.clone()
    }

    /// Breaks all connections after this many more bytes; later connections are not affected.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.until_cut.store(bytes as i64, Ordering::Relaxed);
    }

    /// Bytes that the client has sent.
    pub fn carried_up(&self) -> u64 {
        self.shared.carried.load(Ordering::Relaxed)
    }
}

impl Drop for FlakyLink {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.shared.cut();
        // Wakes the listener, so that it ends.
        let _ = TcpStream::connect(("127.0.0.1", self.endpoint.port));
    }
}

impl Shared {
    fn cut(&self) {
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may have ended.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn count_up(&self, bytes: usize) {
        self.carried.fetch_add(bytes as u64, Ordering::Relaxed);
        let bytes = bytes as i64;
        let left = self.until_cut.fetch_sub(bytes, Ordering::Relaxed);
        if left == i64::MAX {
            self.until_cut.store(i64::MAX, Ordering::Relaxed);
        } else if left <= bytes {
            self.until_cut.store(i64::MAX, Ordering::Relaxed);
            self.cut();
        }
    }
}

fn relay(shared: &Arc<Shared>, mut client: TcpStream) -> std::io::Result<()> {
    let server = TcpStream::connect((shared.target.0.as_str(), shared.target.1))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    client.write_all(&shared.preface)?;
    shared.sockets.lock().unwrap_or_else(PoisonError::into_inner).extend([client.try_clone()?, server.try_clone()?]);
    carry(shared, client.try_clone()?, server.try_clone()?, true);
    carry(shared, server, client, false);
    Ok(())
}

/// One direction: one thread reads, another writes after the delay.
fn carry(shared: &Arc<Shared>, from: TcpStream, to: TcpStream, up: bool) {
    let (send, receive) = sync_channel(if shared.rate.is_some() { NARROW } else { WIDE });
    let ours = shared.clone();
    std::thread::spawn(move || take(&ours, from, &send, up));
    std::thread::spawn(move || give(&receive, to));
}

fn take(shared: &Shared, mut from: TcpStream, line: &SyncSender<(Instant, Vec<u8>)>, up: bool) {
    let mut free = Instant::now();
    let mut piece = vec![0; PIECE];
    while let Ok(n @ 1..) = from.read(&mut piece) {
        let now = Instant::now();
        let busy = shared.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(n as f64 / rate));
        free = free.max(now) + busy;
        if line.send((free + shared.delay, piece[..n].to_vec())).is_err() {
            return;
        }
        if up {
            shared.count_up(n);
        }
    }
}

fn give(line: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream) {
    while let Ok((due, piece)) = line.recv() {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            return;
        }
    }
    // Closes the write half; the other side may still send.
    let _ = to.shutdown(Shutdown::Write);
}
