//! `compare` and `import` as they are used, and the page in a real browser.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "../src/compare/fixture.rs"]
mod fixture;

use fixture::{copy, rename};

/// `outliers ARGUMENTS` in a folder.
fn outliers(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outliers"));
    command.args(arguments).current_dir(folder).env_clear();
    command.env("HOME", folder).env("OUTLIERS_STATE", folder.join("state")).output().unwrap()
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

const EVIL: &str = "</title><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&";

/// A folder with two results of surveys, one of them with a hostile name.
fn desk() -> TempDir {
    let desk = tempfile::tempdir().unwrap();
    let results = desk.path().join("remote_results");
    rename(&copy("mixture", &results.join("survey/one")), "allenai/OLMoE-1B-7B-0125");
    rename(&copy("dense", &results.join("gpt2-run")), EVIL);
    desk
}

#[test]
fn old_runs_are_imported_and_compared_beside_ours() {
    let desk = desk();
    let old = desk.path().join("old");
    fs::create_dir(&old).unwrap();
    let feature = json!({"feature_dim": 7, "layer_percentage": 0.5, "seq_percentage": 0.25, "max_magnitude": 17.0});
    let batch = json!({"sequences_processed": 1, "systematic_outliers": [feature]});
    let analysis = json!({
        "analysis_summary": {"total_batches": 2, "total_sequences": 2, "total_systematic_outliers": 2},
        "run_config": {"model": "allenai/OLMoE-1B-7B-0125", "sequence_length": 2048, "batch_size": 1, "threshold": 6.0},
        "batch_results": [batch, batch],
    });
    fs::write(old.join("final_analysis_results.json"), analysis.to_string()).unwrap();
    let imported = outliers(desk.path(), &["import", "old"]);
    assert!(imported.status.success(), "{:?}", said(&imported));

    let compared = outliers(desk.path(), &["compare", "--json"]);
    assert!(compared.status.success(), "{:?}", said(&compared));
    let document: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert_eq!(document["models"].as_array().unwrap().len(), 3);
    let figures = document["figures"].as_array().unwrap();
    let imported: Vec<&Value> = figures.iter().filter(|figure| figure["source"] == "imported").collect();
    assert_eq!(imported.len(), 2, "mean and sum, by norm outputs");
    assert!(imported.iter().any(|f| f["reading"] == "sum_over_sequences" && f["count"]["value"] == 2.0));

    fs::write(old.join("final_analysis_results.json"), &analysis.to_string()[..200]).unwrap();
    let refused = outliers(desk.path(), &["import", "old"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(said(&refused).1.contains("cut off"));
}

#[test]
fn a_damaged_result_stops_the_comparison_and_is_named() {
    let desk = desk();
    let file = desk.path().join("remote_results/gpt2-run/results.json");
    fs::write(&file, fs::read_to_string(&file).unwrap().replacen("1", "2", 1)).unwrap();
    let stopped = outliers(desk.path(), &["compare"]);
    let (stdout, stderr) = said(&stopped);
    assert_eq!((stopped.status.code(), stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("gpt2-run is damaged: results.json") && stderr.contains("--allow-partial"), "{stderr}");
    let allowed = outliers(desk.path(), &["compare", "--allow-partial", "--format", "markdown"]);
    assert!(allowed.status.success());
    assert!(said(&allowed).0.contains("NO FIGURES, damaged"));
}

#[test]
fn the_page_and_the_drawings_are_the_same_whenever_they_are_made() {
    let desk = desk();
    let make = |name: &str| {
        let made =
            outliers(desk.path(), &["compare", "--html", name, "--svg", "svg", "--png", "png", "--format", "csv"]);
        assert!(made.status.success(), "{:?}", said(&made));
        fs::read_to_string(desk.path().join(name)).unwrap()
    };
    let page = make("a.html");
    assert_eq!(page, make("b.html"));
    for drawing in drawings(desk.path()) {
        let svg = fs::read_to_string(desk.path().join("svg").join(format!("{drawing}.svg"))).unwrap();
        assert!(page.contains(&svg) && svg.contains("xmlns="), "{drawing}");
        let png = fs::read(desk.path().join("png").join(format!("{drawing}.png"))).unwrap();
        let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
        let size = format!("viewBox=\"0 0 {} {}\"", number(16), number(20));
        assert!(png.starts_with(b"\x89PNG\r\n\x1a\n") && svg.contains(&size), "{drawing}: {size}");
    }
}

fn drawings(desk: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(desk.join("svg")).unwrap().map(|entry| entry.unwrap().path());
    names.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

// ---------------------------------------------------------------------------------------------------- in a browser

/// What a reader's window shows, measured from outside: the page itself lets no script run.
const PROBE: &str = r"
const frame = document.querySelector('iframe');
frame.addEventListener('load', () => {
    const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
    const drawings = [...page.querySelectorAll('figure svg')];
    const scale = drawing => drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
    const sizes = drawings.flatMap(drawing => [...drawing.querySelectorAll('text')].map(
        text => parseFloat(view.getComputedStyle(text).fontSize) * scale(drawing)));
    const outside = [...page.querySelectorAll('main *')].filter(
        element => !element.closest('.scroll') && element.getBoundingClientRect().right > view.innerWidth + 1);
    const label = element => element && element.textContent.trim();
    document.documentElement.dataset.measured = JSON.stringify({
        title: page.title,
        width: view.innerWidth,
        needed: root.scrollWidth,
        figures: drawings.map(drawing => drawing.closest('figure').id),
        named: drawings.every(drawing => drawing.getAttribute('role') === 'img'
            && drawing.getAttribute('aria-labelledby').split(' ').every(id => label(page.getElementById(id)))),
        least_text: Math.min(...sizes),
        outside: outside.length,
        tables: [...page.querySelectorAll('table')].every(table => table.caption && table.querySelector('th[scope=col]')
            && [...table.tBodies[0].rows].every(row => row.querySelector('th[scope=row]'))),
        reachable: [...page.querySelectorAll('.scroll')].every(region => region.tabIndex === 0 && region.getAttribute('aria-label')),
        scripts: page.scripts.length + page.images.length,
        background: view.getComputedStyle(root).backgroundColor,
        surface: view.getComputedStyle(page.querySelector('svg rect')).fill,
    });
});
";

struct Browser(PathBuf);

impl Browser {
    /// The one that is installed.
    fn find() -> Option<Self> {
        let path = std::env::var_os("PATH")?;
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let places = std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name)));
        places.into_iter().find(|place| place.is_file()).map(Self)
    }

    /// The document that a page becomes, and what the browser complains of.
    fn open(&self, page: &Path, dark: bool) -> (String, Vec<String>) {
        let profile = tempfile::tempdir().unwrap();
        let mut command = Command::new(&self.0);
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]);
        command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
        command.args(["--enable-logging=stderr", "--window-size=1600,1000", "--dump-dom"]);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.arg(format!("--blink-settings=preferredColorScheme={}", if dark { 0 } else { 1 }));
        let output = command.arg(format!("file://{}", page.display())).output().unwrap();
        let (document, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && document.contains("</html>"), "{log}");
        let complaints = log.lines().filter(|line| line.contains("CONSOLE")).map(str::to_owned);
        (document.into_owned(), complaints.collect())
    }

    /// Measures a page in a window of this width.
    fn measure(&self, page: &Path, width: u32, dark: bool) -> Value {
        let escaped = fs::read_to_string(page).unwrap().replace('&', "&amp;").replace('"', "&quot;");
        let frame = format!("<iframe style=\"width:{width}px;height:900px;border:0\" srcdoc=\"{escaped}\"></iframe>");
        let harness = page.with_extension("harness.html");
        let head = "<!doctype html><html><meta charset=\"utf-8\"><body style=\"margin:0\">";
        fs::write(&harness, format!("{head}{frame}<script>{PROBE}</script></body></html>")).unwrap();
        let (document, complaints) = self.open(&harness, dark);
        assert!(complaints.is_empty(), "{complaints:?}");
        let measured = document.split("data-measured=\"").nth(1).and_then(|rest| rest.split('"').next());
        let measured =
            measured.expect("the page loads").replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">");
        serde_json::from_str(&measured.replace("&amp;", "&")).unwrap()
    }
}

#[test]
fn the_page_can_be_read_in_a_browser_on_a_phone_and_on_a_desk_by_day_and_by_night() {
    let Some(browser) = Browser::find() else {
        eprintln!("skipped: no Chromium is installed");
        return;
    };
    let desk = desk();
    let made = outliers(desk.path(), &["compare", "--html", "page.html", "--svg", "svg"]);
    assert!(made.status.success(), "{:?}", said(&made));
    let page = desk.path().join("page.html");
    let (_, complaints) = browser.open(&page, false);
    assert!(complaints.is_empty(), "{complaints:?}");
    for (width, dark, background) in [(360, false, "rgb(255, 255, 255)"), (1440, true, "rgb(20, 24, 29)")] {
        let seen = browser.measure(&page, width, dark);
        assert_eq!(seen["title"], "Outlier features in 2 results", "no name breaks out");
        assert_eq!(seen["width"], width);
        assert!(seen["needed"].as_u64().unwrap() <= u64::from(width), "it scrolls sideways: {seen}");
        assert_eq!(seen["outside"], 0, "{seen}");
        let figures: BTreeSet<String> =
            seen["figures"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect();
        assert_eq!(figures, drawings(desk.path()), "every plot is there");
        assert!(figures.len() > 20);
        for holds in ["named", "tables", "reachable"] {
            assert_eq!(seen[holds], true, "{holds}: {seen}");
        }
        assert!(seen["least_text"].as_f64().unwrap() >= 10.0, "{seen}");
        assert_eq!(seen["scripts"], 0);
        assert_eq!((seen["background"].as_str(), seen["surface"].as_str()), (Some(background), Some(background)));
    }
}
