//! Search for NVIDIA's libraries: the system's search path, CUDA installations, and Python
//! packages, as in images for machine learning.

use std::error::Error;
use std::path::{Path, PathBuf};

use libloading::Library;

/// CUDA installations that are searched after the system's path.
const INSTALLED: [&str; 2] = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"];
/// Folders with Python installations, each `python3.*`.
const PYTHONS: [&str; 5] = ["/usr/lib", "/usr/local/lib", "/opt/conda/lib", "/venv/main/lib", "/opt/venv/lib"];
/// Releases of cuBLAS whose functions, as far as they are needed, are the same.
const BLAS_RELEASES: [u32; 3] = [13, 12, 11];

/// A library that stays loaded until the program ends, because the table keeps its addresses.
type LoadedLibrary = &'static Library;

/// The driver library from the system's search path only: it must fit the running kernel module.
pub(crate) fn driver() -> Result<LoadedLibrary, String> {
    open(Path::new("libcuda.so.1"))
}

/// The newest cuBLAS for the driver's CUDA version.
pub(crate) fn blas(driver: u32) -> Result<LoadedLibrary, String> {
    let names: Vec<String> = BLAS_RELEASES
        .iter()
        .filter(|release| **release <= driver)
        .map(|release| format!("libcublas.so.{release}"))
        .collect();
    search(&names, &["cublas", "cu13"])
}

/// cuRAND. Newer Python packages do not contain it.
pub(crate) fn random() -> Result<LoadedLibrary, String> {
    search(&["libcurand.so.10".to_owned()], &["curand", "cu13"])
}

/// Opens the first of these names that loads, in order. The error is the last one of each place.
fn search(names: &[String], packages: &[&str]) -> Result<LoadedLibrary, String> {
    let folders: Vec<PathBuf> = INSTALLED.iter().map(PathBuf::from).chain(in_packages(packages)).collect();
    let mut said = String::new();
    for name in names {
        let places = std::iter::once(PathBuf::from(name)).chain(folders.iter().map(|folder| folder.join(name)));
        for place in places {
            // Existing files are tried first: an error of a missing file would hide the error of a
            // file that does not load.
            if place.is_absolute() && !place.exists() {
                continue;
            }
            match open(&place) {
                Ok(library) => return Ok(library),
                Err(why) => said = why,
            }
        }
    }
    Err(format!("{said}; looked in the system's places, {}, and packages of Python", INSTALLED[0]))
}

/// `<python>/{site,dist}-packages/nvidia/<package>/lib`.
fn in_packages(packages: &[&str]) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for python in PYTHONS.iter().filter_map(|root| std::fs::read_dir(root).ok()).flatten().flatten() {
        if !python.file_name().to_string_lossy().starts_with("python3") {
            continue;
        }
        for site in ["site-packages", "dist-packages"] {
            let lib = |package: &&str| python.path().join(site).join("nvidia").join(package).join("lib");
            folders.extend(packages.iter().map(lib).filter(|folder| folder.is_dir()));
        }
    }
    folders
}

fn open(path: &Path) -> Result<LoadedLibrary, String> {
    // SAFETY: NVIDIA's libraries may be opened at any time; what else has their names runs with
    // our rights, as everything on the library path does.
    let library = unsafe { Library::new(path) }.map_err(|error| {
        // The system's message names the file and the cause.
        error.source().map_or_else(|| error.to_string(), ToString::to_string)
    })?;
    Ok(Box::leak(Box::new(library)))
}
