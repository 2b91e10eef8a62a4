//! Files, settings and names from users and third parties: invalid ones are refused by name, reads
//! are bounded, and no secret is printed.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use outliers_clouds::dialect::lambda::Lambda;
use outliers_clouds::{FakeCloud, How, KEY, Op, Refusal};
use outliers_tests::context::{Said, TestContext};
use outliers_tests::programs::{golden, workspace};
use serde_json::{Value, json};

use crate::clouds::CloudContext;

/// A model folder to damage.
fn model(context: &TestContext) -> PathBuf {
    let folder = context.work().join("model");
    fs::create_dir(&folder).unwrap();
    for entry in fs::read_dir(golden("llama-f32").join("model")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    folder
}

/// A pipe without a writer.
fn pipe(path: &Path) {
    let _ = fs::remove_file(path);
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A terabyte of zeros.
fn endless(path: &Path) {
    fs::File::create(path).unwrap().set_len(1 << 40).unwrap();
}

fn dry_run(context: &TestContext, more: &[&str]) -> Said {
    let options = ["deploy", "--dry-run", "--model", "./model", "--num-sequences", "2", "--sequence-length", "16"];
    context.run(options.iter().chain(more))
}

/// Asserts that the command is refused before planning and renting, with these words.
fn assert_refused(context: &TestContext, said: &Said, words: &[&str]) {
    assert_eq!(said.code, Some(2), "{words:?}: {said:?}");
    assert!(words.iter().all(|word| said.stderr.contains(word)), "{words:?}: {said:?}");
    assert!(!said.stderr.contains("panicked"), "{said:?}");
    context.assert_nothing_left();
}

fn change_tokenizer(model: &Path, key: &str, value: &Value) {
    let path = model.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    tokenizer[key] = value.clone();
    fs::write(path, tokenizer.to_string()).unwrap();
}

#[test]
fn memory_filling_or_panicking_tokenizers_are_refused_by_name() {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    let doubled = json!({"type": "Replace", "pattern": {"String": "e"}, "content": "ee"});
    let empty = json!({"type": "Replace", "pattern": {"String": ""}, "content": "e"});
    let second = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [],
        "special_tokens": {}});
    for (key, value, word) in [
        ("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": vec![byte_level; 20]}), "of each byte"),
        ("normalizer", json!({"type": "Sequence", "normalizers": vec![doubled; 40]}), "of each byte"),
        ("normalizer", empty, "empty pattern"),
        ("post_processor", second, "the tokenizer library fails"),
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0}), "the tokenizer library fails"),
    ] {
        let context = TestContext::new();
        change_tokenizer(&model(&context), key, &value);
        assert_refused(&context, &dry_run(&context, &[]), &["tokenizer.json", word]);
    }
}

#[test]
fn uncountable_tokens_are_refused_and_not_multiplied() {
    let context = TestContext::new();
    model(&context);
    let survey = "name = \"s\"\nnum-sequences = 9999999999999\nmodels = [\"./model\"]\n";
    fs::write(context.work().join("s.toml"), survey).unwrap();
    for command in [
        &["plan", "--model", "./model", "--num-sequences", "9999999999999"][..],
        &["inspect", "--model", "./model", "--sequence-length", "18446744073709551615"],
        &["deploy", "--model", "./model", "--num-sequences", "100000000", "--sequence-length", "100000000"],
        &["survey", "s.toml", "-y"],
    ] {
        assert_refused(&context, &context.run(command), &["--num-sequences and --sequence-length go up to"]);
    }
    let folder = context.run(["plan", "--model", "./model", "--revision", "v2"]);
    assert_refused(&context, &folder, &["--revision v2", "the model is a folder"]);
}

#[test]
fn comparison_of_nothing_or_into_nothing_says_what_to_do() {
    let context = TestContext::new();
    assert_refused(&context, &context.run(["compare"]), &["no results yet in ", "outliers demo"]);
    let results = context.work().join("remote_results");
    fs::create_dir(&results).unwrap();
    assert_refused(&context, &context.run(["compare"]), &["no results yet in ", "outliers demo"]);
    let run = results.join("mixture");
    fs::create_dir(&run).unwrap();
    for entry in fs::read_dir(workspace().join("controller/tests/results/mixture")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), run.join(entry.file_name())).unwrap();
    }
    fs::write(context.work().join("notes"), "not a folder").unwrap();
    for more in [["--html", "remote_results"], ["--html", "nowhere/page.html"], ["--svg", "notes"]] {
        let said = context.run(["compare"].iter().chain(&more));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.stderr.contains("cannot be written: ") && said.stderr.contains("--html takes a file"), "{said:?}");
    }
    assert!(!context.work().join("remote_results.part").exists());
}

#[test]
fn doctor_counts_in_plain_words() {
    let said = TestContext::new().run(["doctor"]).ok().stdout;
    let row = |what: &str| said.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {said}"));
    assert!(row("ledger").contains("0 runs, none under way"), "{said}");
    assert!(row("local instances").trim_end().ends_with(" none"), "{said}");
}

#[test]
fn output_to_a_full_disk_is_an_error() {
    let context = TestContext::new();
    for command in [&["offers", "--json"][..], &["runs", "list"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let said = Said::from(context.command(command).stdout(full).output().unwrap());
        assert_eq!(said.code, Some(1), "{command:?}: {said:?}");
        assert!(said.stderr.contains("standard output cannot be written"), "{said:?}");
    }
    let mut head = context.command(["offers", "--json"]);
    let mut head = head.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(head.stdout.take());
    assert_eq!(head.wait().unwrap().code(), Some(0), "a closed pipe is what `head` leaves");
}

/// As `outliers runs cancel "$RUN"` types it where the variable is not set.
#[test]
fn empty_ids_name_nothing() {
    let context = TestContext::new();
    model(&context);
    let sizes = ["--num-sequences", "1", "--sequence-length", "16", "--keep-running", "-y"];
    let _ = context.run(["deploy", "--model", "./model"].iter().chain(&sizes)).ok();
    for command in [
        &["runs", "show", ""][..],
        &["runs", "logs", ""],
        &["runs", "cancel", ""],
        &["attach", ""],
        &["results", "show", ""],
        &["results", "show", "model"],
        &["results", "recount", "", "--layer-fraction", "0.5"],
        &["instances", "terminate", "", "-y"],
        &["reap", "--owner", "", "-y"],
    ] {
        let said = context.run(command);
        assert_eq!(said.code, Some(2), "{command:?}: {said:?}");
    }
    assert_eq!(context.bill().running.len(), 1, "the only instance of the only run is kept");
    let _ = context.run(["instances", "terminate", "--all", "-y"]).ok();
    context.assert_nothing_left();
}

#[test]
fn inspection_over_its_memory_limit_is_refused() {
    let context = TestContext::new();
    model(&context);
    fs::write(context.work().join("book.txt"), "to be or not to be ".repeat(1 << 20)).unwrap();
    fs::write(context.work().join("mine.toml"), "[worker]\ninspect-memory = \"256 MiB\"\n").unwrap();
    let said = dry_run(&context, &["--corpus", "book.txt", "--config", "mine.toml"]);
    assert_refused(&context, &said, &["more than 256.0 MiB of memory", "worker.inspect-memory"]);
}

#[test]
fn pipes_and_endless_files_are_refused_without_waiting() {
    for (name, spoil, more, word) in [
        ("model/config.json", pipe as fn(&Path), &[][..], "not a regular file"),
        ("model/config.json", endless, &[], "over the limit"),
        ("model/tokenizer.json", pipe, &[], "not a regular file"),
        ("model/tokenizer.json", endless, &[], "over the limit"),
        ("model/tokenizer_config.json", pipe, &[], "not a regular file"),
        ("model/model.safetensors", pipe, &[], "not a regular file"),
        ("book.txt", pipe, &["--corpus", "book.txt"], "not a regular file"),
        ("book.txt", endless, &["--corpus", "book.txt"], "are uploaded"),
        ("ids.json", pipe, &["--token-ids", "ids.json"], "not a regular file"),
        ("found.json", pipe, &["--ablate", "./found.json"], "not a regular file"),
        ("found.json", endless, &["--ablate", "./found.json"], "over the limit"),
    ] {
        let context = TestContext::new();
        model(&context);
        let path = context.work().join(name);
        spoil(&path);
        assert_refused(&context, &dry_run(&context, more), &[path.file_name().unwrap().to_str().unwrap(), word]);
    }
}

#[test]
fn settings_survey_token_and_result_pipes_are_refused() {
    let context = TestContext::new();
    pipe(&context.work().join("pipe.toml"));
    for command in [&["--config", "pipe.toml", "status"][..], &["survey", "pipe.toml", "-y"]] {
        assert_refused(&context, &context.run(command), &["pipe.toml", "not a regular file"]);
    }
    let hub = context.work().parent().unwrap().join("hf");
    fs::create_dir(&hub).unwrap();
    pipe(&hub.join("token"));
    let _ = context.run(["status"]).ok();
    let results = context.work().join("results");
    fs::create_dir(&results).unwrap();
    for entry in fs::read_dir(workspace().join("controller/tests/results/mixture")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), results.join(entry.file_name())).unwrap();
    }
    let _ = context.run(["compare", "results"]).ok();
    for (name, spoil) in [("results.json", endless as fn(&Path)), ("results.json", pipe), ("manifest.json", pipe)] {
        spoil(&results.join(name));
        let said = context.run(["compare", "results"]);
        assert!(said.code == Some(1) && said.stderr.contains(name), "{said:?}");
    }
}

#[test]
fn secrets_in_the_settings_are_never_printed() {
    let context = TestContext::new().with("LAMBDA_API_KEY", KEY);
    let settings = context.work().join("mine.toml");
    for text in ["LAMBDA_API_KEY = \"geheim\"", "[brokers.lambda]\nkey = \"geheim\"", "[hub]\nrequests = \"geheim\""] {
        fs::write(&settings, text).unwrap();
        let said = context.run(["--config", "mine.toml", "status"]);
        assert_refused(&context, &said, &["mine.toml"]);
        assert!(!said.stderr.contains("geheim"), "{said:?}");
    }
    fs::write(&settings, "[brokers.lambda]\nbase-url = \"http://me:geheim@127.0.0.1:9\"\n").unwrap();
    let list = ["instances", "list", "--explain"];
    for command in [&["offers", "--explain", "--broker", "lambda"][..], &["doctor"], &list] {
        let said = context.run(["--config", "mine.toml"].iter().chain(command));
        assert!(said.code != Some(0) && (said.stderr.clone() + &said.stdout).contains("127.0.0.1:9"), "{said:?}");
        assert!(!said.stderr.contains("geheim") && !said.stdout.contains("geheim"), "{said:?}");
    }
}

#[test]
fn failed_listing_does_not_claim_there_are_no_instances() {
    let cloud = FakeCloud::start(Lambda);
    let place = CloudContext::new(&[&cloud]);
    let list = ["instances", "list", "--broker", "lambda"];
    assert!(place.context.run(list).ok().stdout.contains("no instances on lambda"));
    cloud.state().fail_always(Op::List, How::Refuse(Refusal::Unauthorized));
    let said = place.context.run(list);
    assert!(said.code == Some(5) && said.stdout.is_empty() && said.stderr.contains("not whole"), "{said:?}");
}

#[test]
fn relative_or_non_utf8_home_is_refused() {
    let context = TestContext::new();
    let odd = OsStr::from_bytes(b"/home/\xff");
    for (home, word) in [(odd, "HOME is not UTF-8"), (OsStr::new("me"), "HOME is not an absolute path")] {
        let mut command = context.command(["status"]);
        let said = Said::from(command.env_remove("OUTLIERS_STATE").env("HOME", home).output().unwrap());
        assert!(said.code == Some(2) && said.stderr.contains(word), "{said:?}");
        assert!(said.stderr.contains("OUTLIERS_STATE") && !context.work().join("me").exists(), "{said:?}");
    }
}

/// The same command with umask 0.
fn without_umask(context: &TestContext, arguments: &[&str]) -> Said {
    let inner = context.command(arguments);
    let mut outer = Command::new("sh");
    outer.args(["-c", "umask 000; exec \"$@\"", "sh"]).arg(inner.get_program()).args(inner.get_args());
    outer.current_dir(context.work()).stdin(Stdio::null()).env_clear();
    outer.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Said::from(outer.output().unwrap())
}

#[test]
fn state_folder_is_private_under_any_umask() {
    let context = TestContext::new();
    let mode = |name: &str| fs::metadata(context.state().join(name)).unwrap().permissions().mode() & 0o7777;
    // This command is the only one that does not make the folder through the ledger.
    fs::write(context.work().join("mine.toml"), "[worker]\nbinary = \"/nowhere/outliers-worker\"\n").unwrap();
    let said = without_umask(&context, &["--config", "mine.toml", "demo"]);
    assert!(said.code == Some(2) && said.stderr.contains("/nowhere"), "{said:?}");
    assert_eq!(mode("."), 0o700);
    let _ = without_umask(&context, &["status"]).ok();
    assert_eq!((mode("."), mode("runs"), mode("ledger.db")), (0o700, 0o700, 0o600));
    // As written by an earlier version.
    fs::set_permissions(context.state(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(context.state().join("ledger.db"), fs::Permissions::from_mode(0o644)).unwrap();
    let _ = without_umask(&context, &["status"]).ok();
    assert_eq!((mode("."), mode("ledger.db")), (0o700, 0o600));
}
