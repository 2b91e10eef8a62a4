//! The pinned host key of an instance.

use russh::keys::{Algorithm, HashAlg, PublicKey};

use crate::host::transport::{TransportError, TransportErrorKind};

/// An expected host key: `ssh-ed25519 AAAA...`, or a fingerprint `SHA256:...`.
///
/// It belongs to an instance, not to an address: clouds reassign addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostKeyPin(String);

impl HostKeyPin {
    /// Parses a public key line (its comment is dropped) or a fingerprint.
    pub fn new(text: &str) -> Result<Self, TransportError> {
        let text = text.trim();
        if let Some(digest) = text.strip_prefix("SHA256:") {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/');
            let digest = digest.trim_end_matches('=');
            return match digest.len() == 43 && digest.bytes().all(plain) {
                true => Ok(Self(format!("SHA256:{digest}"))),
                false => Err(not_a_pin("a fingerprint has 43 characters after `SHA256:`")),
            };
        }
        let mut key = PublicKey::from_openssh(text).map_err(|e| not_a_pin(&e.to_string()))?;
        key.set_comment("");
        Self::of(&key)
    }

    pub(super) fn of(key: &PublicKey) -> Result<Self, TransportError> {
        let bare = PublicKey::new(key.key_data().clone(), "");
        let line = bare.to_openssh().map_err(|e| not_a_pin(&e.to_string()))?;
        Ok(Self(line.trim_end().to_owned()))
    }

    /// The key line or fingerprint.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `SHA256:...`, as `ssh-keygen -l` prints it.
    pub fn fingerprint(&self) -> String {
        self.key().map_or_else(|| self.0.clone(), |key| key.fingerprint(HashAlg::Sha256).to_string())
    }

    pub(super) fn matches(&self, key: &PublicKey) -> bool {
        match self.key() {
            Some(pinned) => pinned.key_data() == key.key_data(),
            None => key.fingerprint(HashAlg::Sha256).to_string() == self.0,
        }
    }

    /// The algorithm to request first: a server may have several keys, and a key of another kind
    /// would look like a changed key.
    pub(super) fn algorithm(&self) -> Option<Algorithm> {
        self.key().map(|key| key.algorithm())
    }

    fn key(&self) -> Option<PublicKey> {
        PublicKey::from_openssh(&self.0).ok()
    }
}

fn not_a_pin(why: &str) -> TransportError {
    TransportError::new(TransportErrorKind::Local, format!("not a host key: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti user@example.com";

    #[test]
    fn pin_is_a_key_or_its_fingerprint() {
        let key = PublicKey::from_openssh(KEY).unwrap();
        let by_key = HostKeyPin::new(KEY).unwrap();
        assert!(!by_key.as_str().contains("example"), "the comment is no part of the key");
        assert!(by_key.matches(&key));
        let by_print = HostKeyPin::new(&by_key.fingerprint()).unwrap();
        assert!(by_print.as_str().starts_with("SHA256:") && by_print.matches(&key));
        assert_eq!(HostKeyPin::new(by_key.as_str()).unwrap(), by_key);
    }

    #[test]
    fn pin_rejects_another_key_and_malformed_text() {
        let other = russh::keys::PrivateKey::from(russh::keys::ssh_key::private::Ed25519Keypair::from_seed(&[7; 32]));
        assert!(!HostKeyPin::new(KEY).unwrap().matches(other.public_key()));
        for bad in ["", "x", "SHA256:short", "ssh-ed25519 AAAA", "-----BEGIN"] {
            assert!(HostKeyPin::new(bad).is_err(), "{bad}");
        }
    }
}
