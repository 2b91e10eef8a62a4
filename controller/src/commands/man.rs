//! `man`: writes a manual page per command.

use std::fs;
use std::path::Path;

use clap::CommandFactory;

use super::Context;
use crate::cli::{Cli, VERSION};
use crate::files::write_whole;
use crate::text::counted;
use crate::ui::report::{CliError, ExitStatus};

pub(super) fn command(context: &Context, folder: &Path) -> Result<ExitStatus, CliError> {
    let folder = context.here.join(folder);
    let failed = |path: &Path, error: std::io::Error| CliError::failed(format!("{}: {error}", path.display()));
    fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
    let mut program = Cli::command();
    program.build();
    let mut pages = Vec::new();
    collect(&mut program, "outliers", &mut pages);
    for (name, page) in &pages {
        let file = folder.join(format!("{name}.1"));
        write_whole(&file, page.as_bytes()).map_err(|error| failed(&file, error))?;
    }
    context.reporter.say(&format!("{}: {}", counted(pages.len(), "page"), folder.display()));
    Ok(ExitStatus::Done)
}

/// Adds the page of a command, and those of its subcommands.
fn collect(command: &mut clap::Command, name: &str, pages: &mut Vec<(String, String)>) {
    pages.push((name.to_owned(), page(command, name)));
    let shown = |command: &&mut clap::Command| !command.is_hide_set() && command.get_name() != "help";
    for below in command.get_subcommands_mut().filter(shown) {
        let name = format!("{name}-{}", below.get_name());
        collect(below, &name, pages);
    }
}

/// The help text with the headings of a manual page.
fn page(command: &mut clap::Command, name: &str) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let help = command.render_long_help().to_string();
    let (name, version) = (roff(name), VERSION.as_str());
    let head = format!(".TH {name} 1 \"\" \"outliers {version}\"\n.SH NAME\n{name} \\- {}\n", roff(&about));
    format!("{head}.SH DESCRIPTION\n.nf\n{}\n.fi\n", roff(help.trim_end()))
}

/// Escapes text for roff: backslashes, dashes and lines that look like requests.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let line = |line: &str| if line.starts_with(['.', '\'']) { format!("\\&{line}") } else { line.to_owned() };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_for_roff() {
        assert_eq!(roff(".so /etc\n'x\n--a\\b"), "\\&.so /etc\n\\&'x\n\\-\\-a\\eb");
    }

    #[test]
    fn every_visible_command_has_a_man_page() {
        let mut program = Cli::command();
        program.build();
        let mut pages = Vec::new();
        collect(&mut program, "outliers", &mut pages);
        let page = |name: &str| &pages.iter().find(|(of, _)| of == name).unwrap().1;
        assert!(page("outliers").contains("Exit codes:"));
        assert!(page("outliers-deploy").contains("\\-\\-budget"));
        assert!(page("outliers-runs-list").starts_with(".TH outliers\\-runs\\-list 1"));
        assert!(!pages.iter().any(|(name, _)| name.contains("instance-serve") || name.ends_with("help")));
    }
}
