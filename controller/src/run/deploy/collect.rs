//! Saves results on this machine: names their folder, verifies them against manifest and job, and
//! renames them into place.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use outliers_protocol::{CorpusFormat, CorpusSource, JobSpec, Manifest, ModelSource, Outcome, SCHEMA, Weights, files};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::files::{digest, is_plain_name, read_json, rename_folder};
use crate::host::unfinished;
use crate::run::ledger::RUN_FILE;
use crate::run::{FailureDetail, RunFailureKind, RunOutcome, RunSpec, SavedResults};

/// Folders of a run's files. A folder with the first name always contains complete results.
#[derive(Clone, Debug)]
pub(super) struct Folders {
    /// Complete results.
    pub(super) whole: PathBuf,
    /// Partial results.
    pub(super) partial: PathBuf,
    /// Results that are being fetched.
    pub(super) arriving: PathBuf,
}

impl Folders {
    /// The folders of a run in this parent folder.
    pub(super) fn of(below: &Path, spec: &RunSpec, run: &str) -> Self {
        let name = format!("{}-{run}", slug(&spec.model));
        // In a survey's folder each model has one name, which only complete results get.
        let survey = spec.survey.as_ref().filter(|_| below == Path::new(&spec.results));
        let whole = survey.map_or(&name, |survey| &survey.model);
        Self {
            whole: below.join(whole),
            partial: below.join(format!("{name}.partial")),
            arriving: below.join(format!("{name}.part")),
        }
    }
}

/// A model's name as part of a file name: `owner--name`, or a folder's last part.
pub fn slug(model: &str) -> String {
    let path = Path::new(model);
    let name = if path.is_absolute() || model.starts_with('.') {
        path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
    } else {
        model.trim_matches('/').replace('/', "--")
    };
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).take(80).collect();
    if name.starts_with('.') { name.replacen('.', "_", 1) } else { name }
}

/// Verifies fetched files by the manifest and moves them to their folder. Returns the outcome.
pub(super) fn settle(
    folders: &Folders,
    manifest: Option<&Manifest>,
    exit: Option<i32>,
) -> io::Result<(SavedResults, RunOutcome)> {
    let (ending, complete) = judge(&folders.arriving, manifest, exit);
    let place = if complete { &folders.whole } else { &folders.partial };
    move_over(&folders.arriving, place)?;
    Ok((SavedResults { folder: place.to_string_lossy().into_owned(), complete }, ending))
}

/// Results that an earlier process moved into place without recording it.
pub(super) fn already_home(folders: &Folders, run: &str) -> Option<(SavedResults, RunOutcome)> {
    let complete = holds(&folders.whole, run).is_ok();
    complete.then(|| {
        (SavedResults { folder: folders.whole.to_string_lossy().into_owned(), complete }, RunOutcome::Completed)
    })
}

/// Removes incomplete downloads.
pub(super) fn clear(folders: &Folders) {
    for folder in [unfinished(&folders.arriving), folders.arriving.clone()] {
        // The folder may not exist.
        let _ = fs::remove_dir_all(folder);
    }
}

fn document<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    read_json(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Checks that `folder` contains the complete results of this run.
///
/// # Errors
/// The reason, as text.
pub fn holds(folder: &Path, run: &str) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Owner {
        id: String,
    }
    let Owner { id } = document(&folder.join(RUN_FILE))?;
    if id != run {
        return Err(format!("{} holds the results of run {id}", folder.display()));
    }
    let manifest: Manifest = document(&folder.join(files::MANIFEST))?;
    match judge(folder, Some(&manifest), None) {
        (_, true) => Ok(()),
        (ending, false) => Err(ending.to_string()),
    }
}

fn judge(folder: &Path, manifest: Option<&Manifest>, exit: Option<i32>) -> (RunOutcome, bool) {
    let Some(manifest) = manifest else { return (RunOutcome::WorkerVanished { exit }, false) };
    if let Outcome::Failed(failure) = &manifest.outcome {
        return (RunOutcome::WorkerFailed { failure: failure.clone() }, false);
    }
    match verify(folder, manifest).and_then(|()| same_job(folder)) {
        Ok(()) => (RunOutcome::Completed, true),
        Err(message) => {
            let hint = Some(format!("what arrived is kept; see {}", files::LOG));
            (RunOutcome::Failed { trouble: FailureDetail { kind: RunFailureKind::Host, message, hint } }, false)
        }
    }
}

/// Checks size and hash of every file of the manifest in `folder`.
pub(super) fn verify(folder: &Path, manifest: &Manifest) -> Result<(), String> {
    if manifest.schema != SCHEMA {
        return Err(format!("the worker's documents have version {}; this program knows {SCHEMA}", manifest.schema));
    }
    for needed in [files::RESULTS, files::METADATA] {
        if !manifest.files.iter().any(|file| file.name == needed) {
            return Err(format!("the worker's manifest does not name {needed}"));
        }
    }
    for file in &manifest.files {
        if !is_plain_name(&file.name) {
            return Err("the worker's manifest names a file outside its folder".to_owned());
        }
        let (bytes, sha256) =
            digest(&folder.join(&file.name)).map_err(|e| format!("{} did not arrive: {e}", file.name))?;
        if (bytes, &sha256) != (file.bytes, &file.sha256) {
            return Err(format!("{} did not arrive whole: size or hash differ from the manifest", file.name));
        }
    }
    Ok(())
}

/// Checks that the results are of the job in the run's record.
fn same_job(folder: &Path) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Record {
        spec: Option<Of>,
    }
    #[derive(Deserialize)]
    struct Of {
        job: JobSpec,
    }
    let Record { spec: Some(Of { job: sent }) } = document(&folder.join(RUN_FILE))? else { return Ok(()) };
    let Of { job: mut ran } = document(&folder.join(files::METADATA))?;
    if sent.devices.is_empty() {
        // The GPU names were added when the job was sent to the instance.
        ran.devices.clear();
    }
    let other = differences(&placeless(&sent), &placeless(&ran));
    match other.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "the results are of another job than the one that was sent: {} and {RUN_FILE} differ in {}",
            files::METADATA,
            other.join(", ")
        )),
    }
}

/// The job without parts that differ between machines.
fn placeless(job: &JobSpec) -> Value {
    let mut job = JobSpec { label: None, ..job.clone() };
    if let ModelSource::Folder { path } = &mut job.model {
        path.clear();
    }
    if let Some(Weights::Local { path }) = &mut job.weights {
        path.clear();
    }
    match &mut job.corpus.source {
        CorpusSource::Files(paths) => paths.iter_mut().for_each(|path| *path = CorpusFormat::of(path).to_string()),
        CorpusSource::TokenIds(path) => path.clear(),
        CorpusSource::Builtin(_) | CorpusSource::Dataset(_) => {}
    }
    serde_json::to_value(job).unwrap_or_default()
}

/// Names of the parts that differ between two documents.
fn differences(sent: &Value, ran: &Value) -> Vec<String> {
    let parts = |document: &Value| -> Vec<String> {
        document.as_object().into_iter().flatten().map(|(part, _)| part.clone()).collect()
    };
    let (mut all, others) = (parts(sent), parts(ran));
    all.extend(others.into_iter().filter(|part| sent.get(part).is_none()));
    all.retain(|part| !same(&sent[part.as_str()], &ran[part.as_str()]));
    all
}

/// Compares values. Fractions may differ in the last digits after conversion to text.
fn same(sent: &Value, ran: &Value) -> bool {
    match (sent, ran) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| same(value, other)))
        }
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let (a, b) = (a.as_f64().unwrap_or_default(), b.as_f64().unwrap_or_default());
            (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
        }
        _ => sent == ran,
    }
}

/// Renames a folder over another one, durably.
fn move_over(from: &Path, to: &Path) -> io::Result<()> {
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    rename_folder(from, to)
}

/// Creates an empty folder at `path`.
pub(super) fn empty_folder(path: &Path) -> io::Result<()> {
    if path.exists() {
        fs::remove_dir_all(path)?;
    }
    fs::create_dir_all(path)
}

#[cfg(test)]
mod tests {
    use outliers_protocol::FileEntry;

    use super::*;

    fn entry(folder: &Path, name: &str, content: &[u8]) -> FileEntry {
        fs::write(folder.join(name), content).unwrap();
        let (bytes, sha256) = digest(&folder.join(name)).unwrap();
        FileEntry { name: name.into(), bytes, sha256 }
    }

    fn complete(folder: &Path) -> Manifest {
        let files = vec![entry(folder, files::RESULTS, b"{}"), entry(folder, files::METADATA, b"{\"a\":1}")];
        Manifest { schema: SCHEMA, outcome: Outcome::Complete, files }
    }

    #[test]
    fn slugs_are_plain_file_names() {
        for (model, expected) in [
            ("allenai/OLMoE-1B-7B-0125", "allenai--OLMoE-1B-7B-0125"),
            ("/tmp/some/tiny", "tiny"),
            ("./x y", "x_y"),
            ("../..", "model"),
            ("a/../../etc", "a--..--..--etc"),
            ("/tmp/.hidden", "_hidden"),
            ("gpt2", "gpt2"),
            ("\u{1b}[31mred", "__31mred"),
        ] {
            assert_eq!(slug(model), expected);
            assert_eq!(Path::new(&slug(model)).components().count(), 1);
        }
    }

    #[test]
    fn only_complete_results_pass_verification() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let good = complete(at);
        assert_eq!(verify(at, &good), Ok(()));

        let mut other = good.clone();
        other.schema += 1;
        assert!(verify(at, &other).unwrap_err().contains("version"));

        let mut outside = good.clone();
        for name in ["../secret", "/etc/passwd", "a/b", "..", ""] {
            outside.files[0].name = files::RESULTS.into();
            outside.files.push(FileEntry { name: name.into(), bytes: 0, sha256: String::new() });
            assert!(verify(at, &outside).unwrap_err().contains("outside"), "{name}");
            outside.files.pop();
        }

        let mut few = good.clone();
        few.files.remove(0);
        assert!(verify(at, &few).unwrap_err().contains(files::RESULTS));

        fs::write(at.join(files::RESULTS), b"[]").unwrap();
        assert!(verify(at, &good).unwrap_err().contains("whole"), "same size, other content");
        fs::remove_file(at.join(files::RESULTS)).unwrap();
        assert!(verify(at, &good).unwrap_err().contains("did not arrive"));
    }

    #[test]
    fn results_of_another_job_are_distinguished_from_moved_ones() {
        let folder = tempfile::tempdir().unwrap();
        let mut sent = JobSpec::new(ModelSource::Folder { path: "/home/me/model".into() });
        sent.corpus.source = CorpusSource::Files(vec!["/home/me/A.TXT".into(), "b.jsonl.gz".into()]);
        sent.thresholds.layer_fraction = 0.1 + 0.2;
        let judged = |ran: &JobSpec| {
            let at = folder.path();
            let write = |name: &str, document: Value| fs::write(at.join(name), document.to_string()).unwrap();
            write(RUN_FILE, serde_json::json!({ "id": "r", "spec": { "job": sent, "model": "m" } }));
            write(files::METADATA, serde_json::json!({ "schema": 1, "job": ran }));
            same_job(folder.path())
        };
        assert_eq!(judged(&sent), Ok(()));
        let mut there = sent.clone();
        there.model = ModelSource::Folder { path: "/root/outliers/r-input/model".into() };
        there.label = Some("/home/me/model".into());
        there.corpus.source = CorpusSource::Files(vec!["/x/corpus-0.txt".into(), "/x/corpus-1.jsonl.gz".into()]);
        there.devices = vec!["cuda:0".into()];
        assert_eq!(judged(&there), Ok(()), "the same work at another place");
        type Change = (&'static str, fn(&mut JobSpec));
        let changes: [Change; 5] = [
            ("model", |job| job.model = ModelSource::Hub { id: "a/b".into(), revision: "main".into() }),
            ("corpus", |job| job.corpus.num_sequences = Some(3)),
            ("corpus", |job| job.corpus.source = CorpusSource::Files(vec!["a.txt".into(), "b.txt".into()])),
            ("layers", |job| job.layers = Some(1)),
            ("thresholds", |job| job.thresholds.magnitude = 5.0),
        ];
        for (part, change) in changes {
            let mut other = there.clone();
            change(&mut other);
            let why = judged(&other).unwrap_err();
            assert!(why.contains("another job") && why.ends_with(&format!("differ in {part}")), "{why}");
        }
        fs::write(folder.path().join(files::METADATA), "{}").unwrap();
        assert!(same_job(folder.path()).unwrap_err().contains("job"));
    }

    #[test]
    fn survey_results_stay_in_the_survey_folder() {
        let survey = Some(crate::run::Membership { survey: "s".into(), model: "m".into() });
        let spec = RunSpec { survey, ..crate::run::deploy::tests::fake::spec(Path::new("/results/s")) };
        let whole = |below: &str| Folders::of(Path::new(below), &spec, "r").whole;
        assert_eq!(whole("/results/s"), Path::new("/results/s/m"));
        assert_eq!(whole("/elsewhere"), Path::new("/elsewhere/owner--model-r"));
    }

    #[test]
    fn results_move_atomically_and_partial_ones_keep_their_suffix() {
        let home = tempfile::tempdir().unwrap();
        let folders = Folders {
            whole: home.path().join("m-r"),
            partial: home.path().join("m-r.partial"),
            arriving: home.path().join("m-r.part"),
        };
        empty_folder(&folders.arriving).unwrap();
        fs::write(folders.arriving.join("worker.log"), "x").unwrap();
        let (brought, ending) = settle(&folders, None, Some(9)).unwrap();
        assert_eq!(ending, RunOutcome::WorkerVanished { exit: Some(9) });
        assert!(!brought.complete && folders.partial.join("worker.log").exists() && !folders.whole.exists());
        assert!(already_home(&folders, "r").is_none());

        empty_folder(&folders.arriving).unwrap();
        let manifest = complete(&folders.arriving);
        fs::write(folders.arriving.join(files::MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        fs::write(folders.arriving.join(RUN_FILE), r#"{"id":"r"}"#).unwrap();
        let (brought, ending) = settle(&folders, Some(&manifest), Some(0)).unwrap();
        assert!(brought.complete && !folders.arriving.exists());
        assert_eq!(ending, RunOutcome::Completed);
        assert_eq!(already_home(&folders, "r"), Some((brought, ending)));
        assert!(already_home(&folders, "another").is_none(), "a place in a survey may hold an earlier run's");
    }
}
