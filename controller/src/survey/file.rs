//! Parses a survey's file: models, text and requests. Errors name the file, the line and the key.
//!
//! Keys have the types and meaning of the options of `deploy`. Paths are relative to the file's
//! folder.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use outliers_protocol::JobOptions;
use serde::de::{self, DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;
use toml::de::DeTable;

use crate::cloud::broker::GpuRequest;
use crate::files::{MAX_FILE_BYTES, is_plain_name, read_text};
use crate::model_name::short;
use crate::run::deploy::slug;
use crate::text::{toml_error, unknown_key};
use crate::units::{GpuTime, Positive, Span, Usd};

/// A survey's file, parsed.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Its name, also that of its results' folder.
    pub name: String,
    /// Path of the file.
    pub path: PathBuf,
    /// Options of the job, the same for all models.
    pub job: JobOptions,
    /// Models in the file's order, with unique names.
    pub models: Vec<SurveyModel>,
    /// Maximum concurrent runs.
    pub max_parallel: Option<usize>,
    /// Budget of all runs together.
    pub budget: Option<Usd>,
    /// Budget of GPU time of all runs together.
    pub max_gpu_time: Option<GpuTime>,
    /// Time limit of each run.
    pub max_duration: Option<Span>,
}

/// A model of a survey.
#[derive(Clone, Debug)]
pub struct SurveyModel {
    /// Its name in the survey, also that of its results' folder.
    pub name: String,
    /// The checkpoint: hub id or folder.
    pub id: String,
    /// Branch, tag or commit of a hub model.
    pub revision: String,
    /// Filters for its instance, beyond its plan.
    pub request: GpuRequest,
    /// Time limit of its run, if not the survey's.
    pub max_duration: Option<Span>,
}

/// Whether a revision is a commit, which never changes, instead of a branch.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Why a survey's file is unusable.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}: {message}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
pub struct SurveyError {
    /// Path of the file.
    pub path: PathBuf,
    /// Line from 1, if known.
    pub line: Option<usize>,
    /// The error, with the key.
    pub message: String,
}

/// Keys of the file besides the options of the job ([`JobOptions`]), which are on the same level.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SurveyFile {
    name: Spanned<String>,
    #[serde(alias = "max_parallel")]
    max_parallel: Option<Spanned<usize>>,
    budget: Option<Positive>,
    #[serde(alias = "max_gpu_hours")]
    max_gpu_hours: Option<Positive>,
    #[serde(alias = "max_duration")]
    max_duration: Option<Span>,
    #[serde(default)]
    models: Vec<Spanned<String>>,
    #[serde(default)]
    model: Vec<ModelTable>,
}

/// Keys of a model besides its instance ([`GpuRequest`]), which are on the same level.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ModelTable {
    id: Spanned<String>,
    name: Option<Spanned<String>>,
    revision: Option<String>,
    revisions: Option<Spanned<Vec<String>>>,
    #[serde(alias = "max_duration")]
    max_duration: Option<Span>,
}

/// The tables of models, parsed for their instances.
#[derive(Deserialize)]
struct Requests {
    #[serde(default)]
    model: Vec<GpuRequest>,
}

fn main_branch() -> String {
    "main".to_owned()
}

impl Survey {
    /// Reads a file.
    ///
    /// # Errors
    /// The file cannot be read, or is invalid.
    pub fn read(path: &Path) -> Result<Self, SurveyError> {
        let text = read_text(path, MAX_FILE_BYTES).map_err(|error| SurveyError {
            path: path.to_owned(),
            line: None,
            message: error.to_string(),
        })?;
        Self::parse(&text, path)
    }

    /// Parses a file's text.
    ///
    /// # Errors
    /// It is invalid.
    pub fn parse(text: &str, path: &Path) -> Result<Self, SurveyError> {
        let error = |line, message| SurveyError { path: path.to_owned(), line, message };
        let unreadable = |wrong: toml::de::Error| {
            let (line, message) = toml_error(text, &wrong);
            error(line, message)
        };
        let wrong = |LocatedError { span, message }| {
            let line = 1 + text[..span.start.min(text.len())].matches('\n').count();
            error(Some(line), message)
        };
        known(DeTable::parse(text).map_err(unreadable)?.get_ref()).map_err(wrong)?;
        let file: SurveyFile = toml::from_str(text).map_err(unreadable)?;
        let job: JobOptions = toml::from_str(text).map_err(unreadable)?;
        let requests: Requests = toml::from_str(text).map_err(unreadable)?;
        file.understand(job, requests, path).map_err(wrong)
    }
}

/// Refuses unknown keys.
fn known(file: &DeTable<'_>) -> Result<(), LocatedError> {
    only(file, &[keys::<SurveyFile>(), keys::<JobOptions>()].concat())?;
    let model = file.iter().find(|(key, _)| key.get_ref() == "model");
    let models = model.and_then(|(_, models)| models.get_ref().as_array()).into_iter().flat_map(|models| models.iter());
    let keys = [keys::<ModelTable>(), keys::<GpuRequest>()].concat();
    models.filter_map(|model| model.get_ref().as_table()).try_for_each(|model| only(model, &keys))
}

fn only(table: &DeTable<'_>, known: &[&str]) -> Result<(), LocatedError> {
    let is_known = |key: &str| known.contains(&key);
    match table.keys().find(|key| !is_known(key.get_ref())) {
        Some(key) => Err(wrong(key, unknown_key(key.get_ref(), known.iter().copied()))),
        None => Ok(()),
    }
}

/// The keys of a struct, with old spellings.
fn keys<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // The deserialiser only records the keys.
    let _ = T::deserialize(Keys(&mut keys));
    keys
}

/// Records the keys that a struct reads.
struct Keys<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Keys<'_> {
    type Error = de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Self::Error> {
        Err(de::Error::custom("there is nothing to read"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct LocatedError {
    span: Range<usize>,
    message: String,
}

fn wrong<T>(at: &Spanned<T>, message: String) -> LocatedError {
    LocatedError { span: at.span(), message }
}

impl SurveyFile {
    fn understand(self, job: JobOptions, requests: Requests, path: &Path) -> Result<Survey, LocatedError> {
        check_name("name", &self.name)?;
        if let Some(none) = self.max_parallel.as_ref().filter(|most| *most.get_ref() == 0) {
            return Err(wrong(none, "max-parallel must be positive".to_owned()));
        }
        let plain = self.models.into_iter().map(|id| (ModelTable::plain(id), GpuRequest::default()));
        let mut models = Vec::new();
        let mut seen = BTreeSet::new();
        for (table, request) in plain.chain(self.model.into_iter().zip(requests.model)) {
            let at = table.name.as_ref().unwrap_or(&table.id).span();
            for entry in table.understand(request)? {
                if !seen.insert(entry.name.clone()) {
                    let message =
                        format!("`{}` is there twice; give one of them a name of its own (name = ..)", entry.name);
                    return Err(LocatedError { span: at, message });
                }
                models.push(entry);
            }
        }
        if models.is_empty() {
            return Err(wrong(&self.name, "it names no models (models = [\"owner/name\", ..])".to_owned()));
        }
        Ok(Survey {
            name: self.name.into_inner(),
            path: path.to_owned(),
            job,
            models,
            max_parallel: self.max_parallel.map(Spanned::into_inner),
            budget: self.budget.map(|budget| Usd::from_dollars(budget.get())),
            max_gpu_time: self.max_gpu_hours.map(|hours| GpuTime::from_hours(hours.get())),
            max_duration: self.max_duration,
        })
    }
}

impl ModelTable {
    /// A model given by its id only.
    fn plain(id: Spanned<String>) -> Self {
        Self { id, name: None, revision: None, revisions: None, max_duration: None }
    }

    /// One model, or one for each of its revisions.
    fn understand(self, request: GpuRequest) -> Result<Vec<SurveyModel>, LocatedError> {
        if let Some(name) = &self.name {
            check_name("name", name)?;
        }
        let revisions = self.revisions()?;
        let entry = SurveyModel {
            name: self.name.map_or_else(|| slug(&short(self.id.get_ref())), Spanned::into_inner),
            id: self.id.into_inner(),
            revision: self.revision.unwrap_or_else(main_branch),
            request,
            max_duration: self.max_duration,
        };
        if revisions.is_empty() {
            return Ok(vec![entry]);
        }
        let at = |revision: String| {
            let name = format!("{}-{}", entry.name, slug(&revision));
            SurveyModel { name, revision, ..entry.clone() }
        };
        Ok(revisions.into_iter().map(at).collect())
    }

    /// The listed revisions; empty without a list.
    fn revisions(&self) -> Result<Vec<String>, LocatedError> {
        let Some(listed) = &self.revisions else { return Ok(Vec::new()) };
        let why = match (&self.revision, listed.get_ref().as_slice()) {
            (Some(_), _) => "give `revision` or `revisions`, not both",
            (None, []) => "revisions = [] names none",
            (None, several) if several.iter().any(String::is_empty) => "a revision is empty",
            _ => return Ok(listed.get_ref().clone()),
        };
        Err(wrong(listed, why.to_owned()))
    }
}

/// Checks a name, which becomes that of a folder.
fn check_name(key: &str, name: &Spanned<String>) -> Result<(), LocatedError> {
    let text = name.get_ref();
    let plain = text.len() <= 80 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    // These suffixes mark incomplete results.
    let reserved = text.starts_with('.') || [".part", ".partial"].iter().any(|end| text.ends_with(end));
    if plain && !reserved && is_plain_name(text) && text != super::index::FILE {
        return Ok(());
    }
    Err(wrong(name, format!("{key} = \"{text}\" must be a plain folder name: letters, digits, `-`, `_`, `.`")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    /// Filter of the test surveys.
    const VRAM: Option<Bytes> = Some(Bytes::from_gib(80));

    fn parsed(text: &str) -> Result<Survey, SurveyError> {
        Survey::parse(text, Path::new("s.toml"))
    }

    #[test]
    fn models_are_strings_or_tables() {
        let survey = parsed(
            "name = 's'\nnum_sequences = 4\ndataset = 'fineweb-edu'\nshuffle = 3\nbudget = 12.5\nmax_duration = '2h'\nprecision = 'bf16'\nsites = ['residual']\n\
             models = ['owner/a', './b']\n[[model]]\nid = 'owner/c'\nrevision = 'abc'\ngpu_count = 8\nmin_vram = 80\n\
             [[model]]\nid = 'owner/a'\nname = 'a-again'\nmax_duration = '9h'",
        )
        .unwrap();
        let names: Vec<&str> = survey.models.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["owner--a", "b", "owner--c", "a-again"]);
        assert_eq!(survey.models[2].revision, "abc");
        assert_eq!((survey.models[2].request.gpu_count, survey.models[2].request.min_vram), (Some(8), VRAM));
        assert_eq!(survey.models[0].revision, "main");
        assert_eq!(survey.budget, Some(Usd::from_dollars(12.5)));
        assert_eq!((survey.job.num_sequences, survey.job.sites.len()), (Some(4), 1));
        assert!(survey.models[3].max_duration.is_some());
        let dataset = survey.job.dataset.unwrap();
        assert_eq!((dataset.path.as_str(), survey.job.shuffle), ("sample/10BT", Some(3)));
    }

    #[test]
    fn survey_keys_accept_current_and_earlier_spellings() {
        let new = "name = 's'\nnum-sequences = 4\nmax-duration = '2h'\n[[model]]\nid = 'a/b'\nmin-vram = 80";
        for text in [new.to_owned(), new.replace('-', "_")] {
            let survey = parsed(&text).unwrap();
            assert_eq!((survey.job.num_sequences, survey.models[0].request.min_vram), (Some(4), VRAM), "{text}");
            assert!(survey.max_duration.is_some(), "{text}");
        }
    }

    #[test]
    fn survey_accepts_every_job_option_and_filter() {
        let survey = parsed(
            "name = 's'\nmodels = ['a/b']\nweights = 'synthetic:3'\nstream-budget = '1GiB'\nablate = '7'\n\
             [thresholds]\nmagnitude = 5\n[[model]]\nid = 'c/d'\ntier = 'secure'\nmin-cuda = '12.4'",
        )
        .unwrap();
        assert_eq!(survey.job.weights.map(|weights| weights.to_string()).as_deref(), Some("synthetic:3"));
        assert!(survey.job.stream_budget.is_some() && survey.job.ablate.is_some());
        assert_eq!(survey.job.thresholds.threshold.map(Positive::get), Some(5.0));
        let request = &survey.models[1].request;
        assert!(request.tier.is_some() && request.min_cuda == Some("12.4".parse().unwrap()));
        assert_eq!(survey.models[0].request, GpuRequest::default());
    }

    #[test]
    fn model_is_run_at_each_revision() {
        let survey =
            parsed("name = 's'\n[[model]]\nid = 'a/b'\nmin_vram = 80\nrevisions = ['step5-tokens1B', 'refs/pr/1']")
                .unwrap();
        let entries: Vec<_> = survey.models.iter().map(|e| (e.name.as_str(), e.revision.as_str())).collect();
        assert_eq!(entries, [("a--b-step5-tokens1B", "step5-tokens1B"), ("a--b-refs--pr--1", "refs/pr/1")]);
        assert!(survey.models.iter().all(|e| e.id == "a/b" && e.request.min_vram == VRAM));
    }

    #[test]
    fn shipped_surveys_pin_known_commits() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/surveys");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() >= 5);
        for file in files {
            let survey = Survey::read(&file).unwrap();
            let moving: Vec<_> = survey.models.iter().filter(|entry| !is_commit(&entry.revision)).collect();
            let commits = survey.models.len() - moving.len();
            // None is known for models of 2025-26.
            let expected = match survey.name.as_str() {
                "moe-2026" => 3,
                "trajectories" => 1,
                _ => survey.models.len(),
            };
            assert_eq!(commits, expected, "{}: {moving:?}", file.display());
        }
    }

    #[test]
    fn errors_name_line_and_key() {
        for (text, line, word) in [
            ("name = 's'\nmodls = ['a/b']", Some(2), "did you mean `models`?"),
            ("name = 's'\nnum-sequenzes = 3\nmodels = ['a/b']", Some(2), "did you mean `num-sequences`?"),
            ("name = 's'\nnum-sequences = -3\nmodels = ['a/b']", Some(2), "`num-sequences`: it must be positive"),
            ("name = 's'\nmax-duration = '-3h'\nmodels = ['a/b']", Some(2), "it must be positive"),
            ("name = 's'\n\nnum_sequences = 'many'\nmodels = ['a/b']", Some(3), "num_sequences"),
            ("name = 's'\n[[model]]\nid = 'a/b'\nmin_vran = 80", Some(4), "min_vran"),
            ("name = 's'\n[[model]]\nid = 'a/b'\nmin-vram = -1", Some(4), "min-vram"),
            ("name = 's'\n[[model]]\nid = 'a/b'\nmax_price = 0", Some(4), "max_price"),
            ("name = 's'\n[[model]]\nrevision = 'a'", Some(2), "id"),
            ("name = 's'\nmodels = ['a/b',\n'c/d',\n'a/b']", Some(4), "a--b"),
            ("name = 's'\nmodels = ['/x/olmoe/model', '/y/olmoe/model']", Some(2), "`olmoe` is there twice"),
            ("name = 's'\n[[model]]\nid = 'a/b'\nrevisions = []", Some(4), "names none"),
            ("name = 's'\n[[model]]\nid = 'a/b'\nrevision = 'x'\nrevisions = ['y']", Some(5), "not both"),
            ("name = 's'\n[[model]]\nid = 'a/b'\nrevisions = ['y', 'y']", Some(3), "twice"),
            ("name = '../x'\nmodels = ['a/b']", Some(1), "folder"),
            ("name = 's'\nmodels = ['a/b']\n[[model]]\nid = 'c/d'\nname = 'x.partial'", Some(5), "x.partial"),
            ("name = 's'\nmodels = []", Some(1), "no models"),
            ("name = 's'\nmax-parallel = 0\nmodels = ['a/b']", Some(2), "max-parallel"),
            ("name = 's'\nbudget = nan\nmodels = ['a/b']", Some(2), "budget"),
            ("name = 's'\ndataset = 'texts'\nmodels = ['a/b']", Some(2), "dataset"),
            ("name = 's'\nmeasure = ['sinks']\nmodels = ['a/b']", Some(2), "residual-sinks"),
            ("name = 's'\nexport = ['imatrices']\nmodels = ['a/b']", Some(2), "act-scales"),
            ("name = 's'\nsites = ['experts']\nmodels = ['a/b']", Some(2), "experts"),
            ("name = 's'\nmax_duration = '5 parsecs'\nmodels = ['a/b']", Some(2), "parsecs"),
            ("name = 's'\nweights = 'web'\nmodels = ['a/b']", Some(2), "synthetic:SEED"),
            ("name = 's'\nmodels = ['a/b']\n[thresholds]\nlayers = 1", Some(4), "layer-fraction"),
            ("name = 's'\n[[model]]\nid = 'a/b'\ntier = 'cheap'", Some(4), "secure"),
            ("= 3", Some(1), ""),
            ("models = ['a/b']", Some(1), "name"),
        ] {
            let error = parsed(text).unwrap_err();
            assert_eq!(error.line, line, "{error}");
            assert!(error.to_string().starts_with("s.toml:") && error.message.contains(word), "{word}: {error}");
        }
        let missing = Survey::read(Path::new("/no/such.toml")).unwrap_err();
        assert!(missing.line.is_none() && missing.to_string().contains("/no/such.toml"), "{missing}");
    }
}
