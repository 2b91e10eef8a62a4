//! `release.sh`: content of the archive, and that it works from there.

use std::fs;
use std::process::Command;

use outliers_protocol::VersionInfo;
use outliers_tests::programs::{controller, workspace};

#[test]
fn release_archive_holds_programs_completions_man_pages_and_licences() {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut pack = Command::new(workspace().join("release.sh"));
    pack.arg("--from").arg(controller().parent().unwrap()).args(["--output", "out"]).current_dir(folder.path());
    let packed = pack.output().unwrap();
    assert!(packed.status.success(), "{packed:?}");

    let name = format!("outliers-{}-x86_64-linux", env!("CARGO_PKG_VERSION"));
    let (archive, there) = (folder.path().join(format!("out/{name}.tar.gz")), folder.path().join("there"));
    fs::create_dir(&there).unwrap();
    assert!(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(&there).status().unwrap().success());
    let there = there.join(name);
    let licences = ["LICENSE-MIT", "LICENSE-APACHE"];
    for file in licences.into_iter().chain(["completions/outliers.zsh", "man/man1/outliers-deploy.1"]) {
        assert!(fs::metadata(there.join(file)).unwrap().len() > 100, "{file}");
    }

    let version = Command::new(there.join("outliers")).arg("--version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let begins = format!("outliers {} (commit ", env!("CARGO_PKG_VERSION"));
    assert!(version.starts_with(&begins) && version.contains(", schema 1)"), "{version}");
    let worker = Command::new(there.join("outliers-worker")).args(["version", "--json"]).output().unwrap();
    let told = fs::read(there.join("outliers-worker-portable.json")).unwrap();
    let read = |text: &[u8]| serde_json::from_slice::<VersionInfo>(text).unwrap();
    assert_eq!(read(&told), read(&worker.stdout), "what a controller is told that cannot run it");
}
