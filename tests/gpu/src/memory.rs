//! Allocated memory: on GPUs, and pinned on the host. Addresses are addresses of this process;
//! accesses outside of allocations are refused. Unwritten and freed memory holds NaN.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// Byte of unwritten memory: NaN in every dtype.
const NOTHING: u8 = 0xff;
const ALIGNMENT: usize = 256;

/// Owner of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// A GPU by its index.
    Gpu(usize),
    /// The host, pinned.
    Host,
}

#[derive(Clone, Copy, Debug)]
struct Allocation {
    len: usize,
    owner: Owner,
}

/// All allocations.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    live: RwLock<BTreeMap<u64, Allocation>>,
}

impl Memory {
    pub(crate) const fn new() -> Self {
        Self { live: RwLock::new(BTreeMap::new()) }
    }

    fn lock(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Allocation>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates memory.
    pub(crate) fn allocate(&self, len: usize, owner: Owner) -> u64 {
        let layout = layout(len);
        // SAFETY: the layout is not empty; what is allocated is written to at once.
        let address = unsafe {
            let address = std::alloc::alloc(layout);
            if address.is_null() {
                std::alloc::handle_alloc_error(layout);
            }
            address.write_bytes(NOTHING, layout.size());
            address as u64
        };
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        live.insert(address, Allocation { len, owner });
        address
    }

    /// Frees memory from [`allocate`](Self::allocate).
    ///
    /// # Errors
    /// The address was not allocated.
    pub(crate) fn free(&self, address: u64) -> Result<(), String> {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let Allocation { len, .. } =
            live.remove(&address).ok_or_else(|| format!("{address:#x} was never allocated"))?;
        let layout = layout(len);
        // SAFETY: it was allocated with this layout, and nobody else knows it any more: readers
        // hold the lock.
        unsafe {
            (address as *mut u8).write_bytes(NOTHING, layout.size());
            std::alloc::dealloc(address as *mut u8, layout);
        }
        Ok(())
    }

    /// Bytes in use.
    pub(crate) fn used(&self, owner: Owner) -> usize {
        self.lock().values().filter(|allocation| allocation.owner == owner).map(|allocation| allocation.len).sum()
    }

    /// Whether an address is in pinned memory.
    pub(crate) fn is_pinned(&self, address: u64) -> bool {
        let live = self.lock();
        let below = live.range(..=address).next_back();
        below.is_some_and(|(start, allocation)| {
            allocation.owner == Owner::Host && address < start + allocation.len.max(1) as u64
        })
    }

    /// Locks the memory for several accesses; nothing can be freed meanwhile.
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader { live: self.lock(), last: 0..0 }
    }
}

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len.max(1), ALIGNMENT).unwrap_or(Layout::new::<u64>())
}

/// Reads and writes allocated memory.
pub(crate) struct Reader<'a> {
    live: RwLockReadGuard<'a, BTreeMap<u64, Allocation>>,
    /// The allocation of the last access, which the next access most likely uses too.
    last: std::ops::Range<u64>,
}

impl Reader<'_> {
    /// Checks that these bytes are in one allocation.
    ///
    /// # Errors
    /// They are not.
    pub(crate) fn check(&mut self, address: u64, len: usize) -> Result<(), String> {
        let end = address.checked_add(len as u64);
        if end.is_some_and(|end| self.last.start <= address && end <= self.last.end) {
            return Ok(());
        }
        if let Some((start, allocation)) = self.live.range(..=address).next_back() {
            self.last = *start..start + allocation.len as u64;
        }
        match end {
            Some(end) if self.last.start <= address && end <= self.last.end => Ok(()),
            _ => Err(format!("{len} bytes at {address:#x} are not allocated")),
        }
    }

    /// # Errors
    /// The bytes are not allocated.
    pub(crate) fn read(&mut self, address: u64, into: &mut [u8]) -> Result<(), String> {
        self.check(address, into.len())?;
        // SAFETY: so many bytes are allocated, and stay so while the lock is held. Whoever writes
        // to them meanwhile does so on the GPU too, where that would be as undefined.
        unsafe { std::ptr::copy(address as *const u8, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// # Errors
    /// The bytes are not allocated.
    pub(crate) fn write(&mut self, address: u64, from: &[u8]) -> Result<(), String> {
        self.check(address, from.len())?;
        // SAFETY: as for reading.
        unsafe { std::ptr::copy(from.as_ptr(), address as *mut u8, from.len()) };
        Ok(())
    }

    /// Marks the bytes as unwritten.
    ///
    /// # Errors
    /// The bytes are not allocated.
    pub(crate) fn forget(&mut self, address: u64, len: usize) -> Result<(), String> {
        self.fill(address, NOTHING, len)
    }

    /// # Errors
    /// The bytes are not allocated.
    pub(crate) fn fill(&mut self, address: u64, value: u8, len: usize) -> Result<(), String> {
        self.check(address, len)?;
        // SAFETY: as for reading.
        unsafe { (address as *mut u8).write_bytes(value, len) };
        Ok(())
    }

    /// # Errors
    /// Not all of the bytes are allocated.
    pub(crate) fn copy(&mut self, to: u64, from: u64, len: usize) -> Result<(), String> {
        self.check(from, len)?;
        self.check(to, len)?;
        // SAFETY: as for reading.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, len) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_outside_allocations_is_an_error() {
        let memory = Memory::new();
        let at = memory.allocate(10, Owner::Gpu(0));
        let mut bytes = [0; 10];
        memory.reader().read(at, &mut bytes).unwrap();
        assert_eq!(bytes, [NOTHING; 10], "nobody wrote to it");
        memory.reader().write(at + 2, &[1, 2]).unwrap();
        memory.reader().copy(at + 6, at + 2, 2).unwrap();
        memory.reader().read(at, &mut bytes).unwrap();
        assert_eq!(bytes, [255, 255, 1, 2, 255, 255, 1, 2, 255, 255]);
        assert!(memory.reader().write(at + 9, &[1, 2]).is_err() && memory.reader().read(at - 1, &mut bytes).is_err());
        assert!(memory.reader().check(u64::MAX, 2).is_err());
        assert_eq!((memory.used(Owner::Gpu(0)), memory.used(Owner::Gpu(1)), memory.is_pinned(at)), (10, 0, false));
        memory.free(at).unwrap();
        assert!(memory.free(at).is_err() && memory.reader().read(at, &mut bytes).is_err());
        let pinned = memory.allocate(10, Owner::Host);
        assert!(memory.is_pinned(pinned + 9) && !memory.is_pinned(pinned + 10));
    }
}
