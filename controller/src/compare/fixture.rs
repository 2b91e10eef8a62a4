//! Result folders for tests: modified copies of real runs (`controller/tests/results`) with valid
//! manifests.

use std::fs;
use std::path::{Path, PathBuf};

use outliers_protocol::files;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A copy of a fixture at `into`, which must not exist.
pub(crate) fn copy(name: &str, into: &Path) -> PathBuf {
    let from = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/results")).join(name);
    fs::create_dir_all(into).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, into.join(path.file_name().unwrap())).unwrap();
    }
    into.to_owned()
}

/// Changes a document of a folder and updates the manifest.
pub(crate) fn change(folder: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = folder.join(name);
    let mut document: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut document);
    fs::write(path, document.to_string()).unwrap();
    write_manifest(folder);
}

/// Writes the manifest of a folder's files.
pub(crate) fn write_manifest(folder: &Path) {
    let manifest = folder.join(files::MANIFEST);
    let mut document: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    for file in document["files"].as_array_mut().unwrap() {
        let bytes = fs::read(folder.join(file["name"].as_str().unwrap())).unwrap();
        file["bytes"] = json!(bytes.len());
        file["sha256"] = json!(Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>());
    }
    fs::write(manifest, document.to_string()).unwrap();
}

/// Renames the model of a run.
pub(crate) fn rename(folder: &Path, model: &str) {
    change(folder, files::RESULTS, |results| results["model"] = json!(model));
    change(folder, files::METADATA, |metadata| metadata["model"]["name"] = json!(model));
}
