//! Files for other programs that a job can ask for (`--export`).

use serde::{Deserialize, Serialize};

use crate::named::named;
use crate::{SiteKind, files};

/// A kind of file for other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Export {
    /// llama.cpp's importance matrix: sums of x^2 and x over the inputs of every matrix.
    Imatrix,
    /// Largest |x| of every input of every matrix (SmoothQuant), and input scales of FP8 and
    /// NVFP4.
    ActScales,
    /// Saliency of every routed expert (REAP, arXiv 2510.13999), beside super experts.
    Reap,
}

named!(Export: Imatrix = "imatrix", ActScales = "act-scales", Reap = "reap");

impl Export {
    /// Names of its files in the results.
    pub fn files(self) -> &'static [&'static str] {
        match self {
            Self::Imatrix => &[files::IMATRIX],
            Self::ActScales => &[files::ACT_SCALES, files::INPUT_SCALES],
            Self::Reap => &[files::REAP],
        }
    }

    /// Kinds of sites that it needs; they are studied even if the job does not name them.
    pub fn needs(self) -> &'static [SiteKind] {
        match self {
            Self::Imatrix | Self::ActScales => &[],
            Self::Reap => &[SiteKind::ExpertOut],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_export_has_a_parsed_name_and_distinct_files() {
        let mut names: Vec<&str> = Vec::new();
        for export in Export::ALL {
            let name = serde_json::to_string(&export).unwrap();
            assert_eq!(name.trim_matches('"').replace('_', "-"), export.name());
            assert_eq!(export.name().parse::<Export>(), Ok(export));
            names.extend(export.files());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 4);
        let said = "imatrices".parse::<Export>().unwrap_err();
        assert!(said.contains("imatrix, act-scales, reap"), "{said}");
    }
}
