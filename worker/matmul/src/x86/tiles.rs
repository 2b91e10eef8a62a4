//! AMX, the tile unit.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

use super::pack::{self, BlockRow, Matrix, Real, SIDE};
use super::product::{Method, Sums};

/// Bytes of a row of a tile.
const ROW: usize = 64;

/// Whether this processor has AMX and the system permits its use.
pub(crate) fn are_there() -> bool {
    // Intel's manual, CPUID leaf 7: AMX-BF16 and AMX-TILE.
    let wanted = 1 << 22 | 1 << 24;
    __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & wanted == wanted && is_granted()
}

/// Requests permission for AMX. Linux saves 8 KiB more per thread for processes that request it
/// (since Linux 5.16).
fn is_granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call reads its two numbers, and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// This thread's tile configuration, all tiles of full size. It is released on drop.
struct Configured(());

impl Configured {
    /// # Safety
    /// Tiles [are there](are_there).
    unsafe fn new() -> Self {
        #[repr(C, align(64))]
        struct Configuration([u8; 64]);
        let mut configuration = Configuration([0; 64]);
        configuration.0[0] = 1;
        for tile in 0..8 {
            configuration.0[16 + 2 * tile] = ROW as u8;
            configuration.0[48 + tile] = SIDE as u8;
        }
        // SAFETY: 64 bytes that say palette 1, and eight tiles of 16 rows of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: this thread configured tiles, and nothing of theirs is needed any more.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Products by AMX.
pub(crate) struct Tiles;

// SAFETY: reads and writes as many tiles as there are steps, and parts of each.
unsafe impl<A: Real> Method<A> for Tiles {
    const LEFT: usize = SIDE;
    const RIGHT: usize = SIDE * A::PARTS;

    unsafe fn pack_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
        // SAFETY: there are vectors wherever there are tiles.
        unsafe { pack::pairs_of_left(b, first_row, into) };
    }

    unsafe fn pack_right(a: &[A], k: usize, into: &mut [BlockRow]) {
        // SAFETY: as above.
        unsafe { pack::pairs_of_right(a, k, into) };
    }

    unsafe fn get_ready() -> impl Sized {
        // SAFETY: there are tiles.
        unsafe { Configured::new() }
    }

    unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, sums: &mut Sums) {
        // SAFETY: the caller's promise.
        unsafe { multiply(left, right, steps, A::PARTS, sums) };
    }
}

/// As [`Method::multiply`], for numbers of `parts` parts.
///
/// Uses five of the eight tile registers. Registers are renamed, so a load need not wait for the
/// last product of its register. If the core's other hyperthread uses tiles too, there are few
/// spare registers and more names in use make all wait. On a Sapphire Rapids with both
/// hyperthreads, four sums at a time took 28 ns per product and two took 14; with one, both take
/// 7.4.
///
/// # Safety
/// Tiles are [`Configured`]. `left` points to `steps` tiles each, `right` to `steps * parts`.
unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, parts: usize, sums: &mut Sums) {
    let [mut first, mut second] = left;
    let mut right = right;
    // SAFETY: all addresses are of tiles that the caller promised, or of `sums`, two tiles large.
    // No other code knows these registers.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
        for _ in 0..steps {
            asm!(
                "tileloadd tmm2, [{first} + {row}]",
                "tileloadd tmm3, [{second} + {row}]",
                first = in(reg) first, second = in(reg) second, row = in(reg) ROW, options(nostack, readonly)
            );
            for _ in 0..parts {
                asm!(
                    "tileloadd tmm4, [{right} + {row}]",
                    "tdpbf16ps tmm0, tmm2, tmm4",
                    "tdpbf16ps tmm1, tmm3, tmm4",
                    right = in(reg) right, row = in(reg) ROW, options(nostack, readonly)
                );
                right = right.wrapping_add(SIDE);
            }
            (first, second) = (first.wrapping_add(SIDE), second.wrapping_add(SIDE));
        }
        let [first, second] = &mut sums.0;
        asm!(
            "tilestored [{first} + {row}], tmm0",
            "tilestored [{second} + {row}], tmm1",
            first = in(reg) first, second = in(reg) second, row = in(reg) ROW, options(nostack)
        );
    }
}
