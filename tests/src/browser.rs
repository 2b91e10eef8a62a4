//! Pages in a real headless browser.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Measures of a page in a window, taken from outside: the page permits no script.
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

/// A Chromium.
pub struct Browser(PathBuf);

impl Browser {
    /// The installed browser.
    pub fn find() -> Option<Self> {
        let path = std::env::var_os("PATH")?;
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let places = std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name)));
        places.into_iter().find(|place| place.is_file()).map(Self)
    }

    /// The rendered document, and the browser's messages.
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

    /// Opens a page of `outliers compare` in a phone-sized and a desktop window, in light and dark
    /// mode.
    ///
    /// # Panics
    /// If it does not fit the window, the browser reports an error, or it does not have exactly
    /// these `plots`.
    pub fn assert_readable(&self, page: &Path, title: &str, plots: &BTreeSet<String>) {
        let (_, complaints) = self.open(page, false);
        assert!(complaints.is_empty(), "{complaints:?}");
        for (width, dark, background) in [(360, false, "rgb(255, 255, 255)"), (1440, true, "rgb(20, 24, 29)")] {
            let seen = self.measure(page, width, dark);
            assert_eq!(seen["title"], title, "no name breaks out");
            assert_eq!(seen["width"], width);
            assert!(seen["needed"].as_u64().unwrap() <= u64::from(width), "it scrolls sideways: {seen}");
            assert_eq!(seen["outside"], 0, "{seen}");
            let figures: BTreeSet<String> =
                seen["figures"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect();
            assert_eq!(&figures, plots, "every plot is there");
            for holds in ["named", "tables", "reachable"] {
                assert_eq!(seen[holds], true, "{holds}: {seen}");
            }
            assert!(seen["least_text"].as_f64().unwrap() >= 10.0, "{seen}");
            assert_eq!(seen["scripts"], 0);
            assert_eq!((seen["background"].as_str(), seen["surface"].as_str()), (Some(background), Some(background)));
        }
    }
}

/// Names of the plots in a folder that `outliers compare --svg` has filled.
///
/// # Panics
/// If there is no such folder.
pub fn plots(folder: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    names.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}
