//! Display names of models in folders.

use std::path::Path;

use serde::Deserialize;

use crate::files::read_json;
use crate::text::clean;

/// Folder names that do not identify a model.
const NOTHING: [&str; 7] = ["model", "models", "checkpoint", "checkpoints", "snapshots", "weights", "hf"];
/// Maximum characters of a name.
const LONGEST: usize = 100;

/// A hub id unchanged; of a path the last part that identifies the model.
pub(crate) fn short(model: &str) -> String {
    let last = last(model);
    let above = || model.split('/').rev().find(|part| !matches!(*part, "" | "." | "..") && says_something(part));
    if says_something(last) { last.to_owned() } else { above().map_or_else(|| last.to_owned(), readable) }
}

/// A hub id unchanged; of a path its last part.
fn last(model: &str) -> &str {
    let is_id = model.split('/').count() == 2 && !model.starts_with(['/', '.']);
    let last = model.trim_end_matches('/').rsplit('/').next().filter(|last| !last.is_empty() && !is_id);
    last.unwrap_or(model)
}

/// Name of the model in a folder with an uninformative name: from its config.json, else the next
/// parent folder with a name. `None`: the folder's name is used.
pub(crate) fn of_folder(folder: &Path) -> Option<String> {
    let names = || folder.ancestors().filter_map(|folder| folder.file_name()?.to_str());
    if names().next().is_none_or(says_something) {
        return None;
    }
    let above = || names().skip(1).find(|name| says_something(name)).map(readable);
    loaded_from(folder).or_else(above).filter(|name| is_plain(name))
}

/// Whether a folder's name identifies a model: it is neither a general word nor a commit of the
/// hub's cache.
fn says_something(name: &str) -> bool {
    let is_commit = name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    !is_commit && !NOTHING.contains(&name.to_lowercase().as_str())
}

/// Folders of the hub's cache are named `models--owner--name`.
fn readable(name: &str) -> String {
    name.strip_prefix("models--").map_or_else(|| name.to_owned(), |id| id.replace("--", "/"))
}

fn loaded_from(folder: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(rename = "_name_or_path")]
        name_or_path: String,
    }
    let Config { name_or_path } = read_json(&folder.join("config.json")).ok()?;
    let name = last(&name_or_path);
    (says_something(name) && is_plain(name)).then(|| name.to_owned())
}

/// Whether the text fits in a line of a table.
fn is_plain(name: &str) -> bool {
    !name.trim().is_empty() && clean(name.as_bytes(), LONGEST) == name
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn path_is_named_by_its_last_part_and_id_unchanged() {
        for (model, called) in [
            ("allenai/OLMoE-1B-7B-0125", "allenai/OLMoE-1B-7B-0125"),
            ("/home/me/checkpoints/tiny", "tiny"),
            ("./tiny/", "tiny"),
            ("/data/tiny/model", "tiny"),
            ("/hub/models--owner--name/snapshots/0123456789abcdef0123456789abcdef01234567", "owner/name"),
            ("/model", "model"),
            ("OLMoE, step 5", "OLMoE, step 5"),
            ("/", "/"),
            ("", ""),
        ] {
            assert_eq!(short(model), called);
        }
    }

    #[test]
    fn generic_folder_names_are_replaced_by_better_ones() {
        let home = tempfile::tempdir().unwrap();
        let called = |folder: &str, config: Option<&str>| {
            let folder = home.path().join(folder);
            fs::create_dir_all(&folder).unwrap();
            let _ = fs::remove_file(folder.join("config.json"));
            if let Some(config) = config {
                fs::write(folder.join("config.json"), config).unwrap();
            }
            of_folder(&folder)
        };
        let named = |name: &str| Some(format!(r#"{{"_name_or_path": "{name}", "hidden_size": 8}}"#));
        assert_eq!(called("olmoe-tiny", named("owner/other").as_deref()), None, "the folder's own name says enough");
        assert_eq!(called("run-7/model", named("owner/name").as_deref()), Some("owner/name".into()));
        assert_eq!(called("run-7/model", named("/data/llama-x").as_deref()), Some("llama-x".into()));
        let odd = [named(""), named("/data/model"), named("a\\u001b[2J"), None, Some("[]".into()), Some("{".into())];
        for nothing in odd {
            assert_eq!(called("run-7/model", nothing.as_deref()), Some("run-7".into()), "{nothing:?}");
            assert_eq!(called("run-8/Checkpoint/weights", nothing.as_deref()), Some("run-8".into()), "{nothing:?}");
        }
        let cached = "models--owner--name/snapshots/0123456789abcdef0123456789abcdef01234567";
        assert_eq!(called(cached, None), Some("owner/name".into()));
        assert_eq!((of_folder(Path::new("/model")), of_folder(Path::new("/"))), (None, None), "nothing says more");
    }
}
