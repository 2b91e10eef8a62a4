//! Allocator of the worker. A pass allocates and frees tensors of many MiB in every layer. The C
//! library returns such blocks to the system, and new blocks are zeroed page by page, which takes
//! a tenth of the time of a pass on a CPU.
//!
//! This allocator keeps freed blocks for reuse. Used and kept bytes together never exceed the most
//! bytes that were in use at once, so a process needs no more memory than without it.

#[cfg_attr(target_os = "linux", path = "linux/blocks.rs")]
#[cfg_attr(not(target_os = "linux"), path = "none.rs")]
mod blocks;

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, except for large blocks on Linux.
#[derive(Debug)]
pub struct Heap;

// SAFETY: large blocks are memory of their own, which nobody else has until they are deallocated;
// all others are the system's. The layout alone determines which allocator a block belongs to, and
// callers pass the same layout to free it.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match blocks::size(layout) {
            Some(size) => blocks::take(size).map_or(std::ptr::null_mut(), |(block, _)| block),
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(size) = blocks::size(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc_zeroed(layout) };
        };
        let Some((block, used)) = blocks::take(size) else {
            return std::ptr::null_mut();
        };
        if used {
            // SAFETY: the block is at least as large, and the caller's alone.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match blocks::size(layout) {
            Some(size) => blocks::free(block, size),
            // SAFETY: the caller's promise.
            None => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: such a layout there is.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (blocks::size(layout), blocks::size(new)) {
            // SAFETY: the caller's promise.
            (None, None) => return unsafe { System.realloc(block, layout, new_size) },
            (Some(old), Some(new)) if old == new => return block,
            _ => {}
        }
        // SAFETY: a layout that is not empty; what is copied lies within both blocks, which are
        // two; the old one is the caller's.
        unsafe {
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}
