//! The status of all runs as a document: finished, active and failed runs, and the next commands.

use std::path::Path;

use crate::calendar::rfc3339;
use crate::files::sha256;
use crate::host::transport::quote::quote;
use crate::run::ledger::Unreadable;
use crate::survey::ModelOutcome;
use crate::text::{clean, counted, markdown};
use crate::ui::status::{ActiveRun, FinishedRun, Status, SurveyStatus};

/// The document in Markdown.
pub(crate) fn document(status: &Status) -> String {
    let now = rfc3339(status.at);
    let date = now.split('T').next().unwrap_or_default();
    let mut parts = vec![
        ("Done", done(status)),
        ("Running", running(status)),
        ("Failed, and why", failed(status)),
        ("Blocked, and the way around", blocked(status)),
        ("Next steps", next_steps(status)),
        ("Spend", spend(status)),
    ];
    let mut out =
        format!("# Handoff, {date}\n\nMade by `outliers handoff` at {now} from the ledger and the files of results.\n");
    if !status.unreadable.is_empty() {
        parts.insert(3, ("Unreadable in the ledger", unreadable(status)));
    }
    for (title, lines) in parts {
        let body = if lines.is_empty() { "Nothing.".to_owned() } else { lines.join("\n") };
        out += &format!("\n## {title}\n\n{body}\n");
    }
    out
}

/// Prefix of the hash in the last line of a document, which Markdown does not show.
const SEAL: &str = "\n<!-- outliers handoff, SHA-256 of what is above: ";
const END: &str = " -->\n";

/// A document with a last line that reveals edits.
pub(crate) fn with_checksum(document: String) -> String {
    let hash = sha256(document.as_bytes());
    document + SEAL + &hash + END
}

/// Whether a sealed document is unchanged.
pub(crate) fn is_untouched(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(text);
    let parts = text.rsplit_once(SEAL);
    parts.is_some_and(|(document, seal)| seal.strip_suffix(END) == Some(&*sha256(document.as_bytes())))
}

/// Escapes text for a cell of a table and a line of a list.
fn cell(text: &str) -> String {
    markdown(text, 500)
}

fn table(header: &[&str], rows: Vec<Vec<String>>) -> Vec<String> {
    if rows.is_empty() {
        return rows.concat();
    }
    let line =
        |cells: &[String]| format!("| {} |", cells.iter().map(|text| cell(text)).collect::<Vec<_>>().join(" | "));
    let header: Vec<String> = header.iter().map(|name| (*name).to_owned()).collect();
    let rule = format!("|{}", "---|".repeat(header.len()));
    [line(&header), rule].into_iter().chain(rows.iter().map(|row| line(row))).collect()
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

fn done(status: &Status) -> Vec<String> {
    let row = |run: &FinishedRun| {
        vec![
            run.model.clone(),
            or_dash(run.survey.clone()),
            run.run.clone(),
            rfc3339(run.ended),
            run.cost.to_string(),
            or_dash(run.figures.map(|figures| format!("{:.0}", figures.features))),
            or_dash(run.figures.and_then(|figures| figures.perplexity).map(|perplexity| format!("{perplexity:.4}"))),
            or_dash(run.folder.clone()),
        ]
    };
    let header = ["model", "survey", "run", "ended", "cost", "outlier features", "perplexity", "results"];
    table(&header, status.over.iter().filter(|run| run.completed).map(row).collect())
}

/// A column's heading, and its cell for a run.
type Column<'a> = (&'a str, &'a dyn Fn(&ActiveRun) -> String);

fn running(status: &Status) -> Vec<String> {
    let who = |run: &ActiveRun| match (run.held, run.looked_after) {
        (true, _) => "kept on request",
        (false, true) => "a process drives it",
        (false, false) if run.detached => "detached: its guard waits",
        (false, false) => "NOBODY",
    };
    let columns: [Column<'_>; 11] = [
        ("model", &|run| run.model.clone()),
        ("survey", &|run| or_dash(run.survey.clone())),
        ("run", &|run| run.run.clone()),
        ("state", &|run| run.state.clone()),
        ("instance", &|run| {
            or_dash(run.instance.as_ref().zip(run.broker.as_ref()).map(|(id, broker)| format!("{id} on {broker}")))
        }),
        ("price", &|run| or_dash(run.price.map(|price| price.to_string()))),
        ("cost", &|run| run.cost.to_string()),
        ("at most", &|run| run.at_most.to_string()),
        ("done by estimate", &|run| or_dash(run.expected.map(rfc3339))),
        ("deadline", &|run| or_dash(run.deadline.map(rfc3339))),
        ("who drives", &|run| who(run).to_owned()),
    ];
    let row = |run: &ActiveRun| columns.iter().map(|(_, cell)| cell(run)).collect();
    table(&columns.map(|(name, _)| name), status.under_way.iter().map(row).collect())
}

fn unreadable(status: &Status) -> Vec<String> {
    let line = |lost: &Unreadable| {
        format!("- run {}: {}; `outliers instances list` shows what it rented", lost.run, cell(&lost.why))
    };
    status.unreadable.iter().map(line).collect()
}

/// Failed runs that no later run made good.
fn failures(status: &Status) -> impl Iterator<Item = &FinishedRun> {
    status.over.iter().filter(|run| !run.completed && !run.superseded)
}

fn failed(status: &Status) -> Vec<String> {
    let line = |run: &FinishedRun| {
        let log = run.folder.as_ref().map(|_| format!("; its log: `outliers runs logs {}`", run.run));
        format!(
            "- {} (run {}, {}): {}{}",
            cell(&run.model),
            run.run,
            run.cost,
            cell(&run.ending),
            log.unwrap_or_default()
        )
    };
    failures(status).map(line).collect()
}

fn blocked(status: &Status) -> Vec<String> {
    let forgotten = |run: &&ActiveRun| !run.looked_after && !run.detached;
    let alone = status.under_way.iter().filter(forgotten).map(|run| {
        format!(
            "- Run {} of {} is {}, and no process looks after it. Way around: `outliers attach {}`.",
            run.run,
            cell(&run.model),
            run.state,
            run.run
        )
    });
    let with_a_hint = failures(status).filter_map(|run| {
        let hint = run.hint.as_ref()?;
        Some(format!("- {} (run {}): {}. Way around: {}.", cell(&run.model), run.run, cell(&run.ending), cell(hint)))
    });
    alone.chain(with_a_hint).collect()
}

fn next_steps(status: &Status) -> Vec<String> {
    let mut steps: Vec<String> = Vec::new();
    let mut step =
        |why: String, command: String| steps.push(format!("{}. {why}\n\n       {command}\n", steps.len() + 1));
    // A survey resumes its own runs.
    let survey_goes_on =
        |run: &ActiveRun| status.surveys.iter().any(|survey| run.survey.as_ref() == Some(&survey.index.survey));
    for run in status.under_way.iter().filter(|run| !run.looked_after && !survey_goes_on(run)) {
        step(format!("Take up run {} of {}.", run.run, cell(&run.model)), format!("outliers attach {}", run.run));
    }
    for survey in &status.surveys {
        let (why, command) = next_of(survey, status);
        step(why, command);
    }
    for run in status.under_way.iter().filter(|run| run.held) {
        let id = run.instance.as_deref().unwrap_or_default();
        step(
            format!("End the instance that is kept for {}, when it is not needed any more.", cell(&run.model)),
            format!("outliers instances terminate {}", quote(&plain(id))),
        );
    }
    steps
}

/// The next command for a survey.
fn next_of(survey: &SurveyStatus, status: &Status) -> (String, String) {
    let count =
        |outcomes: &[ModelOutcome]| survey.index.models.iter().filter(|line| outcomes.contains(&line.outcome)).count();
    let (open, failed) = (count(&[ModelOutcome::Open]), count(&[ModelOutcome::Partial, ModelOutcome::Failed]));
    let name = cell(&survey.index.survey);
    let file = quote(&plain(&survey.index.file));
    let page = quote(&format!("{}.html", plain(&survey.index.survey)));
    let runs = |run: &&ActiveRun| run.survey.as_ref() == Some(&survey.index.survey) && run.looked_after;
    match (open, failed) {
        (1.., _) if status.under_way.iter().any(|run| runs(&run)) => {
            let open = counted(open, "open model");
            (format!("Watch survey {name}: {open}."), "outliers status".to_owned())
        }
        (1.., _) => {
            (format!("Go on with survey {name}: {}.", counted(open, "open model")), format!("outliers survey {file}"))
        }
        (0, 1..) => (
            format!("Mend what made {} of survey {name} fail, and run again.", counted(failed, "model")),
            format!("outliers survey {file} --rerun-failed"),
        ),
        (0, 0) => (
            format!("Look at survey {name}, which is complete."),
            format!("outliers compare {} --html {page}", path(&survey.folder)),
        ),
    }
}

fn path(path: &Path) -> String {
    quote(&plain(&path.to_string_lossy()))
}

/// Escapes text in a command within Markdown.
fn plain(text: &str) -> String {
    clean(text.as_bytes(), 4000)
}

fn spend(status: &Status) -> Vec<String> {
    let by_survey =
        status.surveys.iter().map(|survey| format!("- survey {}: {}", cell(&survey.index.survey), survey.spent));
    let all = [
        format!("- all runs of this ledger: {}", status.spent),
        format!("- runs under way may still cost, until their time limits: {}", status.reserved),
    ];
    by_survey.chain(all).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::status::tests::status;
    use crate::units::Usd;

    #[test]
    fn handoff_lists_done_running_failed_and_next_commands() {
        let home = tempfile::tempdir().unwrap();
        let text = document(&status(home.path()));
        assert_eq!(text, document(&status(home.path())), "the same things make the same document");
        let part = |title: &str| text.split("## ").find(|part| part.starts_with(title)).unwrap().to_owned();
        assert!(text.starts_with("# Handoff, 2026-06-01\n\nMade by `outliers handoff` at 2026-06-01T12:00:00Z"));
        assert!(part("Done").contains("| owner/a | moe-two | run1 |") && !part("Done").contains("owner/b"));
        let running = part("Running");
        assert!(running.contains("i-run3 on fake") && running.contains("2026-06-01T12:30:00Z"), "{running}");
        assert!(running.contains("| a process drives it |") && running.contains("| NOBODY |"), "{running}");
        let failed = part("Failed");
        assert!(failed.contains("owner/b (run run2, ") && failed.contains("outliers runs logs run2"), "{failed}");
        let blocked = part("Blocked");
        assert!(blocked.contains("outliers attach run4") && blocked.contains("relax the filters"), "{blocked}");
        assert!(blocked.contains("200 \\| removed"), "a cell stays a cell: {blocked}");
        let next = part("Next");
        assert!(next.contains("1. Watch survey moe-two: 1 open model."), "{next}");
        assert!(part("Spend").contains("may still cost, until their time limits: $6.00"), "{}", part("Spend"));
    }

    #[test]
    fn remote_names_never_become_links_or_images() {
        let home = tempfile::tempdir().unwrap();
        let mut status = status(home.path());
        let evil = "![a](http://evil.example/x.png) [b](//evil.example) <img src=x> www.evil.example";
        status.under_way.iter_mut().for_each(|run| {
            run.instance = Some(evil.to_owned());
            run.model = evil.to_owned();
        });
        for run in &mut status.over {
            (run.model, run.ending, run.hint) = (evil.to_owned(), evil.to_owned(), Some(evil.to_owned()));
        }
        status.unreadable.push(Unreadable { run: "run9".into(), why: evil.into() });
        let text = document(&status);
        let active = text.replace(r"\](", "");
        for live in ["![", "](", "http://", "<img", "www."] {
            assert!(!active.contains(live), "{live} in {text}");
        }
        assert!(text.contains("evil.example"), "it is shown: {text}");
    }

    #[test]
    fn next_command_depends_on_the_survey_state() {
        let home = tempfile::tempdir().unwrap();
        let mut status = status(home.path());
        status.under_way.clear();
        let next = |status: &Status| next_of(&status.surveys[0], status).1;
        assert_eq!(next(&status), "outliers survey '/my surveys/moe-two.toml'");
        status.surveys[0].index.models.pop();
        assert_eq!(next(&status), "outliers survey '/my surveys/moe-two.toml' --rerun-failed");
        status.surveys[0].index.models.pop();
        assert!(next(&status).starts_with("outliers compare ") && next(&status).contains("moe-two --html"));
    }

    #[test]
    fn edited_handoff_is_detected() {
        let text = with_checksum("# Handoff\n\nNothing.\n".to_owned());
        assert!(is_untouched(text.as_bytes()) && text.starts_with("# Handoff\n\nNothing.\n\n<!--"), "{text}");
        let edits = [text.replace("Nothing", "Much"), format!("{text}a note\n"), format!("a note\n{text}")];
        let cut = text.lines().take(3).collect::<Vec<_>>().join("\n");
        for edited in edits.into_iter().chain([cut, String::new()]) {
            assert!(!is_untouched(edited.as_bytes()), "{edited}");
        }
        assert!(!is_untouched(b"\xff"));
    }

    #[test]
    fn empty_status_gives_a_handoff() {
        let nothing = Status {
            at: 0,
            under_way: vec![],
            over: vec![],
            surveys: vec![],
            spent: Usd::ZERO,
            reserved: Usd::ZERO,
            unreadable: vec![],
        };
        assert_eq!(document(&nothing).matches("Nothing.").count(), 5, "all but the spend");
    }
}
