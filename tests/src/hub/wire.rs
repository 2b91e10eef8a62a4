//! The link from the hub to its clients: latency, bandwidth and counted bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures::StreamExt;
use futures::stream;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Fault;

/// Bytes per piece.
const PACKET: usize = 64 << 10;

/// Latency and bandwidth of all connections together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wire {
    /// Time from a request to the start of its answer.
    pub latency: Duration,
    /// Bytes per second of all answers together; `None`: unlimited.
    pub bytes_per_second: Option<u64>,
}

/// A wire in use.
pub(super) struct Line {
    wire: Wire,
    /// When the bytes so far will have been sent.
    free_at: Mutex<Instant>,
    carried: AtomicU64,
}

impl Line {
    pub(super) fn new(wire: Wire) -> Arc<Self> {
        Arc::new(Self { wire, free_at: Mutex::new(Instant::now()), carried: AtomicU64::new(0) })
    }

    pub(super) fn latency(&self) -> Duration {
        self.wire.latency
    }

    /// Bytes of bodies sent.
    pub(super) fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    async fn carry(&self, packet: Bytes, pace: Option<u64>) -> Bytes {
        let seconds = |rate: u64| Duration::from_secs_f64(packet.len() as f64 / rate.max(1) as f64);
        if let Some(rate) = self.wire.bytes_per_second {
            let arrived = {
                let mut free_at = self.free_at.lock().await;
                *free_at = (*free_at).max(Instant::now()) + seconds(rate);
                *free_at
            };
            tokio::time::sleep_until(arrived).await;
        }
        if let Some(rate) = pace {
            tokio::time::sleep(seconds(rate)).await;
        }
        self.carried.fetch_add(packet.len() as u64, Ordering::Relaxed);
        packet
    }
}

/// The body `bytes` as it arrives.
pub(super) fn body(line: &Arc<Line>, bytes: Bytes, fault: Option<&Fault>) -> Body {
    let (sent, pace) = match fault {
        Some(Fault::Truncate(after) | Fault::Stall(after)) => (bytes.slice(..bytes.len().min(*after)), None),
        Some(Fault::Slow(rate)) => (bytes, Some(*rate)),
        _ => (bytes, None),
    };
    // A slow connection sends small packets, so it does not stall.
    let packet = pace.map_or(PACKET, |rate| (rate / 20).max(1) as usize);
    let starts = (0..sent.len()).step_by(packet);
    let packets: Vec<Bytes> = starts.map(|at| sent.slice(at..sent.len().min(at + packet))).collect();
    let line = Arc::clone(line);
    let arriving = stream::iter(packets).then(move |packet| {
        let line = Arc::clone(&line);
        async move { Ok::<_, std::io::Error>(line.carry(packet, pace).await) }
    });
    match fault {
        Some(Fault::Truncate(_)) => Body::from_stream(arriving.chain(stream::once(async {
            // Leaves time to send the bytes before it.
            tokio::time::sleep(Duration::from_millis(50)).await;
            Err(std::io::Error::other("cut"))
        }))),
        Some(Fault::Stall(_)) => Body::from_stream(arriving.chain(stream::pending())),
        _ => Body::from_stream(arriving),
    }
}
