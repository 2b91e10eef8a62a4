//! Reads and verifies result folders: complete, unchanged, of a supported version, and consistent.
//!
//! An invalid folder is never ignored silently: [`read_all`] names every such folder and returns
//! no figures, unless it is told to continue without them. In a survey's folder the index decides
//! which results belong to it; a model without results is named, too.

use std::fs;
use std::path::{Path, PathBuf};

use outliers_protocol::{Axis, Manifest, Metadata, Reading, Results, SCHEMA, files};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::bootstrap::SequenceTotals;
use super::predecessor::Imported;
use super::samples;
use super::statistics::{Statistics, StudyShape};
use crate::files::{digest, is_plain_name, read_small, sha256};
use crate::run::deploy::holds;
use crate::survey::ModelOutcome;
use crate::survey::index::{Index, IndexEntry, IndexError};
use crate::text::clean;

/// Document of an imported run, instead of [`files::RESULTS`].
pub(crate) const IMPORTED: &str = "imported.json";

/// Any of them makes a folder one of results, whole or not.
pub(crate) const MARKS: [&str; 5] = [files::MANIFEST, files::RESULTS, IMPORTED, files::JOB, files::PROGRESS];

/// Maximum bytes of a file. Statistics of the largest models have a tenth of it.
const LARGEST: u64 = 1 << 30;

/// Maximum depth of results in a folder: `<survey>/<model>/`.
const DEPTH: usize = 2;

#[derive(Clone, Debug)]
pub(crate) struct ResultFolder {
    pub(crate) path: PathBuf,
    /// Its content, or why it is unusable.
    pub(crate) content: Result<Content, Flaw>,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A run of this program.
    Run(Box<Run>),
    /// An imported run of another program.
    Imported(Box<Imported>),
}

/// A complete run of this program.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// SHA-256 of the job as run: equal for runs with the same request.
    pub(crate) job_sha256: String,
    /// What was counted.
    pub(crate) results: Results,
    /// Provenance of the numbers.
    pub(crate) metadata: Metadata,
    /// The counts behind the results; `None` if the manifest does not list the file.
    pub(crate) statistics: Option<Statistics>,
    /// Totals of systematic features within each sequence, by [`Axis::Layers`] and by
    /// [`Axis::Sites`]; `None` without statistics.
    pub(crate) tallies: Option<[Vec<SequenceTotals>; 2]>,
}

/// Why a result is unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Flaw {
    /// The run did not complete, or its results are not saved yet.
    #[error("partial: {0}")]
    Partial(String),
    /// A file differs from its original.
    #[error("damaged: {0}")]
    Damaged(String),
    /// Written by another version of this program.
    #[error("of another version: {0}")]
    Version(String),
}

/// Why results cannot be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("{}: {why}", path.display())]
    Unreadable { path: PathBuf, why: String },
    #[error("no results in {}", list(.0))]
    Nothing(Vec<PathBuf>),
    #[error("{}", flawed(.0))]
    Flawed(Vec<(PathBuf, Flaw)>),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn flawed(folders: &[(PathBuf, Flaw)]) -> String {
    let lines = folders.iter().map(|(path, flaw)| format!("{} is {flaw}", path.display()));
    lines.collect::<Vec<_>>().join("; ")
}

/// Reads the results in these folders and below, sorted by name, each once.
///
/// # Errors
/// A folder cannot be read, there are no results, or, without `allow_partial`, some are unusable.
pub(crate) fn read_all(folders: &[PathBuf], allow_partial: bool) -> Result<Vec<ResultFolder>, ReadError> {
    judged(find_all(folders)?, allow_partial)
}

/// Reads the results in or below a folder without those that are partial by their name or, unless
/// `allow_partial`, by the index of their survey, unless there are no others; gives the paths of
/// those, too.
///
/// # Errors
/// As [`read_all`].
pub(crate) fn read_whole(folder: &Path, allow_partial: bool) -> Result<(Vec<ResultFolder>, Vec<PathBuf>), ReadError> {
    let is_partial = |found: &FoundFolder| {
        let by_name = found.path.extension().is_some_and(|extension| extension == "partial");
        by_name || (!allow_partial && matches!(found.flaw, Some(Flaw::Partial(_))))
    };
    let found = find_all(&[folder.to_owned()])?;
    let (partial, whole): (Vec<FoundFolder>, Vec<FoundFolder>) = found.into_iter().partition(is_partial);
    if whole.is_empty() {
        return Ok((judged(partial, allow_partial)?, Vec::new()));
    }
    Ok((judged(whole, allow_partial)?, partial.into_iter().map(|found| found.path).collect()))
}

/// The result folders in these folders and below, sorted by name, each once, without reading them;
/// may be empty.
///
/// # Errors
/// A folder cannot be read.
pub(crate) fn paths(folders: &[PathBuf]) -> Result<Vec<PathBuf>, ReadError> {
    match find_all(folders) {
        Ok(found) => Ok(found.into_iter().map(|found| found.path).collect()),
        Err(ReadError::Nothing(_)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Sorted by name, each once; at least one.
fn find_all(folders: &[PathBuf]) -> Result<Vec<FoundFolder>, ReadError> {
    let mut found = Vec::new();
    for folder in folders {
        find(folder, DEPTH, &mut found)?;
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found.dedup_by(|a, b| a.path == b.path);
    if found.is_empty() { Err(ReadError::Nothing(folders.to_vec())) } else { Ok(found) }
}

fn judged(found: Vec<FoundFolder>, allow_partial: bool) -> Result<Vec<ResultFolder>, ReadError> {
    let judge = |FoundFolder { path, flaw }| {
        let content = flaw.map_or_else(|| read(&path), Err);
        ResultFolder { path, content }
    };
    let read: Vec<ResultFolder> = found.into_iter().map(judge).collect();
    let flaws: Vec<(PathBuf, Flaw)> =
        read.iter().filter_map(|folder| Some((folder.path.clone(), folder.content.as_ref().err()?.clone()))).collect();
    if flaws.is_empty() || allow_partial { Ok(read) } else { Err(ReadError::Flawed(flaws)) }
}

/// A folder with results, or an expected one.
struct FoundFolder {
    path: PathBuf,
    /// Why it is unusable, if known without reading it.
    flaw: Option<Flaw>,
}

/// Result folders at `folder` or at most `depth` below it.
fn find(folder: &Path, depth: usize, found: &mut Vec<FoundFolder>) -> Result<(), ReadError> {
    if MARKS.iter().any(|name| folder.join(name).exists()) {
        found.push(FoundFolder { path: folder.to_owned(), flaw: None });
        return Ok(());
    }
    match Index::read(folder) {
        Ok(None) => {}
        Ok(Some(index)) => {
            found.extend(index.models.iter().map(|line| surveyed(folder, line)));
            return Ok(());
        }
        Err(IndexError::Damaged(why)) => {
            found.push(FoundFolder { path: folder.to_owned(), flaw: Some(Flaw::Damaged(why)) });
            return Ok(());
        }
        Err(IndexError::Version(why)) => {
            found.push(FoundFolder { path: folder.to_owned(), flaw: Some(Flaw::Version(why)) });
            return Ok(());
        }
    }
    let unreadable = |error: std::io::Error| ReadError::Unreadable { path: folder.to_owned(), why: error.to_string() };
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if depth > 0 && path.is_dir() {
            find(&path, depth - 1, found)?;
        }
    }
    Ok(())
}

/// A model of a survey, by the index and its folder.
fn surveyed(folder: &Path, line: &IndexEntry) -> FoundFolder {
    let path = folder.join(line.folder.as_ref().unwrap_or(&line.name));
    let why = clean(line.why.as_deref().unwrap_or_default().as_bytes(), 500);
    let flaw = match (line.outcome, &line.run) {
        (ModelOutcome::Complete, Some(run)) => holds(&path, run).err().map(Flaw::Damaged),
        (ModelOutcome::Complete, None) => {
            Some(Flaw::Damaged("the survey's index does not say of which run it is".to_owned()))
        }
        (ModelOutcome::Open, _) => Some(Flaw::Partial("the survey has not got to its end".to_owned())),
        (ModelOutcome::Partial | ModelOutcome::Failed, _) => {
            Some(Flaw::Partial(format!("its run in the survey failed: {why}")))
        }
    };
    FoundFolder { path, flaw }
}

/// Reads one folder.
///
/// # Errors
/// The reason why it is unusable.
pub(crate) fn read(folder: &Path) -> Result<Content, Flaw> {
    if folder.extension().is_some_and(|extension| extension == "part") {
        return Err(Flaw::Partial("it is still arriving".to_owned()));
    }
    let manifest = vouched(folder)?;
    let names = |name: &str| manifest.files.iter().any(|file| file.name == name);
    if names(IMPORTED) {
        let imported: Imported = document(folder, IMPORTED)?;
        imported.check().map_err(|why| Flaw::Damaged(format!("{IMPORTED}: {why}")))?;
        return Ok(Content::Imported(Box::new(imported)));
    }
    let missing = [files::RESULTS, files::METADATA].into_iter().find(|name| !names(name));
    if let Some(name) = missing {
        return Err(Flaw::Damaged(format!("its manifest does not name {name}")));
    }
    Ok(Content::Run(Box::new(run(folder, names(files::STATISTICS))?)))
}

/// The manifest of a complete run with all files verified.
fn vouched(folder: &Path) -> Result<Manifest, Flaw> {
    if !folder.join(files::MANIFEST).exists() {
        return Err(Flaw::Partial("the run ended early, without manifest.json".to_owned()));
    }
    let manifest: Manifest = document(folder, files::MANIFEST)?;
    if let outliers_protocol::Outcome::Failed(failure) = &manifest.outcome {
        return Err(Flaw::Partial(format!("the run failed: {}", clean(failure.message.as_bytes(), 500))));
    }
    for file in &manifest.files {
        if !is_plain_name(&file.name) {
            return Err(Flaw::Damaged("its manifest names a file outside the folder".to_owned()));
        }
        let path = folder.join(&file.name);
        let unread = |error: std::io::Error| Flaw::Damaged(format!("{} cannot be read: {error}", file.name));
        // The size is checked first, which avoids hashing a large other file.
        let size = fs::metadata(&path).map_err(unread)?.len();
        if size != file.bytes || digest(&path).map_err(unread)? != (file.bytes, file.sha256.clone()) {
            return Err(Flaw::Damaged(format!("{} is not the file that its manifest names", file.name)));
        }
    }
    Ok(manifest)
}

#[derive(Deserialize)]
struct Versioned {
    schema: u32,
}

/// Reads a document of a supported version.
fn document<T: DeserializeOwned>(folder: &Path, name: &str) -> Result<T, Flaw> {
    let wrong = |why: String| Flaw::Damaged(format!("{name}: {why}"));
    let text = content(&folder.join(name)).map_err(wrong)?;
    // The version is parsed first, since another version may lack fields.
    let Versioned { schema } = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    if schema != SCHEMA {
        return Err(Flaw::Version(format!("{name} has schema {schema}, this program reads {SCHEMA}")));
    }
    serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))
}

/// Reads a file of limited size.
fn content(path: &Path) -> Result<Vec<u8>, String> {
    read_small(path, LARGEST).map_err(|error| error.to_string())
}

fn run(folder: &Path, with_statistics: bool) -> Result<Run, Flaw> {
    let results: Results = document(folder, files::RESULTS)?;
    let metadata: Metadata = document(folder, files::METADATA)?;
    agree(&results, &metadata).map_err(|why| Flaw::Damaged(format!("{}: {why}", files::RESULTS)))?;
    let job = serde_json::to_vec(&metadata.job).expect("a job holds no maps with keys other than strings");
    let wrong = |why: String| Flaw::Damaged(format!("{}: {why}", files::STATISTICS));
    let statistics = match with_statistics {
        false => None,
        true => {
            let bytes = content(&folder.join(files::STATISTICS)).map_err(wrong)?;
            let shape = StudyShape { sites: results.n_sites, sequences: results.sequences, hidden: results.hidden };
            Some(Statistics::read(&bytes, shape).map_err(wrong)?)
        }
    };
    let tallies = statistics.as_ref().map(|statistics| SequenceTotals::of_run(statistics, &results));
    if let Some(tallies) = &tallies {
        same_counts(tallies, &results).map_err(wrong)?;
    }
    Ok(Run { job_sha256: sha256(&job), results, metadata, statistics, tallies })
}

/// Checks that the documents of a run are consistent.
fn agree(results: &Results, metadata: &Metadata) -> Result<(), String> {
    let corpus = &metadata.corpus;
    let lengths = [
        ("sequences", results.per_sequence.len(), results.sequences),
        ("sequences of the metadata", corpus.sequences, results.sequences),
        ("tokens of the metadata", corpus.tokens_per_sequence, results.tokens_per_sequence),
        ("norm outputs", results.sites.len(), results.n_sites),
        ("layers with norm outputs", layers(results).len(), results.n_layers),
    ];
    if let Some((what, is, expected)) = lengths.into_iter().find(|(_, is, expected)| is != expected) {
        return Err(format!("{is} {what}, where it counts {expected}"));
    }
    for reading in [Reading::Unique, Reading::MeanPerSequence, Reading::SumOverSequences] {
        for axis in [Axis::Layers, Axis::Sites] {
            let counted = recount(results, reading, axis);
            let verdicts = results.verdicts.iter().filter(|verdict| (verdict.reading, verdict.axis) == (reading, axis));
            let counts: Vec<f64> = verdicts.map(|verdict| verdict.count).collect();
            if counts != [counted] {
                return Err(format!("its verdicts say {counts:?} where its features and sequences come to {counted}"));
            }
        }
    }
    let fits = |feature: &outliers_protocol::Feature| feature.dim < results.hidden;
    match results.features.iter().all(fits) {
        true => samples::check(results),
        false => Err("a feature lies outside the hidden size".to_owned()),
    }
}

/// The layers with studied norm outputs, in order.
pub(super) fn layers(results: &Results) -> Vec<usize> {
    let mut layers: Vec<usize> = results.sites.iter().map(|site| site.layer).collect();
    layers.dedup();
    layers
}

/// A verdict's count, recomputed from the features or from the sequences.
fn recount(results: &Results, reading: Reading, axis: Axis) -> f64 {
    let unique = results.features.iter().filter(|feature| match axis {
        Axis::Layers => feature.systematic_by_layers,
        Axis::Sites => feature.systematic_by_sites,
    });
    let sum = results
        .per_sequence
        .iter()
        .map(|sequence| match axis {
            Axis::Layers => sequence.systematic_by_layers,
            Axis::Sites => sequence.systematic_by_sites,
        })
        .fold(0, usize::saturating_add);
    match reading {
        Reading::Unique => unique.count() as f64,
        Reading::SumOverSequences => sum as f64,
        Reading::MeanPerSequence => sum as f64 / results.sequences.max(1) as f64,
    }
}

/// Checks the results of each sequence against the stored counts.
fn same_counts([by_layers, by_sites]: &[Vec<SequenceTotals>; 2], results: &Results) -> Result<(), String> {
    for ((sequence, layers), sites) in results.per_sequence.iter().zip(by_layers).zip(by_sites) {
        let said = (sequence.systematic_by_layers, sequence.systematic_by_sites);
        if said != (layers.features, sites.features) {
            return Err(format!("sequence {} comes to other counts than {} says", sequence.sequence, files::RESULTS));
        }
    }
    Ok(())
}

#[cfg(test)]
impl Run {
    pub(super) fn fixture(name: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        match read(&super::fixture::copy(name, &home.path().join("r"))).unwrap() {
            Content::Run(run) => *run,
            Content::Imported(_) => unreachable!("fixtures are runs"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::fixture::{change, copy};
    use super::*;
    use crate::run::ledger::RUN_FILE;

    fn mixture() -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let folder = copy("mixture", &home.path().join("m-r"));
        (home, folder)
    }

    #[test]
    fn real_result_is_read_with_all_counts() {
        let (_home, folder) = mixture();
        let Ok(Content::Run(run)) = read(&folder) else { panic!("{:?}", read(&folder)) };
        let (statistics, [by_layers, by_sites]) = (run.statistics.unwrap(), run.tallies.unwrap());
        let total: u64 = statistics.count.rows().flatten().sum();
        assert_eq!(total, run.results.total_occurrences);
        for (tallies, axis) in [(by_layers, Axis::Layers), (by_sites, Axis::Sites)] {
            let verdict =
                run.results.verdicts.iter().find(|v| (v.reading, v.axis) == (Reading::SumOverSequences, axis));
            let (verdict, features) = (verdict.unwrap(), tallies.iter().map(|t| t.features).sum::<usize>());
            let mean = |of: fn(&SequenceTotals) -> f64| 100.0 * tallies.iter().map(of).sum::<f64>() / features as f64;
            assert_eq!(verdict.count, features as f64);
            assert!((verdict.mean_layer_percent.unwrap() - mean(|t| t.layer_share)).abs() < 1e-9);
            assert!((verdict.mean_sequence_percent.unwrap() - mean(|t| t.position_share)).abs() < 1e-9);
        }
    }

    #[test]
    fn folders_are_found_by_survey_and_model_once_each() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        copy("dense", &at("z"));
        copy("mixture", &at("survey/a"));
        fs::create_dir_all(at("notes/deep/er")).unwrap();
        fs::write(at("README.md"), "x").unwrap();
        let read = read_all(&[home.path().to_owned(), at("survey"), at("z")], false).unwrap();
        let paths: Vec<_> = read.iter().map(|folder| folder.path.clone()).collect();
        assert_eq!(paths, [at("survey/a"), at("z")]);
        assert!(matches!(read_all(&[at("notes")], true), Err(ReadError::Nothing(_))));
        assert!(matches!(read_all(&[at("nowhere")], true), Err(ReadError::Unreadable { .. })));
    }

    #[test]
    fn bad_folder_is_an_error_unless_partial_is_allowed() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        copy("dense", &at("good"));
        fs::remove_file(copy("mixture", &at("cut.partial")).join(files::MANIFEST)).unwrap();
        copy("mixture", &at("coming.part"));
        let all = [home.path().to_owned()];
        let error = read_all(&all, false).unwrap_err().to_string();
        assert!(error.contains("cut.partial is partial") && error.contains("coming.part is partial"), "{error}");
        let read = read_all(&all, true).unwrap();
        assert_eq!(read.iter().map(|folder| folder.content.is_ok()).collect::<Vec<_>>(), [false, false, true]);
    }

    #[test]
    fn partial_folders_are_skipped_and_named_unless_alone() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        fs::remove_file(copy("mixture", &at("s/cut.partial")).join(files::MANIFEST)).unwrap();
        let error = read_whole(home.path(), false).unwrap_err().to_string();
        assert!(error.contains("cut.partial is partial"), "{error}");
        copy("dense", &at("good-1.5"));
        let (read, left_out) = read_whole(home.path(), false).unwrap();
        assert_eq!(read.iter().map(|folder| folder.path.clone()).collect::<Vec<_>>(), [at("good-1.5")]);
        assert_eq!(left_out, [at("s/cut.partial")]);
    }

    #[test]
    fn survey_index_decides_its_members() {
        let home = tempfile::tempdir().unwrap();
        let survey = home.path().join("survey");
        for (name, run) in [("a", "run-a"), ("b", "run-b")] {
            let folder = copy("mixture", &survey.join(name));
            fs::write(folder.join(RUN_FILE), json!({ "id": run }).to_string()).unwrap();
        }
        fs::create_dir_all(survey.join("b-old.partial")).unwrap();
        let line = |name: &str, outcome, run: Option<&str>| IndexEntry {
            name: name.into(),
            model: "owner/model".into(),
            job_key: "k".into(),
            run: run.map(str::to_owned),
            outcome,
            folder: None,
            why: Some("its weights are \u{1b}[2Jbroken".into()),
        };
        let with = |models: Vec<IndexEntry>| {
            Index { schema: crate::survey::index::SCHEMA, survey: "s".into(), file: "/s.toml".into(), models }
                .write(&survey)
                .unwrap();
            read_all(&[home.path().to_owned()], false)
        };
        let whole = with(vec![
            line("a", ModelOutcome::Complete, Some("run-a")),
            line("b", ModelOutcome::Complete, Some("run-b")),
        ]);
        assert_eq!(whole.unwrap().len(), 2, "what failed before is not asked");
        for (other, word) in [
            (
                line("c", ModelOutcome::Failed, Some("run-c")),
                "c is partial: its run in the survey failed: its weights are broken",
            ),
            (line("c", ModelOutcome::Open, None), "c is partial: the survey has not"),
            (line("b", ModelOutcome::Complete, Some("run-c")), "b is damaged"),
            (line("c", ModelOutcome::Complete, Some("run-c")), "c is damaged"),
            (line("b", ModelOutcome::Complete, None), "b is damaged"),
        ] {
            let error = with(vec![line("a", ModelOutcome::Complete, Some("run-a")), other]).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let _ = with(vec![line("a", ModelOutcome::Complete, Some("run-a")), line("c", ModelOutcome::Open, None)]);
        let (read, left_out) = read_whole(home.path(), false).unwrap();
        assert_eq!((read.len(), left_out), (1, vec![survey.join("c")]));
        assert_eq!(read_whole(home.path(), true).unwrap().0.len(), 2, "it is named, without figures");
        fs::write(survey.join("index.json"), "{").unwrap();
        let error = read_all(std::slice::from_ref(&survey), false).unwrap_err().to_string();
        assert!(error.contains("survey is damaged: index.json"), "{error}");
    }

    #[test]
    fn changed_byte_in_any_file_is_damage() {
        for name in [files::RESULTS, files::METADATA, files::STATISTICS, files::JOB] {
            let (_home, folder) = mixture();
            let mut bytes = fs::read(folder.join(name)).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(folder.join(name), &bytes).unwrap();
            let Err(Flaw::Damaged(why)) = read(&folder) else { panic!("{name}: {:?}", read(&folder)) };
            assert!(why.contains(name), "{why}");
            fs::remove_file(folder.join(name)).unwrap();
            assert!(matches!(read(&folder), Err(Flaw::Damaged(why)) if why.contains(name)));
        }
    }

    #[test]
    fn contradicting_documents_are_damage() {
        type Change = (&'static str, fn(&mut Value), &'static str);
        let changes: [Change; 9] = [
            (files::RESULTS, |r| r["verdicts"][0]["count"] = json!(99.0), "verdicts"),
            (files::RESULTS, |r| r["verdicts"] = json!([]), "verdicts"),
            (files::RESULTS, |r| r["sequences"] = json!(7), "sequences"),
            (files::RESULTS, |r| r["features"][0]["dim"] = json!(64), "hidden"),
            (files::RESULTS, |r| r["hidden"] = json!(63), files::STATISTICS),
            (files::RESULTS, |r| r["n_layers"] = json!(1u64 << 50), "layers"),
            (files::RESULTS, |r| r["per_sequence"][0]["systematic_by_sites"] = json!(u64::MAX), "verdicts"),
            (files::RESULTS, |r| r["thresholds"]["layer_fraction"] = json!(0.9), "each sequence"),
            (files::METADATA, |m| m["corpus"]["tokens_per_sequence"] = json!(1), "tokens"),
        ];
        for (name, how, expected) in changes {
            let (_home, folder) = mixture();
            change(&folder, name, how);
            let Err(Flaw::Damaged(why)) = read(&folder) else { panic!("{expected}: it passes") };
            assert!(why.contains(expected), "{expected}: {why}");
        }
    }

    #[test]
    fn other_versions_and_failed_runs_are_not_damage() {
        let (_home, folder) = mixture();
        change(&folder, files::RESULTS, |results| *results = json!({"schema": SCHEMA + 1}));
        assert!(matches!(read(&folder), Err(Flaw::Version(why)) if why.contains(files::RESULTS)));
        let failed = json!({"schema": SCHEMA, "files": [], "outcome": {"failed": {"kind": "corpus", "message": "no \u{1b}[2Jtext"}}});
        fs::write(folder.join(files::MANIFEST), failed.to_string()).unwrap();
        assert_eq!(read(&folder).unwrap_err(), Flaw::Partial("the run failed: no text".to_owned()));
        let outside =
            json!({"schema": SCHEMA, "files": [{"name": "../x", "bytes": 0, "sha256": ""}], "outcome": "complete"});
        fs::write(folder.join(files::MANIFEST), outside.to_string()).unwrap();
        assert!(matches!(read(&folder), Err(Flaw::Damaged(why)) if why.contains("outside")));
    }
}
