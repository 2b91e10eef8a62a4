//! Assembled kernels (cubins), appended to this program's file by `assemble.py`.
//!
//! The tensor library passes PTX to the driver, which would compile it. [`serve`] passes the
//! driver the cubin that was assembled from the same PTX, if it fits the GPU.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use flate2::read::ZlibDecoder;
use sha2::{Digest, Sha256};

use crate::table::{self, Slot};

/// Last bytes of a program with appended kernels.
pub(crate) const MAGIC: [u8; 8] = *b"cubins 1";
/// Trailer: number of kernels, bytes of all that follows the program, [`MAGIC`].
const END: usize = 24;
/// Entry: SHA-256 of the PTX, ten times the compute capability, offset behind the program, length.
const ENTRY: usize = 56;

/// The data appended to a program.
pub(crate) struct Archive {
    file: File,
    entries: Vec<Entry>,
}

struct Entry {
    ptx: [u8; 32],
    /// Ten times the compute capability.
    compute: u64,
    /// Offset and length of the packed image in the file.
    at: u64,
    len: usize,
}

impl Archive {
    /// Kernels of a program's file; `None` if none are appended.
    pub(crate) fn open(program: &Path) -> Option<Self> {
        let file = File::open(program).ok()?;
        let end = file.metadata().ok()?.len();
        let mut last = [0; END];
        file.read_exact_at(&mut last, end.checked_sub(END as u64)?).ok()?;
        let (count, all) = (number(&last, 0), number(&last, 8));
        if last[16..] != MAGIC {
            return None;
        }
        let begin = end.checked_sub(all)?;
        let bytes = count.checked_mul(ENTRY as u64).filter(|bytes| *bytes <= all)?;
        let mut index = vec![0; bytes as usize];
        file.read_exact_at(&mut index, (end - END as u64).checked_sub(bytes)?).ok()?;
        let entry = |entry: &[u8; ENTRY]| Entry {
            ptx: *entry.first_chunk().expect("longer than a hash"),
            compute: number(entry, 32),
            at: begin + number(entry, 40),
            len: number(entry, 48) as usize,
        };
        let entries = index.as_chunks::<ENTRY>().0.iter().map(entry).collect();
        Some(Self { file, entries })
    }

    /// The cubin assembled from the PTX with this hash for this compute capability, or for an
    /// older one of the same major number, which the GPU can also run.
    pub(crate) fn cubin(&self, ptx: &[u8; 32], (major, minor): (u32, u32)) -> Option<Vec<u8>> {
        let (least, most) = (u64::from(10 * major), u64::from(10 * major + minor));
        let fits = |entry: &&Entry| entry.ptx == *ptx && (least..=most).contains(&entry.compute);
        let entry = self.entries.iter().filter(fits).max_by_key(|entry| entry.compute)?;
        let mut packed = vec![0; entry.len];
        self.file.read_exact_at(&mut packed, entry.at).ok()?;
        let mut cubin = Vec::new();
        ZlibDecoder::new(&*packed).read_to_end(&mut cubin).ok()?;
        Some(cubin)
    }
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("a number is there"))
}

/// Module and image.
/// <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MODULE.html>
type LoadFunction = unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int;

/// Address of the driver's `cuModuleLoadData`.
static DRIVER: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Makes the driver load assembled kernels from now on. The table holds the driver's functions.
pub(crate) fn serve() {
    DRIVER.store(table::function(Slot::cuModuleLoadData), Ordering::Release);
    table::replace(Slot::cuModuleLoadData, load as LoadFunction as *mut c_void);
}

/// # Safety
/// As `cuModuleLoadData` asks; after [`serve`]. All kinds of images have a zero byte in or behind
/// them.
unsafe extern "C" fn load(module: *mut c_void, image: *const c_char) -> c_int {
    // SAFETY: the table held this address under the name of a function of these arguments.
    let driver = unsafe { std::mem::transmute::<*mut c_void, LoadFunction>(DRIVER.load(Ordering::Acquire)) };
    // SAFETY: it ends with a zero, or has one in it.
    for cubin in assembled(unsafe { CStr::from_ptr(image) }) {
        // SAFETY: the caller's module, and an image that lives until this returns.
        if unsafe { driver(module, cubin.as_ptr().cast()) } == 0 {
            return 0;
        }
    }
    // SAFETY: the caller's arguments.
    unsafe { driver(module, image) }
}

/// Cubins assembled from this PTX for the GPUs that are present. The driver refuses a cubin for
/// another GPU.
fn assembled(ptx: &CStr) -> Vec<Vec<u8>> {
    static ARCHIVE: OnceLock<Option<Archive>> = OnceLock::new();
    let archive = ARCHIVE.get_or_init(|| Archive::open(Path::new("/proc/self/exe")));
    let (Some(archive), Ok(found)) = (archive, crate::find()) else { return Vec::new() };
    let hash: [u8; 32] = Sha256::digest(ptx.to_bytes()).into();
    let mut computes: Vec<(u32, u32)> = found.gpus.iter().map(|gpu| gpu.compute).collect();
    computes.sort_unstable();
    computes.dedup();
    computes.into_iter().rev().filter_map(|compute| archive.cubin(&hash, compute)).collect()
}
