//! The servers and machines the end-to-end tests run against, and what they compare with.

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

/// Says what a test counted to whoever runs it, though it passes: the harness keeps what tests print.
pub fn tell(line: &str) {
    // Nobody listens, then.
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Says that the test of this thread was not made, or not all of it, for lack of something on this
/// machine. `.ci/run` counts these tests as skipped.
pub fn not_checked(why: &str) {
    let thread = std::thread::current();
    tell(&format!("NOT checked: {}: {why}", thread.name().unwrap_or("a test")));
}
