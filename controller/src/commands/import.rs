//! `import`: converts the predecessor's files to a result.

use std::fs;
use std::path::Path;

use outliers_protocol::{FileEntry, Manifest, Outcome, SCHEMA, files};
use serde::Serialize;

use super::Context;
use crate::cli::ImportArgs;
use crate::compare::folder::IMPORTED;
use crate::compare::predecessor::{Imported, import};
use crate::files::{read_json, sha256, write_whole};
use crate::run::deploy::slug;
use crate::run::ledger::now_ms;
use crate::text::counted;
use crate::ui::report::{CliError, ExitStatus};

pub(super) fn command(context: &Context, args: &ImportArgs) -> Result<ExitStatus, CliError> {
    let mut imported = import(&args.paths).map_err(|error| {
        CliError::refused(
            error.to_string(),
            "give the predecessor's final_analysis_results.json, perplexity_results.json, or their folders",
        )
    })?;
    // The name depends on the files, so that a repeated import makes one result.
    let hash = sha256(imported.sources.iter().map(|source| source.sha256.as_str()).collect::<String>().as_bytes());
    let usual = || context.settings.results.join(format!("{}-imported-{}", slug(&imported.model), &hash[..8]));
    let folder = args.output.as_ref().map_or_else(usual, |path| context.here.join(path));
    imported.imported_at_ms = first_imported(&folder).unwrap_or_else(now_ms);
    write(&folder, &imported).map_err(|error| CliError::failed(format!("{}: {error}", folder.display())))?;
    context.reporter.result(&imported, || in_words(&imported, &folder));
    Ok(ExitStatus::Done)
}

/// Time of the existing result's import, which preserves its number in comparisons.
fn first_imported(folder: &Path) -> Option<u64> {
    let known: Imported = read_json(&folder.join(IMPORTED)).ok()?;
    (known.imported_at_ms > 0).then_some(known.imported_at_ms)
}

/// Writes the document, then the manifest.
fn write(folder: &Path, imported: &Imported) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let document = json(imported);
    let entry = FileEntry { name: IMPORTED.to_owned(), bytes: document.len() as u64, sha256: sha256(&document) };
    write_whole(&folder.join(IMPORTED), &document)?;
    let manifest = Manifest { schema: SCHEMA, outcome: Outcome::Complete, files: vec![entry] };
    write_whole(&folder.join(files::MANIFEST), &json(&manifest))
}

fn json(document: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(document).expect("documents hold no maps with keys other than strings");
    text.push(b'\n');
    text
}

fn in_words(imported: &Imported, folder: &Path) -> String {
    let mut out = format!("{}\n", crate::text::clean(imported.model.as_bytes(), 200));
    if let Some(outliers) = &imported.outliers {
        for verdict in outliers.verdicts() {
            out += &format!("{}: {}\n", verdict.label, crate::compare::table::short(verdict.count));
        }
        let features = counted(outliers.distinct_features, "distinct feature");
        out += &format!("{features}, systematic in at least one batch\n");
    }
    if let Some(perplexity) = &imported.perplexity {
        out += &format!("perplexity {:.4}\n", perplexity.perplexity);
    }
    out + &format!("counted as: {}\nfiles: {}\n", imported.definition, folder.display())
}
