//! Reads little-endian numbers from the front of a byte slice.

/// The unread bytes. Methods take from the front, or return `None` and take nothing.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes the number of bytes that `len` reads from the front.
    pub(super) fn after(&mut self, len: impl FnOnce(&mut Self) -> Option<u64>) -> Option<&'a [u8]> {
        let mut rest = *self;
        let len = usize::try_from(len(&mut rest)?).ok()?;
        let taken = rest.take(len)?;
        *self = rest;
        Some(taken)
    }

    /// Takes the bytes up to the next line feed, which is removed as well.
    pub(super) fn line(&mut self) -> Option<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == b'\n')?;
        let line = self.take(end)?;
        self.u8()?;
        Some(line)
    }
}
