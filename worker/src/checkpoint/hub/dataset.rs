//! Datasets: text files that are read in ranges.

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
    /// The chosen files, by name.
    pub files: Vec<DatasetFile>,
}

/// A file of a dataset.
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

    /// Reads a range of the file.
    ///
    /// # Errors
    /// Kind `Network` after the last retry.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.0.read(range)
    }
}

impl Hub {
    /// The files of the dataset `id` at `revision` for which `choose` returns true, in order of
    /// names. No content is fetched.
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
