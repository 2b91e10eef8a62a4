//! `compare`: compares results in tables and on a page.

use std::fs;
use std::path::{Path, PathBuf};

use super::Context;
use crate::cli::{CompareArgs, CompareFormat};
use crate::compare::folder::{ReadError, ResultFolder, read_all, read_whole};
use crate::compare::{Comparison, page, pdf, pixels, plots, print};
use crate::files::write_whole;
use crate::text::{clean, counted};
use crate::ui::report::{CliError, ExitStatus};
use crate::units::PlotWidth;

/// Default pixels per inch of pictures for paper.
const DPI: u16 = 300;

/// Default width of PDF files: 840 units at 120 per inch.
const PDF_INCHES: f64 = 7.0;

pub(super) fn command(context: &Context, args: &CompareArgs) -> Result<ExitStatus, CliError> {
    let (folders, left_out) = match args.folders.is_empty() {
        true => usual(&context.settings.results, args.allow_partial)?,
        false => (read_all(&args.folders, args.allow_partial)?, Vec::new()),
    };
    if !left_out.is_empty() {
        let names: Vec<String> = left_out.iter().map(|path| path.display().to_string()).collect();
        let names = clean(names.join(", ").as_bytes(), 2000);
        context.reporter.say(&format!("Left out, not being whole results: {names}"));
    }
    let mut comparison = Comparison::of(folders);
    if !args.only.is_empty() {
        let hint = "name results by number, name or folder, as `outliers compare` shows them";
        comparison = comparison.only(&args.only).map_err(|why| CliError::refused(format!("--only: {why}"), hint))?;
    }
    if let Some(file) = &args.html {
        let file = context.here.join(file);
        write(&file, page::page(&comparison).as_bytes())?;
        context.reporter.say(&format!("page: {}", file.display()));
    }
    if let Some(folder) = &args.svg {
        drawings(context, &comparison, folder, "svg", |svg| Ok(sized(svg, args.size).into_bytes()))?;
    }
    if let Some(folder) = &args.png {
        let dpi = f64::from(args.dpi.unwrap_or(DPI));
        let width = args.size.map(|size| (size.inches() * dpi).round() as u32);
        drawings(context, &comparison, folder, "png", |svg| pixels::png(svg, width))?;
    }
    if let Some(folder) = &args.pdf {
        let inches = args.size.map_or(PDF_INCHES, PlotWidth::inches);
        drawings(context, &comparison, folder, "pdf", |svg| pdf::pdf(svg, inches))?;
    }
    context.reporter.result(&comparison, || match args.format {
        CompareFormat::Table => print::terminal(&comparison),
        CompareFormat::Markdown => print::markdown(&comparison),
        CompareFormat::Csv => print::csv(&comparison),
        CompareFormat::Json => {
            serde_json::to_string_pretty(&comparison).expect("documents hold no maps with keys other than strings")
        }
    });
    Ok(ExitStatus::Done)
}

/// The whole results of the usual folder, and the folders of what is left out.
fn usual(results: &Path, allow_partial: bool) -> Result<(Vec<ResultFolder>, Vec<PathBuf>), CliError> {
    let none = || {
        let hint = "`outliers demo` makes one; or name folders with results";
        CliError::refused(format!("no results yet in {}", results.display()), hint)
    };
    if !results.exists() {
        return Err(none());
    }
    read_whole(results, allow_partial).map_err(|error| match error {
        ReadError::Nothing(_) => none(),
        other => other.into(),
    })
}

/// A drawing that says how wide it is on paper; its own units stay.
fn sized(svg: &str, width: Option<PlotWidth>) -> String {
    let Some(inches) = width.map(PlotWidth::inches) else { return svg.to_owned() };
    let side = |name: &str| {
        let (_, rest) = svg.split_once(&format!(" {name}=\""))?;
        rest.split_once('"')?.0.parse::<f64>().ok()
    };
    let (Some(wide), Some(high)) = (side("width"), side("height")) else { return svg.to_owned() };
    let old = format!("width=\"{wide}\" height=\"{high}\"");
    svg.replacen(&old, &format!("width=\"{inches:.4}in\" height=\"{:.4}in\"", inches * high / wide), 1)
}

/// Writes every plot in one format, and reports it.
fn drawings(
    context: &Context,
    comparison: &Comparison,
    folder: &Path,
    format: &str,
    encode: impl Fn(&str) -> Result<Vec<u8>, String>,
) -> Result<(), CliError> {
    let folder = context.here.join(folder);
    fs::create_dir_all(&folder).map_err(|error| unwritable(&folder, &error))?;
    let mut drawn = plots::across(comparison);
    drawn.extend(comparison.models.iter().flat_map(plots::of_model));
    for plot in &drawn {
        let file = folder.join(format!("{}.{format}", plot.name));
        let bytes = encode(&plot.svg).map_err(|error| CliError::failed(format!("{}: {error}", file.display())))?;
        write(&file, &bytes)?;
    }
    context.reporter.say(&format!("{}: {}", counted(drawn.len(), "plot"), folder.display()));
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    write_whole(path, bytes).map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, error: &std::io::Error) -> CliError {
    let message = format!("{} cannot be written: {error}", path.display());
    CliError::new(ExitStatus::Failed, message, "--html takes a file; --svg, --png and --pdf take a folder")
}

impl From<ReadError> for CliError {
    fn from(error: ReadError) -> Self {
        let message = error.to_string();
        match error {
            ReadError::Flawed(_) => Self::new(
                ExitStatus::Failed,
                message,
                "--allow-partial continues without their figures and notes their absence",
            ),
            ReadError::Nothing(_) | ReadError::Unreadable { .. } => Self::refused(
                message,
                "name folders with results, or with folders of results: <model>-<run>/, <survey>/<model>/",
            ),
        }
    }
}
