//! The outcome of each model of a survey, in a document beside their folders for readers of the
//! results.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::files::{MAX_FILE_BYTES, absent, is_plain_name, read_small, write_whole};

/// File name in the survey's folder.
pub(crate) const FILE: &str = "index.json";

/// Version of the document.
pub(crate) const SCHEMA: u32 = 1;

/// Content of the document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Index {
    pub(crate) schema: u32,
    pub(crate) survey: String,
    /// Absolute path of its file. The same command resumes from it.
    pub(crate) file: String,
    /// Models in the file's order.
    pub(crate) models: Vec<IndexEntry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct IndexEntry {
    pub(crate) name: String,
    /// Hub id or folder.
    pub(crate) model: String,
    /// Key of the requested work.
    pub(crate) job_key: String,
    /// The run with this outcome.
    pub(crate) run: Option<String>,
    pub(crate) outcome: ModelOutcome,
    /// Folder beside this document, if results were saved.
    pub(crate) folder: Option<String>,
    /// Why it is not complete.
    pub(crate) why: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ModelOutcome {
    /// Complete results exist and match the worker's manifest.
    Complete,
    /// Partial results were saved.
    Partial,
    /// No results were saved.
    Failed,
    /// The run is active, or has not started.
    Open,
}

impl ModelOutcome {
    /// One word, for tables.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Partial => "partial",
            Self::Failed => "failed",
            Self::Open => "open",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IndexError {
    Version(String),
    Damaged(String),
}

impl Index {
    /// The entry of a model, by its name in the survey.
    pub(crate) fn entry(&self, name: &str) -> Option<&IndexEntry> {
        self.models.iter().find(|line| line.name == name)
    }

    /// Writes the index to a survey's folder.
    ///
    /// # Errors
    /// Disk full, missing folder, or permission denied.
    pub(crate) fn write(&self, folder: &Path) -> std::io::Result<()> {
        write_whole(&folder.join(FILE), &serde_json::to_vec_pretty(self)?)
    }

    /// Reads the index of a survey's folder; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, has another version, or names folders outside its own.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>, IndexError> {
        #[derive(Deserialize)]
        struct Versioned {
            schema: u32,
        }
        let damaged = |why: String| IndexError::Damaged(format!("{FILE}: {why}"));
        let text =
            absent(read_small(&folder.join(FILE), MAX_FILE_BYTES)).map_err(|error| damaged(error.to_string()))?;
        let Some(text) = text else { return Ok(None) };
        let Versioned { schema } = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if schema != SCHEMA {
            let why = format!("{FILE} has schema {schema}, this program reads {SCHEMA}");
            return Err(IndexError::Version(why));
        }
        let index: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let outside = |line: &&IndexEntry| !line.folder.iter().chain([&line.name]).all(|name| is_plain_name(name));
        match index.models.iter().find(outside) {
            Some(line) => Err(damaged(format!("`{}` is not in its folder", line.name))),
            None => Ok(Some(index)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, outcome: ModelOutcome) -> IndexEntry {
        IndexEntry {
            name: name.into(),
            model: "owner/model".into(),
            job_key: "k".into(),
            run: Some("r".into()),
            outcome,
            folder: Some(name.into()),
            why: None,
        }
    }

    #[test]
    fn index_round_trips_and_damage_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Index::read(folder.path()), Ok(None));
        let models = vec![line("a", ModelOutcome::Complete), line("b", ModelOutcome::Failed)];
        let index = Index { schema: SCHEMA, survey: "s".into(), file: "/s.toml".into(), models };
        index.write(folder.path()).unwrap();
        assert_eq!(Index::read(folder.path()), Ok(Some(index.clone())));
        let outside = Index { models: vec![line("../a", ModelOutcome::Complete)], ..index.clone() };
        outside.write(folder.path()).unwrap();
        assert!(matches!(Index::read(folder.path()), Err(IndexError::Damaged(why)) if why.contains("../a")));
        let newer = serde_json::json!({ "schema": SCHEMA + 1 });
        std::fs::write(folder.path().join(FILE), newer.to_string()).unwrap();
        assert!(matches!(Index::read(folder.path()), Err(IndexError::Version(_))));
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(matches!(Index::read(folder.path()), Err(IndexError::Damaged(_))));
    }
}
