//! Tells the program which commit it is built from: that of the repository, else
//! `OUTLIERS_COMMIT`.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=OUTLIERS_COMMIT");
    // It grows with every commit and every change of branch.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        println!("cargo::rerun-if-changed={log}");
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).or_else(|| std::env::var("OUTLIERS_COMMIT").ok());
    println!("cargo::rustc-env=OUTLIERS_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
}

/// What git prints; `None` without git or outside of a repository.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
