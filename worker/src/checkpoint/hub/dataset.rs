//! Datasets: text files that are read in ranges.

use std::sync::Arc;

use super::Hub;
use super::listing::{self, RepoKind};
use super::remote::RemoteFile;
use crate::error::Result;

/// Files of a dataset at one commit.
pub struct Dataset {
    /// Hash of the commit.
    pub commit: String,
    /// The chosen files, by name.
    pub files: Vec<RemoteFile>,
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
        let open = |file| RemoteFile::open(&self.client, &listing, file);
        let files = names.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Dataset { commit: listing.commit.clone(), files })
    }
}
