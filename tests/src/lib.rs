//! The servers and machines the end-to-end tests run against, and what they compare with.

pub mod desk;
pub mod golden;
pub mod hub;
pub mod line;
pub mod programs;
pub mod sshd;

/// SHA-256 in lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}
