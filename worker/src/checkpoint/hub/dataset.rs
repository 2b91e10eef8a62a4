//! Datasets: files of text of which a run needs a few ranges.

use std::ops::Range;
use std::sync::Arc;

use super::Hub;
use super::listing::{self, RepoKind};
use super::remote::RemoteFile;
use crate::error::{Result, WorkerError};

/// Files of a dataset at one commit.
pub struct Dataset {
    /// Hash of the commit.
    pub commit: String,
    /// The files that were chosen, by name.
    pub files: Vec<DatasetFile>,
}

/// One of them.
pub struct DatasetFile(RemoteFile);

impl DatasetFile {
    /// Path inside the repository.
    pub fn name(&self) -> &str {
        self.0.name()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// The bytes of a range inside the file.
    ///
    /// # Errors
    /// Kind `Network` when patience ran out.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.0.read(range)
    }
}

impl Hub {
    /// The files of the dataset `id` at `revision` that `choose` says yes to, in the order of
    /// their names. None of their bytes is fetched.
    ///
    /// # Errors
    /// As [`resolve`](Hub::resolve).
    pub fn dataset(&self, id: &str, revision: &str, choose: impl Fn(&str) -> bool) -> Result<Dataset> {
        let listing = Arc::new(listing::fetch(&self.client, RepoKind::Dataset, id, revision)?);
        let mut names: Vec<_> = listing.files.iter().filter(|file| choose(&file.name)).collect();
        names.sort_by(|a, b| a.name.cmp(&b.name));
        let unsized_file =
            |name: &str| WorkerError::network(format!("the hub does not tell the size of {name} of {id}"));
        let open = |file: &listing::RepoFile| {
            let size = file.size.ok_or_else(|| unsized_file(&file.name))?;
            Ok(DatasetFile(RemoteFile::new(&self.client, &listing, file, size)))
        };
        let files = names.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Dataset { commit: listing.commit.clone(), files })
    }
}
