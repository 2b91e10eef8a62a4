//! The two programs, built once and run as a person would.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests are a member of the workspace")
}

/// A golden fixture's folder: `model/`, `golden.safetensors`, `outliers.json`.
pub fn golden(name: &str) -> PathBuf {
    workspace().join("tests/golden").join(name)
}

/// Names of all golden fixtures.
pub fn goldens() -> Vec<String> {
    let entries = std::fs::read_dir(workspace().join("tests/golden")).expect("fixtures are part of the repository");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("readable"))
        .filter(|entry| entry.path().join("golden.safetensors").exists())
        .map(|entry| entry.file_name().into_string().expect("ASCII"))
        .collect();
    names.sort();
    names
}

/// `outliers`, of the same profile as this test.
pub fn controller() -> PathBuf {
    built().join("outliers")
}

/// `outliers-worker`, of the same profile as this test.
pub fn worker() -> PathBuf {
    built().join("outliers-worker")
}

/// Builds both programs: a test binary does not make cargo build another package's programs, and
/// must not run stale ones.
///
/// `cargo test --workspace` has built them with the features of libraries that tests ask for.
/// `cargo build` leaves these out, and would build most libraries and both programs a second time.
/// So this asks for a test of each program's package, which needs the program.
fn built() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("this program has a path");
        let folder = test.ancestors().nth(2).expect("tests lie in <profile>/deps").to_owned();
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // The whole workspace: naming packages would unify features differently and build
        // everything a second time.
        build.current_dir(workspace()).args(["test", "--workspace", "--no-run", "--quiet"]);
        build.args(["--test", "local", "--test", "devices"]);
        match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => {}
            Some(profile) => {
                build.args(["--profile", profile]);
            }
        }
        build.env("CARGO_TARGET_DIR", folder.parent().expect("profiles lie in the target folder"));
        // Cargo sets variables for a test's package that build scripts of libraries treat as
        // changes. Without this, each test run would rebuild the TLS library and its dependents.
        for (name, _) in std::env::vars_os() {
            let is_set_by_cargo =
                |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "OUT_DIR";
            if name.to_str().is_some_and(is_set_by_cargo) {
                build.env_remove(name);
            }
        }
        assert!(build.status().expect("cargo runs").success(), "the programs do not build");
        folder
    })
}

/// Runs the worker and waits for it.
pub fn run_worker<I: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = I>) -> Output {
    Command::new(worker()).args(arguments).output().expect("the worker starts")
}
