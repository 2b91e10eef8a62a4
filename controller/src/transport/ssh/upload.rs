//! Large files to the host: several channels at once, each writing blocks of one file at their own offsets.
//!
//! A server gives each channel a window of 2 MiB per round trip, so that one channel is slow on a long line however wide it
//! is; channels of one connection add up. Blocks go raw through SFTP, or compressed through `gzip` and `dd` on a narrow line,
//! or raw through `dd` where the server has no SFTP.

use std::io::Write;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use futures::future::{try_join, try_join_all};
use russh::client::Handle;
use tokio::time::Instant;

use super::clock::Clock;
use super::connect::Client;
use super::plain;
use super::sftp::{Sftp, Writer};
use super::source::UploadSource;
use crate::transport::TransportError;

/// Channels of one upload, as measured (`benches/upload.rs`). OpenSSH allows 10 per connection; two are left for commands.
pub(super) const LANES: usize = 8;
/// What a lane takes at a time: as much as a channel's window holds.
pub(super) const BLOCK: u64 = 31 * plain::UNIT;
/// Bytes that go out before the first acknowledgement: two windows.
const START: u64 = 2 * BLOCK;
/// Time after which a line is judged: connections find their rate before.
const TRIAL: Duration = Duration::from_secs(2);
/// Bytes per second below which a line is narrow. One core compresses several times faster.
const NARROW: f64 = 12e6;

/// One upload, shared by its lanes.
pub(super) struct Upload<'a> {
    pub(super) handle: &'a Handle<Client>,
    pub(super) source: &'a UploadSource,
    pub(super) remote: &'a str,
    pub(super) clock: Clock<'a>,
    pub(super) queue: Queue,
    pub(super) press: Press,
    /// Channels at the same time, at most.
    pub(super) lanes: usize,
}

impl Upload<'_> {
    /// Sends all blocks. Without `sftp` through commands alone.
    pub(super) async fn run(&self, sftp: Option<Arc<Sftp>>) -> Result<(), TransportError> {
        let all = async {
            match sftp {
                // Lanes beside the first need not come to be: servers limit the channels of a connection.
                Some(first) => {
                    let more = (1..self.lanes()).map(|_| self.extra_sftp());
                    try_join(self.first_sftp(first), try_join_all(more)).await?;
                }
                None => plain::make(self.handle, self.remote).await?,
            }
            // What is left is all, or what had better go compressed.
            try_join_all((0..self.lanes()).map(|_| self.extra_commands())).await?;
            // What refused lanes gave back, or the reason why.
            self.through_commands().await
        };
        self.clock.guard(self.remote, all).await
    }

    fn lanes(&self) -> usize {
        self.queue.len().clamp(1, self.lanes)
    }

    async fn first_sftp(&self, sftp: Arc<Sftp>) -> Result<(), TransportError> {
        self.fill(sftp.writer(self.remote, true, &self.clock).await?).await
    }

    /// The first lane has made the file long before this one is open. Making it here, when all is over, would bring it back.
    async fn extra_sftp(&self) -> Result<(), TransportError> {
        let Ok(Some(sftp)) = Sftp::open(self.handle, self.clock.patience()).await else { return Ok(()) };
        match Arc::new(sftp).writer(self.remote, false, &self.clock).await {
            Ok(file) => self.fill(file).await,
            Err(_) => Ok(()),
        }
    }

    async fn fill(&self, mut file: Writer<'_>) -> Result<(), TransportError> {
        let sent = self.blocks(&mut file).await;
        let closed = file.close().await;
        sent.and(closed)
    }

    /// Takes blocks until none is left or compression turns out to pay.
    async fn blocks(&self, file: &mut Writer<'_>) -> Result<(), TransportError> {
        loop {
            self.keep_pace(file).await?;
            let Some(block) = self.queue.take() else { return Ok(()) };
            let raw = self.source.block(block.clone()).await?;
            if self.press.pays(&self.clock, &raw).await {
                self.queue.give_back(block);
                return Ok(());
            }
            file.write(block.start, &raw).await?;
        }
    }

    /// Waits while more is under way than the line has shown to carry. A narrow line would be full for minutes before it is judged.
    async fn keep_pace(&self, file: &mut Writer<'_>) -> Result<(), TransportError> {
        loop {
            let acknowledged = self.clock.acknowledged();
            if self.queue.taken() <= 2 * acknowledged + START {
                return Ok(());
            }
            if !file.acknowledge().await? {
                self.clock.wait_for_more_than(acknowledged).await;
            }
        }
    }

    async fn through_commands(&self) -> Result<(), TransportError> {
        while let Some(block) = self.queue.take() {
            if let Err(error) = self.command(block.clone()).await {
                self.queue.give_back(block);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn command(&self, block: Range<u64>) -> Result<(), TransportError> {
        let raw = self.source.block(block.clone()).await?;
        let packed = if self.press.pays(&self.clock, &raw).await { squeeze(&raw).await } else { None };
        match packed {
            Some(packed) => plain::unpack_at(self.handle, self.remote, block.start, &packed, &self.clock).await?,
            None => plain::write_at(self.handle, self.remote, block.start, &raw, &self.clock).await?,
        }
        self.clock.acknowledge(raw.len() as u64);
        Ok(())
    }

    /// A lane of commands, which the server may refuse: one channel is enough. Nor does a full disk end the others in the
    /// middle of a command, which would go on there alone and make again what is removed here.
    async fn extra_commands(&self) -> Result<(), TransportError> {
        match self.through_commands().await {
            Err(e) if !e.kind.is_transient() => Ok(()),
            done => done,
        }
    }
}

/// Blocks to send.
pub(super) struct Queue(Mutex<PendingBlocks>);

struct PendingBlocks {
    /// Nobody has taken these yet; the next one is the last.
    left: Vec<Range<u64>>,
    /// Bytes of those that were.
    taken: u64,
}

impl Queue {
    /// The blocks of these parts of a file.
    pub(super) fn of(parts: &[Range<u64>]) -> Self {
        let blocks = |part: &Range<u64>| {
            let end = part.end;
            let starts = (part.start..end).step_by(BLOCK as usize);
            starts.map(move |start| start..end.min(start + BLOCK)).collect::<Vec<_>>()
        };
        let mut left: Vec<_> = parts.iter().flat_map(blocks).collect();
        left.reverse();
        Self(Mutex::new(PendingBlocks { left, taken: 0 }))
    }

    fn take(&self) -> Option<Range<u64>> {
        let mut blocks = self.lock();
        let block = blocks.left.pop()?;
        blocks.taken += block.end - block.start;
        Some(block)
    }

    fn give_back(&self, block: Range<u64>) {
        let mut blocks = self.lock();
        blocks.taken -= block.end - block.start;
        blocks.left.push(block);
    }

    fn taken(&self) -> u64 {
        self.lock().taken
    }

    fn len(&self) -> usize {
        self.lock().left.len()
    }

    fn lock(&self) -> MutexGuard<'_, PendingBlocks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Judges, once, whether compressing is quicker than sending.
pub(super) struct Press {
    started: Instant,
    verdict: OnceLock<bool>,
}

impl Press {
    /// `allowed`: the host can unpack.
    pub(super) fn new(allowed: bool) -> Self {
        let verdict = if allowed { OnceLock::new() } else { OnceLock::from(false) };
        Self { started: Instant::now(), verdict }
    }

    /// Whether to compress what is like `sample`. Not before the line has shown how narrow it is.
    async fn pays(&self, clock: &Clock<'_>, sample: &[u8]) -> bool {
        if let Some(verdict) = self.verdict.get() {
            return *verdict;
        }
        let elapsed = self.started.elapsed();
        if elapsed < TRIAL {
            return false;
        }
        let pays = is_narrow(clock.acknowledged(), elapsed) && squeeze(sample).await.is_some();
        *self.verdict.get_or_init(|| pays)
    }
}

/// Whether these bytes in this time are a narrow line.
fn is_narrow(bytes: u64, elapsed: Duration) -> bool {
    (bytes as f64) < NARROW * elapsed.as_secs_f64()
}

/// The bytes as `gzip` would pack them, if that makes them a tenth shorter at least.
async fn squeeze(raw: &[u8]) -> Option<Vec<u8>> {
    let (owned, enough) = (raw.to_vec(), raw.len() - raw.len() / 10);
    let packed = tokio::task::spawn_blocking(move || pack(&owned)).await.ok()?;
    (packed.len() < enough).then_some(packed)
}

fn pack(raw: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::with_capacity(raw.len() / 2), Compression::fast());
    gzip.write_all(raw).and_then(|()| gzip.finish()).expect("a Vec takes everything")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_the_parts_and_start_where_dd_can_seek() {
        let unit = 4 << 20;
        let queue = Queue::of(&[0..unit, 3 * unit..3 * unit + 5]);
        assert_eq!(queue.len(), 4);
        let first = queue.take().unwrap();
        assert_eq!(queue.taken(), BLOCK);
        queue.give_back(first);
        assert_eq!((queue.taken(), queue.len()), (0, 4));
        let taken: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(taken, [0..BLOCK, BLOCK..2 * BLOCK, 2 * BLOCK..unit, 3 * unit..3 * unit + 5]);
        assert!(taken.iter().all(|block| block.start % plain::UNIT == 0));
        assert_eq!(Queue::of(&[]).len(), 0);
    }

    #[tokio::test]
    async fn only_a_narrow_line_and_a_file_that_shrinks_are_pressed() {
        assert!(is_narrow(3_000_000, Duration::from_secs(3)) && !is_narrow(100_000_000, Duration::from_secs(3)));
        let text = b"outliers ".repeat(1000);
        let clock = |bytes| {
            let clock = Clock::new(Duration::from_secs(1), &|_| {});
            clock.acknowledge(bytes);
            clock
        };
        let after = |allowed| Press { started: Instant::now() - 2 * TRIAL, ..Press::new(allowed) };
        assert!(!Press::new(true).pays(&clock(0), &text).await, "too early to tell");
        assert!(!after(false).pays(&clock(0), &text).await, "the host cannot unpack");
        assert!(!after(true).pays(&clock(1 << 40), &text).await, "wide");
        let packed = pack(&text);
        assert!(!after(true).pays(&clock(0), &packed).await, "shrinks no more");
        let press = after(true);
        assert!(press.pays(&clock(0), &text).await);
        assert!(press.pays(&clock(1 << 40), &packed).await, "judged once");
    }

    #[test]
    fn what_is_packed_is_smaller_and_comes_back() {
        use std::io::Read;
        let raw = b"outliers ".repeat(1000);
        let packed = pack(&raw);
        assert!(packed.len() * 10 < raw.len());
        let mut back = Vec::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut back).unwrap();
        assert_eq!(back, raw);
    }
}
