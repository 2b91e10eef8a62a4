//! Servers, machines and references of the end-to-end tests.

pub mod browser;
pub mod cluster;
pub mod context;
pub mod flaky_link;
pub mod golden;
pub mod hub;
pub mod kills;
pub mod programs;
pub mod sshd;
pub mod torch;

use std::io::Write;

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// `len` bytes that nothing can compress, and that repeat nowhere within a block.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(len).collect()
}

/// Prints what a test counted, even if it passes: the test harness captures other output.
pub fn tell(line: &str) {
    // Standard error is closed.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Reports that this thread's test was skipped, in whole or in part, because this machine lacks
/// something. `.ci/run` counts these tests as skipped.
pub fn not_checked(why: &str) {
    let thread = std::thread::current();
    tell(&format!("NOT checked: {}: {why}", thread.name().unwrap_or("a test")));
}
