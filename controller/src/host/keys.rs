//! The SSH key of one run: created before anything is rented, removed after the run.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use russh::keys::ssh_key::LineEnding;
use russh::keys::ssh_key::private::Ed25519Keypair;
use russh::keys::{PrivateKey, load_secret_key};

use crate::files::{beside, create_private_folder, sync_parent};

/// A new Ed25519 key pair. The private half is a file of mode 0600.
#[derive(Clone, Debug)]
pub struct RunKey {
    private: PathBuf,
    public: String,
}

impl RunKey {
    /// Makes a key in `folder` (created with mode 0700 if missing) under the file name `name`,
    /// comment `comment`.
    ///
    /// An existing file is never overwritten, since an instance may still accept that key.
    pub fn create(folder: &Path, name: &str, comment: &str) -> Result<Self, KeyError> {
        let private = folder.join(name);
        let at = |source| KeyError::Io { path: private.clone(), source };
        create_private_folder(folder).map_err(at)?;
        let mut key = PrivateKey::from(Ed25519Keypair::from_seed(&rand::random()));
        key.set_comment(comment);
        let text = key.to_openssh(LineEnding::LF).map_err(|e| KeyError::Format(e.to_string()))?;
        write_private(&private, text.as_bytes()).map_err(at)?;
        Self::from_private(private, &key)
    }

    /// Opens a key that an earlier process left at `private`.
    pub fn open(private: &Path) -> Result<Self, KeyError> {
        let key = load_secret_key(private, None)
            .map_err(|e| KeyError::Unreadable { path: private.to_owned(), why: e.to_string() })?;
        Self::from_private(private.to_owned(), &key)
    }

    fn from_private(private: PathBuf, key: &PrivateKey) -> Result<Self, KeyError> {
        let public = key.public_key().to_openssh().map_err(|e| KeyError::Format(e.to_string()))?;
        Ok(Self { private, public })
    }

    /// Path of the private key.
    pub fn private_path(&self) -> &Path {
        &self.private
    }

    /// The public half as one line of `authorized_keys`, without a line end.
    pub fn public_line(&self) -> &str {
        &self.public
    }
}

/// Creates the file atomically, with mode 0600 from the start.
fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let part = beside(path, ".part");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    file.write_all(content)?;
    file.sync_all()?;
    // A hard link, unlike a rename, fails if another process has created the key meanwhile.
    let linked = fs::hard_link(&part, path);
    fs::remove_file(&part)?;
    linked?;
    sync_parent(path)
}

/// Why a run's key could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file system returned an error.
    #[error("SSH key {}: {source}", path.display())]
    Io {
        /// The key file.
        path: PathBuf,
        /// Error of the system.
        source: io::Error,
    },
    /// The file is not a private key, or it needs a passphrase.
    #[error("SSH key {}: not a usable private key ({why})", path.display())]
    Unreadable {
        /// The key file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The key could not be written in OpenSSH's format.
    #[error("SSH key: {0}")]
    Format(String),
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn key_is_private_and_readable_again() {
        let folder = tempfile::tempdir().unwrap();
        let made = RunKey::create(&folder.path().join("keys"), "r1", "outliers r1").unwrap();
        assert_eq!(fs::metadata(made.private_path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(made.public_line().starts_with("ssh-ed25519 AAAA") && made.public_line().ends_with(" outliers r1"));
        let again = RunKey::open(made.private_path()).unwrap();
        assert_eq!(again.public_line(), made.public_line());
        assert_eq!(fs::read_dir(folder.path().join("keys")).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn existing_key_is_kept_and_new_keys_differ() {
        let folder = tempfile::tempdir().unwrap();
        let first = RunKey::create(folder.path(), "a", "").unwrap();
        let other = RunKey::create(folder.path(), "b", "").unwrap();
        assert_ne!(first.public_line(), other.public_line());
        assert!(matches!(RunKey::create(folder.path(), "a", ""), Err(KeyError::Io { .. })));
        assert_eq!(RunKey::open(first.private_path()).unwrap().public_line(), first.public_line());
    }
}
