//! The local file of an upload.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::files::{blocking, open_regular};
use crate::host::transport::{TransportError, TransportErrorKind as Kind};

/// A plain file that is read at any offset.
pub(super) struct UploadSource(Arc<File>);

impl UploadSource {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(Arc::new(open_regular(path)?)))
    }

    /// Reads a range; an error if the file has become too short.
    pub(super) async fn block(&self, range: Range<u64>) -> Result<Vec<u8>, TransportError> {
        let file = self.0.clone();
        let read = move || {
            let mut block = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut block, range.start).map(|()| block)
        };
        blocking(read).await.map_err(|e| TransportError::new(Kind::Local, format!("reading the file to send: {e}")))
    }
}
