//! Where NVIDIA's libraries may lie: where the system looks, in a CUDA installation, and in Python's packages, as images for machine
//! learning have them.

use std::error::Error;
use std::path::{Path, PathBuf};

use libloading::Library;

/// CUDA installations, beside what the system searches.
const INSTALLED: [&str; 2] = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"];
/// Where Pythons are, each in a folder `python3.*`.
const PYTHONS: [&str; 5] = ["/usr/lib", "/usr/local/lib", "/opt/conda/lib", "/venv/main/lib", "/opt/venv/lib"];
/// Releases of cuBLAS whose functions, as far as they are needed, are the same.
const BLAS_RELEASES: [u32; 3] = [13, 12, 11];

/// A library that stays until the program ends: the table keeps its addresses.
type Kept = &'static Library;

/// The driver's own, from where the system has it and nowhere else: it must be that of the running kernel module.
pub(crate) fn driver() -> Result<Kept, String> {
    open(Path::new("libcuda.so.1"))
}

/// cuBLAS, the newest that a driver for this major version of CUDA serves.
pub(crate) fn blas(driver: u32) -> Result<Kept, String> {
    let names: Vec<String> = BLAS_RELEASES
        .iter()
        .filter(|release| **release <= driver)
        .map(|release| format!("libcublas.so.{release}"))
        .collect();
    search(&names, &["cublas", "cu13"])
}

/// cuRAND, which newer Python packages leave out.
pub(crate) fn random() -> Result<Kept, String> {
    search(&["libcurand.so.10".to_owned()], &["curand", "cu13"])
}

/// The first of these names that opens, in the order of the names. Else what each place said, the last of it.
fn search(names: &[String], packages: &[&str]) -> Result<Kept, String> {
    let folders: Vec<PathBuf> = INSTALLED.iter().map(PathBuf::from).chain(in_packages(packages)).collect();
    let mut said = String::new();
    for name in names {
        let places = std::iter::once(PathBuf::from(name)).chain(folders.iter().map(|folder| folder.join(name)));
        for place in places {
            // Asked first: what is not there at all would hide what is there and does not open.
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

fn open(path: &Path) -> Result<Kept, String> {
    // SAFETY: NVIDIA's libraries may be opened at any time; what else has their names runs with our rights, as everything on the
    // library path does.
    let library = unsafe { Library::new(path) }.map_err(|error| {
        // The system's own words say which file, and what of it.
        error.source().map_or_else(|| error.to_string(), ToString::to_string)
    })?;
    Ok(Box::leak(Box::new(library)))
}
