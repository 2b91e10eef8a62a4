//! `results`: lists results, shows tables, opens pages, and applies other shares of layers and
//! positions.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use outliers_protocol::{Axis, Reading, Results, ThresholdOptions, Thresholds, files};
use serde::Serialize;

use super::{Context, SCHEMA};
use crate::cli::ResultsCommand;
use crate::compare::comparison::ResultKind;
use crate::compare::folder::{Content, MARKS, ResultFolder, Run, paths, read, read_all};
use crate::compare::recount::recount;
use crate::compare::{Comparison, page};
use crate::files::write_whole;
use crate::ui::report::{CliError, ExitStatus, tables};
use crate::units::{figure, grouped, in_percent};

/// Name of a result's page, in its folder.
const PAGE: &str = "page.html";

/// Program that opens a page in the user's browser.
const OPENER: &str = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };

#[derive(Serialize)]
pub(crate) struct ResultEntry {
    /// Display name of the model.
    pub(crate) model: String,
    pub(crate) folder: PathBuf,
    /// Kind of result, or why it is unusable.
    #[serde(flatten)]
    pub(crate) standing: ResultKind,
    /// Number of sequences, and tokens per sequence.
    pub(crate) tokens: Option<[usize; 2]>,
    /// Systematic features, unique and by layers.
    pub(crate) count: Option<f64>,
    pub(crate) perplexity: Option<f64>,
}

#[derive(Serialize)]
struct List {
    schema: u32,
    results: Vec<ResultEntry>,
}

/// Counts with other shares than the run's.
#[derive(Serialize)]
struct Recounted<'a> {
    schema: u32,
    /// Marks the document as recounted.
    recounted: bool,
    folder: &'a Path,
    own_thresholds: Thresholds,
    results: Results,
}

#[derive(Serialize)]
struct OpenedReport<'a> {
    schema: u32,
    page: &'a Path,
}

pub(super) fn command(context: &Context, command: &ResultsCommand) -> Result<ExitStatus, CliError> {
    match command {
        ResultsCommand::List => list(context),
        ResultsCommand::Show { run } => show(context, &find(context, run)?),
        ResultsCommand::Open { run } => open(context, &find(context, run)?),
        ResultsCommand::Recount { run, thresholds } => count_anew(context, &find(context, run)?, thresholds),
    }
}

fn list(context: &Context) -> Result<ExitStatus, CliError> {
    let below = std::slice::from_ref(&context.settings.results);
    let none = !context.settings.results.exists() || paths(below)?.is_empty();
    let folders = if none { Vec::new() } else { read_all(below, true)? };
    let comparison = Comparison::of(folders);
    let listed = comparison.models.iter().map(|model| ResultEntry {
        model: model.label.clone(),
        folder: PathBuf::from(&model.folder),
        standing: model.standing.clone(),
        tokens: model.sequences.zip(model.tokens_per_sequence).map(|(sequences, tokens)| [sequences, tokens]),
        count: comparison.own(model, Reading::Unique, Axis::Layers).map(|figure| figure.count.value),
        perplexity: model.perplexity.map(|perplexity| perplexity.value),
    });
    let list = List { schema: SCHEMA, results: listed.collect() };
    context.reporter.result(&list, || in_words(&list.results, &context.settings.results));
    Ok(ExitStatus::Done)
}

/// Shows folders relative to `home`, the folder of all results, as `results show` takes them.
fn in_words(results: &[ResultEntry], home: &Path) -> String {
    if results.is_empty() {
        return "no results yet\n".to_owned();
    }
    let mut table = tables::table(&["model", "tokens", "features", "perplexity", "result", "folder"]);
    let optional = |text: Option<String>| tables::number(text.unwrap_or_else(|| "-".to_owned()));
    for result in results {
        table.add_row([
            tables::name(&result.model),
            optional(result.tokens.map(|[sequences, of]| format!("{sequences} x {}", grouped(of as u64)))),
            optional(result.count.map(|count| figure(count, 0))),
            optional(result.perplexity.map(|perplexity| figure(perplexity, 4))),
            tables::text(&match &result.standing {
                ResultKind::Complete => "complete".to_owned(),
                ResultKind::Imported { .. } => "imported".to_owned(),
                ResultKind::Unusable(why) => why.clone(),
            }),
            tables::id(&result.folder.strip_prefix(home).unwrap_or(&result.folder).display().to_string()),
        ]);
    }
    format!("{table}\nfeatures: systematic ones, unique, by layers\n")
}

/// The folder of a result: a path from here or from the results' folder, a prefix of its run's id,
/// the name of its folder, or `last`.
fn find(context: &Context, run: &str) -> Result<PathBuf, CliError> {
    let results = &context.settings.results;
    let is_result = |path: &PathBuf| !run.is_empty() && MARKS.iter().any(|name| path.join(name).exists());
    if let Some(path) = [context.here.join(run), results.join(run)].into_iter().find(is_result) {
        return Ok(path);
    }
    let refused = |message: String| CliError::refused(message, "outliers results list");
    let all = if results.exists() { paths(std::slice::from_ref(results))? } else { Vec::new() };
    let written = |folder: &Path| {
        let manifest = folder.join(files::MANIFEST).metadata();
        manifest.and_then(|manifest| manifest.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let is_it = |folder: &Path| {
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let id = name.rsplit('-').next().unwrap_or_default();
        !run.is_empty() && (name == run || id.starts_with(run))
    };
    if run == "last" {
        let last = all.into_iter().max_by_key(|folder| written(folder));
        return last.ok_or_else(|| refused(format!("no results in {}", results.display())));
    }
    let mut found: Vec<PathBuf> = all.into_iter().filter(|folder| is_it(folder)).collect();
    match (found.pop(), found.len()) {
        (Some(folder), 0) => Ok(folder),
        (Some(_), more) => Err(refused(format!("{} results begin with `{run}`", more + 1))),
        (None, _) => Err(refused(format!("`{run}` is no result below {} and no folder of one", results.display()))),
    }
}

/// Reads a complete run.
fn whole(folder: &Path) -> Result<Box<Run>, CliError> {
    match read(folder) {
        Ok(Content::Run(run)) => Ok(run),
        Ok(Content::Imported(_)) => Err(CliError::refused(
            format!("{} was imported: only the predecessor's counts are known", folder.display()),
            format!("outliers compare {}", folder.display()),
        )),
        Err(flaw) => Err(CliError::failed(format!("{} is {flaw}", folder.display()))),
    }
}

fn show(context: &Context, folder: &Path) -> Result<ExitStatus, CliError> {
    let run = whole(folder)?;
    context.reporter.result(&run.results, || {
        let verification = run.metadata.model.weight_verification.as_ref();
        let table = tables::results(&run.results.model, &run.results, verification);
        format!("{table}files: {}\n", folder.display())
    });
    Ok(ExitStatus::Done)
}

fn open(context: &Context, folder: &Path) -> Result<ExitStatus, CliError> {
    let run = whole(folder)?;
    let content = Ok(Content::Run(run));
    let comparison = Comparison::of(vec![ResultFolder { path: folder.to_owned(), content }]);
    let file = folder.join(PAGE);
    write_whole(&file, page::page(&comparison).as_bytes())
        .map_err(|error| CliError::failed(format!("{}: {error}", file.display())))?;
    let mut opener = Command::new(OPENER);
    opener.arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if !opener.status().is_ok_and(|status| status.success()) {
        context.reporter.warn(&format!("`{OPENER}` opened no browser here"));
    }
    context.reporter.result(&OpenedReport { schema: SCHEMA, page: &file }, || format!("page: {}\n", file.display()));
    Ok(ExitStatus::Done)
}

fn count_anew(context: &Context, folder: &Path, asked: &ThresholdOptions) -> Result<ExitStatus, CliError> {
    if asked.layer_fraction.is_none() && asked.position_fraction.is_none() && asked.threshold.is_none() {
        return Err(CliError::refused("no threshold was given", "give --layer-fraction, --position-fraction, or both"));
    }
    let run = whole(folder)?;
    let own = run.results.thresholds;
    let results = recount(&run, asked.over(own)).map_err(|why| {
        let hint = "only the shares of layers and positions can be applied anew; else run the model again";
        CliError::refused(format!("{}: {why}", folder.display()), hint)
    })?;
    let anew = Recounted { schema: SCHEMA, recounted: true, folder, own_thresholds: own, results };
    context.reporter.result(&anew, || {
        let verification = run.metadata.model.weight_verification.as_ref();
        let table = tables::results(&anew.results.model, &anew.results, verification);
        format!(
            "RECOUNTED from stored counts; the run's own shares are >= {} % of layers and >= {} % of positions\n\
             {table}files, as the run counted: {}\n",
            in_percent(own.layer_fraction),
            in_percent(own.position_fraction),
            folder.display()
        )
    });
    Ok(ExitStatus::Done)
}
