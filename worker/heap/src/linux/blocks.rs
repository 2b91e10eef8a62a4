//! Large blocks, mapped directly from the system.

mod free_list;

use std::alloc::Layout;
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::free_list::{FreeList, Span};

/// Minimum size of a large block. The search does not pay off for smaller blocks.
const MIN_BLOCK_BYTES: usize = 256 << 10;
/// Sizes are multiples of this, so of whole pages on every Linux.
const STEP: usize = 64 << 10;
/// Minimum size for which huge pages of 2 MiB are requested.
const HUGE: usize = 2 << 20;

struct Blocks {
    kept: FreeList,
    in_use: usize,
    /// The most bytes that were in use at once.
    peak: usize,
}

static BLOCKS: Mutex<Blocks> = Mutex::new(Blocks { kept: FreeList::new(), in_use: 0, peak: 0 });

fn blocks() -> MutexGuard<'static, Blocks> {
    BLOCKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of the block for this layout; `None` if it is not a large block.
pub(crate) fn size(layout: Layout) -> Option<usize> {
    (layout.size() >= MIN_BLOCK_BYTES && layout.align() <= 4096).then(|| layout.size().next_multiple_of(STEP))
}

/// A block of this size, and whether it has been used before. `None` if the system is out of
/// memory.
pub(crate) fn take(bytes: usize) -> Option<(*mut u8, bool)> {
    let mut blocks = blocks();
    blocks.in_use += bytes;
    if let Some(at) = blocks.kept.take(bytes) {
        return Some((at as *mut u8, true));
    }
    blocks.peak = blocks.peak.max(blocks.in_use);
    let too_much = (blocks.in_use + blocks.kept.bytes()).saturating_sub(blocks.peak);
    blocks.give_back(too_much);
    let fresh = map(bytes).or_else(|| {
        let all = blocks.kept.bytes();
        blocks.give_back(all);
        map(bytes)
    });
    if fresh.is_none() {
        blocks.in_use -= bytes;
    }
    fresh.map(|block| (block, false))
}

/// Frees a block from [`take`].
pub(crate) fn free(block: *mut u8, bytes: usize) {
    let mut blocks = blocks();
    blocks.in_use -= bytes;
    if let Some(span) = blocks.kept.keep(Span { at: block as usize, bytes }) {
        unmap(span);
    }
}

impl Blocks {
    /// Returns this many of the kept bytes to the system.
    fn give_back(&mut self, mut bytes: usize) {
        while bytes > 0
            && let Some(span) = self.kept.drop_some(bytes)
        {
            unmap(span);
            bytes -= span.bytes;
        }
    }
}

fn map(bytes: usize) -> Option<*mut u8> {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory, where the system likes.
    let block = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
    if block == libc::MAP_FAILED {
        return None;
    }
    if bytes >= HUGE {
        // SAFETY: memory that was just mapped. That large pages are refused changes nothing but
        // the time.
        unsafe { libc::madvise(block, bytes, libc::MADV_HUGEPAGE) };
    }
    Some(block.cast())
}

fn unmap(span: Span) {
    // SAFETY: this memory was mapped here, and nobody has it. (If the system has no room to note
    // the hole, it stays mapped.)
    unsafe { libc::munmap(span.at as *mut _, span.bytes) };
}
