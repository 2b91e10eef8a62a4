//! Converts options to a job, and checks local models and files.

use std::path::{Path, PathBuf};

use outliers_protocol::{JobOptions, JobSpec, ModelSource, Weights};

use crate::cli::settings::JobRequest;
use crate::files::{MAX_FILE_BYTES, is_plain_name, read_text};
use crate::model_name::of_folder;
use crate::text::clean;
use crate::ui::report::CliError;

/// The revision of a model for which none is named.
const MAIN_BRANCH: &str = "main";
/// Most characters of a model's name.
const LONGEST_NAME: usize = 100;

/// The requested job, with absolute paths.
///
/// # Errors
/// The model is neither a folder nor a hub id; a file is missing.
pub(crate) fn job(asked: &JobRequest) -> Result<JobSpec, CliError> {
    let JobRequest { model, revision, options, here } = asked;
    let model = source(model, revision, here)?;
    if matches!(model, ModelSource::Folder { .. }) && revision != MAIN_BRANCH {
        let message = format!("--revision {revision}: the model is a folder, which has none");
        return Err(CliError::refused(message, "leave out --revision, or name a model of the hub (owner/name)"));
    }
    let label = match (&options.name, &model) {
        (Some(typed), _) => Some(name(typed)?),
        (None, ModelSource::Folder { path }) => of_folder(Path::new(path)),
        (None, ModelSource::Hub { .. }) => None,
    };
    let read = |file: &Path| read_text(&here.join(file), MAX_FILE_BYTES);
    let wrong = |why: String| {
        let features = "name features, or the results of a run that found some";
        let hint = if why.starts_with("--ablate") { features } else { "change that option" };
        CliError::refused(why, hint)
    };
    let job = placed(options.clone(), here)?.job(model, read).map_err(wrong)?;
    let job = JobSpec { label, ..job };
    check(&job)?;
    Ok(job)
}

/// The options with absolute paths of existing files.
fn placed(options: JobOptions, here: &Path) -> Result<JobOptions, CliError> {
    let weights = options.weights.map(|weights| weight_folder(weights, here)).transpose()?;
    let token_ids = options.token_ids.map(|path| file("--token-ids", &path, here)).transpose()?;
    let corpus = options.corpus.iter().map(|path| file("--corpus", path, here)).collect::<Result<_, _>>()?;
    Ok(JobOptions { weights, token_ids, corpus, ..options })
}

/// Checks options without the model.
fn check(job: &JobSpec) -> Result<(), CliError> {
    let zero =
        |name: &str| Err(CliError::refused(format!("--{name} must be at least 1"), "leave it out for the default"));
    if job.stream_budget_bytes == Some(0) {
        return zero("stream-budget");
    }
    if !job.export.is_empty() && job.ablation.is_some() {
        return Err(CliError::refused("--export and --ablate do not go together", "make two runs of it"));
    }
    match (job.corpus.num_sequences, job.corpus.sequence_length, job.layers, job.micro_batch_tokens) {
        (Some(0), ..) => zero("num-sequences"),
        (_, Some(0), ..) => zero("sequence-length"),
        (_, _, Some(0), _) => zero("layers"),
        (.., Some(0)) => zero("micro-batch-tokens"),
        _ => plain_name("save-activations", job.save_activations.as_deref())
            .and_then(|()| plain_name("trace", job.trace.as_deref())),
    }
}

/// Checks a model's display name, which must fit on a line of a table.
fn name(name: &str) -> Result<String, CliError> {
    match name.trim().is_empty() || clean(name.as_bytes(), LONGEST_NAME) != name {
        true => Err(CliError::refused(
            format!("--name takes 1 to {LONGEST_NAME} characters of plain text"),
            "leave it out for the model's own name",
        )),
        false => Ok(name.to_owned()),
    }
}

/// Checks a file name for the results.
fn plain_name(option: &str, name: Option<&str>) -> Result<(), CliError> {
    match name {
        Some(name) if !is_plain_name(name) => {
            Err(CliError::refused(format!("--{option} takes a plain file name"), "the file is saved with the results"))
        }
        _ => Ok(()),
    }
}

/// The absolute path of a folder with weights. A folder that is missing here may be on a cluster.
fn weight_folder(weights: Weights, here: &Path) -> Result<Weights, CliError> {
    let Weights::Local { path } = weights else { return Ok(weights) };
    if path.starts_with('/') && !Path::new(&path).exists() {
        return Ok(Weights::Local { path });
    }
    let found = here.join(&path).canonicalize().map_err(|error| {
        let hint = "give a folder of this machine with weight files; one of a Slurm cluster by its absolute path";
        CliError::refused(format!("--weights local:{path}: {error}"), hint)
    })?;
    Ok(Weights::Local { path: utf8(found)? })
}

/// An existing folder, or a string that looks like a path, is a folder; `owner/name` is a hub id.
fn source(model: &str, revision: &str, here: &Path) -> Result<ModelSource, CliError> {
    let path_like = model.starts_with(['/', '.', '~']) || model.ends_with('/');
    let path = here.join(model);
    if path_like || (!model.is_empty() && path.is_dir()) {
        let found = path.canonicalize().map_err(|error| {
            CliError::refused(
                format!("--model {model}: {error}"),
                "give a folder with config.json and safetensors files, or a hub id (owner/name)",
            )
        })?;
        return Ok(ModelSource::Folder { path: utf8(found)? });
    }
    let plain = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && part != ".."
    };
    match model.split('/').collect::<Vec<_>>()[..] {
        [owner, name] if plain(owner) && plain(name) => {
            Ok(ModelSource::Hub { id: model.to_owned(), revision: revision.to_owned() })
        }
        _ => Err(CliError::refused(
            format!("--model {model} is neither a folder nor a hub id"),
            "a hub id is written owner/name; a folder must exist",
        )),
    }
}

/// The absolute path of an input file.
fn file(option: &str, path: &Path, here: &Path) -> Result<PathBuf, CliError> {
    let wrong =
        |why: String| CliError::refused(format!("{option} {}: {why}", path.display()), "give a file that is there");
    let found = here.join(path).canonicalize().map_err(|error| wrong(error.to_string()))?;
    let meta = found.metadata().map_err(|error| wrong(error.to_string()))?;
    match (meta.is_file(), meta.len()) {
        (false, _) => Err(wrong("it is not a regular file".to_owned())),
        (true, 0) => Err(wrong("it is empty".to_owned())),
        (true, _) => utf8(found).map(PathBuf::from),
    }
}

fn utf8(path: PathBuf) -> Result<String, CliError> {
    path.into_os_string()
        .into_string()
        .map_err(|path| CliError::refused(format!("{}: its name is not UTF-8", path.to_string_lossy()), "rename it"))
}

#[cfg(test)]
mod tests {
    use outliers_protocol::{Ablate, Ablation, ByteSize, CorpusSource, SiteKind, SiteKinds};

    use super::*;

    fn made(name: &str, options: &JobOptions, here: &Path) -> Result<JobSpec, CliError> {
        let (model, revision, options) = (name.to_owned(), "main".to_owned(), options.clone());
        job(&JobRequest { model, revision, options, here: here.to_owned() })
    }

    #[test]
    fn models_are_hub_ids_or_folders() {
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(here.path().join("own/model")).unwrap();
        let none = JobOptions::default();
        for folder in ["own/model", "own/", "./own"] {
            let job = made(folder, &none, here.path()).unwrap();
            assert!(matches!(job.model, ModelSource::Folder { path } if Path::new(&path).is_absolute()));
        }
        let hub = made("allenai/OLMoE-1B-7B-0125", &none, here.path()).unwrap();
        assert!(matches!(hub.model, ModelSource::Hub { .. }));
        for wrong in ["", "gpt2", "a/b/c", "./missing", "/missing", "a/..", "a/b?x", "--x/y z"] {
            assert_eq!(made(wrong, &none, here.path()).unwrap_err().status.number(), 2, "{wrong}");
        }
    }

    #[test]
    fn revision_of_a_folder_is_refused() {
        let here = tempfile::tempdir().unwrap();
        let asked = |revision: &str| JobRequest {
            model: "./".to_owned(),
            revision: revision.to_owned(),
            options: JobOptions::default(),
            here: here.path().to_owned(),
        };
        assert!(job(&asked("main")).is_ok());
        let refused = job(&asked("v2")).unwrap_err();
        assert!(refused.status.number() == 2 && refused.message.contains("--revision v2"), "{}", refused.message);
    }

    #[test]
    fn norm_outputs_are_always_studied() {
        let with = |sites: &[&str]| {
            let sites = sites.iter().map(|text| text.parse().unwrap()).collect();
            let args = JobOptions { sites, ..JobOptions::default() };
            made("a/b", &args, Path::new("/")).unwrap().sites.into_iter().collect::<Vec<_>>()
        };
        assert_eq!(with(&[]), [SiteKind::Norms]);
        assert_eq!(with(&["expert-out", "residual"]), [SiteKind::Norms, SiteKind::Residual, SiteKind::ExpertOut]);
        assert_eq!(with(&["all", "norms"]), SiteKind::ALL);
        assert!("experts".parse::<SiteKinds>().is_err());
    }

    #[test]
    fn weights_option_selects_the_source() {
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir(here.path().join("w")).unwrap();
        let with = |text: &str| {
            let args = JobOptions { weights: Some(text.parse().unwrap()), ..JobOptions::default() };
            made("a/b", &args, here.path()).map(|job| job.weights)
        };
        let folder = here.path().canonicalize().unwrap().join("w");
        assert_eq!(with("local:w").unwrap(), Some(Weights::Local { path: folder.to_str().unwrap().to_owned() }));
        assert_eq!(with("local:missing").unwrap_err().status.number(), 2);
        assert_eq!(with("local:/no/such").unwrap(), Some(Weights::Local { path: "/no/such".to_owned() }));
        assert_eq!(with("synthetic:3").unwrap(), Some(Weights::Synthetic { seed: 3 }));
        assert_eq!(made("a/b", &JobOptions::default(), here.path()).unwrap().weights, None);
        let nothing = JobOptions { stream_budget: Some(ByteSize(0)), ..JobOptions::default() };
        assert_eq!(made("a/b", &nothing, here.path()).unwrap_err().status.number(), 2);
    }

    #[test]
    fn model_name_option_is_used() {
        let with = |name: &str| {
            let args = JobOptions { name: Some(name.into()), ..JobOptions::default() };
            made("a/b", &args, Path::new("/")).map(|job| job.model_name().to_owned())
        };
        assert_eq!(with("OLMoE, step 5").unwrap(), "OLMoE, step 5");
        let here = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(here.path().join("olmoe-step-5/model")).unwrap();
        let named = |model: &str| made(model, &JobOptions::default(), here.path()).unwrap().model_name().to_owned();
        assert_eq!(named("olmoe-step-5/model"), "olmoe-step-5");
        assert_eq!(named("owner/model"), "owner/model", "a hub id is one");
        assert!(named("olmoe-step-5").ends_with("/olmoe-step-5"));
        for wrong in ["", " ", "a\nb", "\u{1b}[2J", "n".repeat(101).as_str()] {
            assert_eq!(with(wrong).unwrap_err().status.number(), 2, "{wrong:?}");
        }
    }

    #[test]
    fn missing_or_empty_corpora_are_refused() {
        let here = tempfile::tempdir().unwrap();
        std::fs::write(here.path().join("text"), "words").unwrap();
        std::fs::write(here.path().join("empty"), "").unwrap();
        let with = |path: &str| JobOptions { corpus: vec![path.into()], ..JobOptions::default() };
        let job = made("a/b", &with("text"), here.path()).unwrap();
        assert!(matches!(&job.corpus.source, CorpusSource::Files(files) if files[0].ends_with("/text")));
        for wrong in ["empty", "missing", "."] {
            assert_eq!(made("a/b", &with(wrong), here.path()).unwrap_err().status.number(), 2);
        }
    }

    #[test]
    fn ablated_features_are_given_or_read_from_results() {
        let here = tempfile::tempdir().unwrap();
        let with = |text: &str| {
            let args =
                JobOptions { ablate: Some(text.parse().unwrap()), ablate_seed: Some(4), ..JobOptions::default() };
            made("a/b", &args, here.path()).map(|job| job.ablation.unwrap())
        };
        assert_eq!(with("7,3,7").unwrap(), Ablation { features: vec![3, 7], seed: 4 });
        std::fs::write(here.path().join("results.json"), "{}").unwrap();
        for wrong in ["nowhere", ".", "results.json"] {
            assert_eq!(with(wrong).unwrap_err().status.number(), 2, "{wrong}");
        }
        assert!("".parse::<Ablate>().is_err() && "1,,2".parse::<Ablate>().is_err());
    }

    #[test]
    fn ablation_with_export_is_refused() {
        let with = |ablate: Option<&str>| {
            let ablate = ablate.map(|text| text.parse().unwrap());
            let args = JobOptions { ablate, export: vec!["reap".parse().unwrap()], ..JobOptions::default() };
            made("a/b", &args, Path::new("/"))
        };
        assert_eq!(with(None).unwrap().export.len(), 1);
        let refused = with(Some("7")).unwrap_err();
        assert_eq!(refused.status.number(), 2);
    }

    #[test]
    fn impossible_job_numbers_are_refused() {
        for args in [
            JobOptions { num_sequences: Some(0), ..JobOptions::default() },
            JobOptions { sequence_length: Some(0), ..JobOptions::default() },
            JobOptions { layers: Some(0), ..JobOptions::default() },
            JobOptions { micro_batch_tokens: Some(0), ..JobOptions::default() },
            JobOptions { save_activations: Some("../x".into()), ..JobOptions::default() },
        ] {
            assert!(made("a/b", &args, Path::new("/")).is_err(), "{args:?}");
        }
    }
}
