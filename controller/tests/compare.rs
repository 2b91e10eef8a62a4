//! `compare` and `import` as they are used, and the page in a real browser.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use outliers_tests::browser::{Browser, plots};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "../src/compare/fixture.rs"]
mod fixture;

use fixture::{change, copy, rename};

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
fn context() -> TempDir {
    let context = tempfile::tempdir().unwrap();
    let results = context.path().join("remote_results");
    rename(&copy("mixture", &results.join("survey/one")), "allenai/OLMoE-1B-7B-0125");
    rename(&copy("dense", &results.join("gpt2-run")), EVIL);
    context
}

#[test]
fn predecessor_runs_are_imported_and_compared() {
    let context = context();
    let old = context.path().join("old");
    fs::create_dir(&old).unwrap();
    let feature = json!({"feature_dim": 7, "layer_percentage": 0.5, "seq_percentage": 0.25, "max_magnitude": 17.0});
    let batch = json!({"sequences_processed": 1, "systematic_outliers": [feature]});
    let analysis = json!({
        "analysis_summary": {"total_batches": 2, "total_sequences": 2, "total_systematic_outliers": 2},
        "run_config": {"model": "allenai/OLMoE-1B-7B-0125", "sequence_length": 2048, "batch_size": 1, "threshold": 6.0},
        "batch_results": [batch, batch],
    });
    fs::write(old.join("final_analysis_results.json"), analysis.to_string()).unwrap();
    let imported = outliers(context.path(), &["import", "old"]);
    assert!(imported.status.success(), "{:?}", said(&imported));

    let compared = outliers(context.path(), &["compare", "--json"]);
    assert!(compared.status.success(), "{:?}", said(&compared));
    let document: Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert_eq!(document["models"].as_array().unwrap().len(), 3);
    let figures = document["figures"].as_array().unwrap();
    let imported: Vec<&Value> = figures.iter().filter(|figure| figure["source"] == "imported").collect();
    assert_eq!(imported.len(), 2, "mean and sum, by norm outputs");
    assert!(imported.iter().any(|f| f["reading"] == "sum_over_sequences" && f["count"]["value"] == 2.0));
    let number = imported[0]["number"].clone();

    // A run that is done later, and the same import again: the number stays.
    let later = copy("dense", &context.path().join("remote_results/a-later-run"));
    change(&later, "metadata.json", |metadata| metadata["finished_at_ms"] = json!(4_000_000_000_000_u64));
    assert!(outliers(context.path(), &["import", "old"]).status.success());
    let compared = outliers(context.path(), &["compare", "--json"]);
    let document: Value = serde_json::from_slice(&compared.stdout).unwrap();
    let figures = document["figures"].as_array().unwrap();
    let mut imported = figures.iter().filter(|figure| figure["source"] == "imported");
    assert!(imported.all(|figure| figure["number"] == number), "{figures:?}");

    fs::write(old.join("final_analysis_results.json"), &analysis.to_string()[..200]).unwrap();
    let refused = outliers(context.path(), &["import", "old"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(said(&refused).1.contains("cut off"));
}

#[test]
fn damaged_result_stops_the_comparison_and_is_named() {
    let context = context();
    let file = context.path().join("remote_results/gpt2-run/results.json");
    fs::write(&file, fs::read_to_string(&file).unwrap().replacen("1", "2", 1)).unwrap();
    let stopped = outliers(context.path(), &["compare"]);
    let (stdout, stderr) = said(&stopped);
    assert_eq!((stopped.status.code(), stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("gpt2-run is damaged: results.json") && stderr.contains("--allow-partial"), "{stderr}");
    let allowed = outliers(context.path(), &["compare", "--allow-partial", "--format", "markdown"]);
    assert!(allowed.status.success());
    assert!(said(&allowed).0.contains("NO FIGURES, damaged"));
}

#[test]
fn page_and_plots_are_reproducible() {
    let context = context();
    let make = |name: &str| {
        let made =
            outliers(context.path(), &["compare", "--html", name, "--svg", "svg", "--png", "png", "--format", "csv"]);
        assert!(made.status.success(), "{:?}", said(&made));
        fs::read_to_string(context.path().join(name)).unwrap()
    };
    let page = make("a.html");
    assert_eq!(page, make("b.html"));
    for drawing in plots(&context.path().join("svg")) {
        let svg = fs::read_to_string(context.path().join("svg").join(format!("{drawing}.svg"))).unwrap();
        assert!(page.contains(&svg) && svg.contains("xmlns="), "{drawing}");
        let png = fs::read(context.path().join("png").join(format!("{drawing}.png"))).unwrap();
        let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
        let size = format!("viewBox=\"0 0 {} {}\"", number(16), number(20));
        assert!(png.starts_with(b"\x89PNG\r\n\x1a\n") && svg.contains(&size), "{drawing}: {size}");
    }
}

#[test]
fn figures_have_the_requested_size_and_models() {
    let context = context();
    let made = outliers(
        context.path(),
        &["compare", "--svg", "s", "--png", "p", "--pdf", "f", "--size", "84mm", "--dpi", "300", "--only", "one"],
    );
    assert!(made.status.success(), "{:?}", said(&made));
    assert!(said(&made).0.contains("OLMoE") && !said(&made).0.contains("onerror"), "{:?}", said(&made));
    let drawings = plots(&context.path().join("s"));
    assert!(drawings.iter().any(|name| name == "affected-parameters-paper"), "{drawings:?}");
    for drawing in drawings {
        let read = |folder: &str, kind: &str| {
            let file = context.path().join(folder).join(format!("{drawing}.{kind}"));
            fs::read(file).unwrap()
        };
        let svg = String::from_utf8(read("s", "svg")).unwrap();
        assert!(svg.contains("width=\"3.3071in\""), "{drawing}");
        let png = read("p", "png");
        assert_eq!(u32::from_be_bytes(png[16..20].try_into().unwrap()), 992, "{drawing}");
        let pdf = String::from_utf8(read("f", "pdf")).unwrap();
        assert!(pdf.contains("/MediaBox [0 0 238.110 "), "{drawing}");
    }
    for wrong in [&["--only", "nobody"][..], &["--size", "84"], &["--dpi", "300"]] {
        let arguments = ["compare"].iter().chain(wrong).copied().collect::<Vec<_>>();
        assert_eq!(outliers(context.path(), &arguments).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn results_are_listed_shown_and_recounted() {
    let context = context();
    let list = outliers(context.path(), &["results", "list"]);
    let (stdout, _) = said(&list);
    assert!(list.status.success() && stdout.contains("allenai/OLMoE-1B-7B-0125"), "{stdout}");
    assert!(stdout.contains("gpt2-run") && stdout.contains("complete"), "{stdout}");
    for run in ["gpt2-run", "ru", "remote_results/gpt2-run", "survey/one"] {
        let shown = outliers(context.path(), &["results", "show", run]);
        assert!(shown.status.success() && said(&shown).0.contains("unique features, by layers"), "{run}: {shown:?}");
    }
    let nothing = outliers(context.path(), &["results", "show", "zzz"]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(said(&nothing).1.contains("results list"));

    let document = |more: &[&str]| {
        let arguments = ["results", "recount", "gpt2-run", "--json"].iter().chain(more).copied().collect::<Vec<_>>();
        let counted = outliers(context.path(), &arguments);
        assert!(counted.status.success(), "{:?}", said(&counted));
        serde_json::from_slice::<Value>(&counted.stdout).unwrap()
    };
    let [low, high] = ["0.01", "1"].map(|share| document(&["--layer-fraction", share]));
    assert_eq!(low["recounted"], true);
    assert_eq!(low["own_thresholds"]["layer_fraction"], 0.25);
    let count = |document: &Value| document["results"]["verdicts"][0]["count"].as_f64().unwrap();
    assert!(count(&low) > count(&high), "{} {}", count(&low), count(&high));
    let told = outliers(context.path(), &["results", "recount", "gpt2-run", "--position-fraction", "0.5"]);
    assert!(said(&told).0.starts_with("RECOUNTED from stored counts"), "{told:?}");
    for refused in [&["--threshold", "5"][..], &[]] {
        let arguments = ["results", "recount", "gpt2-run"].iter().chain(refused).copied().collect::<Vec<_>>();
        assert_eq!(outliers(context.path(), &arguments).status.code(), Some(2), "{refused:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn open_passes_the_page_to_the_browser() {
    use std::os::unix::fs::PermissionsExt;

    let context = context();
    let opener = context.path().join("bin/xdg-open");
    fs::create_dir(context.path().join("bin")).unwrap();
    fs::write(&opener, "#!/bin/sh\nprintf %s \"$1\" > \"$HOME/opened\"\n").unwrap();
    fs::set_permissions(&opener, fs::Permissions::from_mode(0o755)).unwrap();
    let open = |path: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_outliers"));
        command.args(["results", "open", "gpt2-run"]).current_dir(context.path()).env_clear();
        command.env("HOME", context.path()).env("OUTLIERS_STATE", context.path().join("state"));
        command.env("PATH", path).output().unwrap()
    };
    let opened = open(&context.path().join("bin"));
    assert!(opened.status.success(), "{:?}", said(&opened));
    let page = fs::read_to_string(context.path().join("opened")).unwrap();
    assert!(fs::read_to_string(&page).unwrap().contains("<svg"), "{page}");
    let alone = open(&context.path().join("nothing"));
    assert!(alone.status.success() && said(&alone).1.contains("no browser"), "{:?}", said(&alone));
    assert!(said(&alone).0.contains("page.html"));
}

// ------------------------------------------------------------------------------------ in a browser

#[test]
fn page_is_readable_on_phone_and_desktop_in_light_and_dark() {
    let Some(browser) = Browser::find() else {
        outliers_tests::not_checked("no Chromium is installed");
        return;
    };
    let context = context();
    let made = outliers(context.path(), &["compare", "--html", "page.html", "--svg", "svg"]);
    assert!(made.status.success(), "{:?}", said(&made));
    let plots = plots(&context.path().join("svg"));
    assert!(plots.len() > 20);
    browser.assert_readable(&context.path().join("page.html"), "Outlier features in 2 results", &plots);
}
