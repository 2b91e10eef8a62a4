//! README.md, CONTRIBUTING.md and docs/: line lengths, targets of links, and commands that the
//! programs accept.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use outliers::survey::Survey;

const MAX_LINES: usize = 200;
const MAX_COLUMNS: usize = 110;

pub(super) struct Page {
    path: PathBuf,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: PathBuf) -> Page {
    let text = fs::read_to_string(&path).unwrap();
    Page { path, text }
}

pub(super) fn readme() -> Page {
    read(root().join("README.md"))
}

fn pages() -> Vec<Page> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let docs = docs.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    docs.chain(["README.md", "CONTRIBUTING.md"].map(|name| root().join(name))).map(read).collect()
}

impl Page {
    fn name(&self) -> String {
        self.path.file_name().unwrap().to_string_lossy().into_owned()
    }

    /// The text of its code blocks, fenced or indented, with the word after each opening fence.
    pub(super) fn blocks(&self) -> Vec<(String, String)> {
        let mut blocks: Vec<(String, String)> = Vec::new();
        let (mut fenced, mut indented) = (false, false);
        for line in self.text.lines() {
            if let Some(language) = line.strip_prefix("```") {
                fenced = !fenced;
                indented = false;
                if fenced {
                    blocks.push((language.to_owned(), String::new()));
                }
                continue;
            }
            let code = if fenced { Some(line) } else { line.strip_prefix("    ") };
            if code.is_some() && !fenced && !indented {
                blocks.push((String::new(), String::new()));
            }
            indented = code.is_some() && !fenced;
            if let (Some(code), Some((_, block))) = (code, blocks.last_mut()) {
                block.push_str(code);
                block.push('\n');
            }
        }
        blocks
    }

    /// Addresses of links and pictures.
    fn links(&self) -> impl Iterator<Item = &str> {
        self.text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
    }

    /// Anchors of its headings.
    fn anchors(&self) -> Vec<String> {
        let headings = self.text.lines().filter(|line| line.starts_with('#'));
        let anchor = |line: &str| -> String {
            let kept = line.trim_start_matches('#').trim().to_lowercase();
            let kept = kept.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        };
        headings.map(anchor).collect()
    }
}

/// The commands of a code block that run one of the two programs, as arguments: without comments,
/// variables and redirections.
pub(super) fn commands(block: &str) -> Vec<Vec<String>> {
    let block = block.replace("\\\n", " ");
    let lines = block.lines().filter_map(|line| line.split(" #").next());
    let typed = lines.flat_map(|line| line.split(['&', '|', ';']));
    let commands = typed.filter_map(|command| {
        let mut words = command.split_whitespace().skip_while(|word| word.contains('='));
        let program = Path::new(words.next()?).file_name()?.to_str()?;
        ["outliers", "outliers-worker"].contains(&program).then(|| {
            let arguments = words.take_while(|word| !word.starts_with('>'));
            [program].into_iter().chain(arguments).map(str::to_owned).collect()
        })
    });
    commands.collect()
}

/// The program's error about its arguments, if any.
fn refusal(command: &[String]) -> Option<String> {
    let refused = match command[0].as_str() {
        "outliers" => outliers::cli::Cli::try_parse_from(command).err(),
        _ => outliers_worker::commands::cli::Cli::try_parse_from(command).err(),
    };
    refused.filter(clap::Error::use_stderr).map(|error| error.to_string())
}

#[test]
fn readme_is_short_and_its_lines_are_narrow() {
    let mut wide = Vec::new();
    for page in pages() {
        let lines = page.text.lines().enumerate();
        let too_wide = lines.filter(|(_, line)| line.chars().count() > MAX_COLUMNS);
        wide.extend(too_wide.map(|(at, line)| format!("{}:{}: {line}", page.name(), at + 1)));
    }
    assert!(wide.is_empty(), "more than {MAX_COLUMNS} columns:\n{}", wide.join("\n"));
    let lines = readme().text.lines().count();
    assert!(lines <= MAX_LINES, "README.md has {lines} lines");
}

#[test]
fn links_point_to_existing_files_and_headings() {
    let (mut seen, mut broken) = (0, Vec::new());
    for page in pages() {
        for link in page.links().filter(|link| !link.contains("://")) {
            seen += 1;
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() { page.path.clone() } else { page.path.parent().unwrap().join(file) };
            let leads_there = match anchor {
                _ if !target.exists() => false,
                Some(anchor) => read(target).anchors().iter().any(|known| known == anchor),
                None => true,
            };
            if !leads_there {
                broken.push(format!("{}: {link}", page.name()));
            }
        }
    }
    assert!(seen > 20, "{seen} links");
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn commands_in_code_blocks_are_accepted() {
    let (mut seen, mut refused) = (0, Vec::new());
    for page in pages() {
        for command in page.blocks().iter().flat_map(|(_, block)| commands(block)) {
            seen += 1;
            refused.extend(refusal(&command).map(|said| format!("{}: {}\n{said}", page.name(), command.join(" "))));
        }
    }
    assert!(seen > 50, "{seen} commands");
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
fn scripts_in_code_blocks_exist() {
    let (mut seen, mut missing) = (0, Vec::new());
    let is_script = |word: &&str| word.ends_with(".sh") || word.ends_with(".py") || *word == ".ci/run";
    for page in pages() {
        for (_, block) in page.blocks() {
            for script in block.split_whitespace().filter(is_script) {
                seen += 1;
                if !root().join(script).is_file() {
                    missing.push(format!("{}: {script}", page.name()));
                }
            }
        }
    }
    assert!(seen > 5, "{seen} scripts");
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn surveys_in_code_blocks_parse() {
    let mut seen = 0;
    for page in pages() {
        for (language, block) in page.blocks() {
            if language == "toml" && block.contains("models = ") {
                seen += 1;
                Survey::parse(&block, &page.path).unwrap();
            }
        }
    }
    assert!(seen > 1, "{seen} surveys");
}

#[test]
fn invalid_command_in_a_code_block_is_detected() {
    let block = [
        "cargo build && ./target/release/outliers demo",
        "HF_TOKEN=x outliers plan --model a/b \\",
        "    --layers 2 > plan.txt",
        "outliers-worker devices --jsn   # --json",
    ];
    let commands = commands(&block.join("\n"));
    let words: Vec<String> = commands.iter().map(|command| command.join(" ")).collect();
    assert_eq!(words, ["outliers demo", "outliers plan --model a/b --layers 2", "outliers-worker devices --jsn"]);
    let refused: Vec<bool> = commands.iter().map(|command| refusal(command).is_some()).collect();
    assert_eq!(refused, [false, false, true]);
}
