//! Uploads large files over several channels, each writing blocks of one file at their offsets.
//!
//! A server gives each channel a window of 2 MiB per round trip, so one channel is slow on a long
//! line at any bandwidth. The windows of several channels add up. Blocks go through SFTP, or
//! through `dd` on servers without it.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::{try_join, try_join_all};
use russh::client::Handle;

use super::clock::Clock;
use super::connect::Client;
use super::plain;
use super::sftp::{Sftp, Writer};
use super::source::UploadSource;
use crate::host::transport::TransportError;
use crate::host::transport::scripts::UNIT;

/// Channels of one upload, from measurements (`benches/upload.rs`). OpenSSH allows 10 per
/// connection; two are left for commands.
pub(super) const LANES: usize = 8;
/// What a lane takes at a time: as much as a channel's window holds.
pub(super) const BLOCK: u64 = 31 * UNIT;
/// Bytes that go out before the first acknowledgement: two windows.
const START: u64 = 2 * BLOCK;

/// One upload, shared by its lanes (one channel each).
pub(super) struct Upload<'a> {
    pub(super) handle: &'a Handle<Client>,
    pub(super) source: &'a UploadSource,
    pub(super) remote: &'a str,
    pub(super) clock: Clock<'a>,
    pub(super) queue: Queue,
    /// Maximum number of concurrent channels.
    pub(super) lanes: usize,
}

impl Upload<'_> {
    /// Sends all blocks, over `sftp` or through commands.
    pub(super) async fn run(&self, sftp: Option<Arc<Sftp>>) -> Result<(), TransportError> {
        let all = async {
            match sftp {
                // Additional lanes may fail: servers limit the channels of a connection.
                Some(first) => {
                    let more = (1..self.lanes()).map(|_| self.extra_sftp());
                    try_join(self.first_sftp(first), try_join_all(more)).await.map(drop)
                }
                None => {
                    plain::make(self.handle, self.remote).await?;
                    try_join_all((0..self.lanes()).map(|_| self.extra_commands())).await?;
                    // Sends the blocks that refused lanes returned, or reports the error.
                    self.through_commands().await
                }
            }
        };
        self.clock.guard(self.remote, all).await
    }

    fn lanes(&self) -> usize {
        self.queue.len().clamp(1, self.lanes)
    }

    async fn first_sftp(&self, sftp: Arc<Sftp>) -> Result<(), TransportError> {
        self.fill(sftp.writer(self.remote, true, &self.clock).await?).await
    }

    /// The first lane has created the file before. Creating it here could recreate a file that has
    /// been removed.
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

    /// Sends blocks until none is left.
    async fn blocks(&self, file: &mut Writer<'_>) -> Result<(), TransportError> {
        loop {
            self.keep_pace(file).await?;
            let Some(block) = self.queue.take() else { return Ok(()) };
            let raw = self.source.block(block.clone()).await?;
            file.write(block.start, &raw).await?;
        }
    }

    /// Waits while more bytes are in flight than the line has carried so far. A slow line would
    /// otherwise be full for minutes, and commands would wait behind it.
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
        plain::write_at(self.handle, self.remote, block.start, &raw, &self.clock).await?;
        self.clock.acknowledge(raw.len() as u64);
        Ok(())
    }

    /// An additional lane of commands, which the server may refuse: one channel is enough. A full
    /// disk does not end the other lanes in the middle of a command, which would continue on the
    /// host and recreate files that are removed here.
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
    /// Blocks not taken yet; the last element is next.
    left: Vec<Range<u64>>,
    /// Bytes of the blocks taken.
    taken: u64,
}

impl Queue {
    /// Splits parts of a file into blocks.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_file_at_offsets_dd_can_seek() {
        let unit = 4 << 20;
        let queue = Queue::of(&[0..unit, 3 * unit..3 * unit + 5]);
        assert_eq!(queue.len(), 4);
        let first = queue.take().unwrap();
        assert_eq!(queue.taken(), BLOCK);
        queue.give_back(first);
        assert_eq!((queue.taken(), queue.len()), (0, 4));
        let taken: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(taken, [0..BLOCK, BLOCK..2 * BLOCK, 2 * BLOCK..unit, 3 * unit..3 * unit + 5]);
        assert!(taken.iter().all(|block| block.start % UNIT == 0));
        assert_eq!(Queue::of(&[]).len(), 0);
    }
}
