//! Finds a folder on the host where a program can be written and run: a home folder may be mounted
//! `noexec` or read-only.

use crate::host::transport::quote::quote;
use crate::host::{HostError, HostErrorKind, RemoteHost, SHORT, ScriptOutput};

/// Folders tried, in this order, when the home folder is unusable. The login user has a private
/// folder in each.
const BESIDE_HOME: [&str; 3] = ["/var/tmp", "/tmp", "/dev/shm"];

/// `try NUMBER FOLDER UMASK` creates the folder and runs a small program in it. It prints `@place
/// NUMBER`, or `@barred` with the reason. A folder that other users could change is refused.
const TRY: &str = r#"
barred() { echo "@barred $2 $3"; return 1; }
try() {
  (umask "$3"; mkdir -p "$2") 2>/dev/null || { barred "$1" "$2" "cannot be made"; return; }
  if [ "$3" = 077 ] && { [ -h "$2" ] || [ ! -O "$2" ]; }; then barred "$1" "$2" "is another user's"; return; fi
  f="$2/.try.$$"
  rm -f "$f" 2>/dev/null
  (umask 077; printf '#!/bin/sh\nexit 0\n' > "$f" && chmod 700 "$f") 2>/dev/null || {
    rm -f "$f" 2>/dev/null; barred "$1" "$2" "cannot be written"; return; }
  "$f" >/dev/null 2>&1; ran=$?
  rm -f "$f"
  [ $ran = 0 ] || { barred "$1" "$2" "does not run programs (it may be mounted noexec)"; return; }
  echo "@place $1"
}
"#;

impl RemoteHost {
    /// The first folder in which the worker can be written and run.
    pub(super) async fn program_folder(&self) -> Result<String, HostError> {
        let home = format!("{}/.cache/outliers", self.home().await?);
        let script = script(&home, &BESIDE_HOME);
        let answer = self.sh(&script, SHORT).await?;
        let barred = answer.fields("barred");
        match chosen(&answer, &home, &BESIDE_HOME) {
            Some(place) => {
                barred.iter().for_each(|why| tracing::debug!("the worker goes to {place}: {why}"));
                Ok(place)
            }
            None => {
                let message = format!("{}: no folder on it can run the worker: {}", self.name, barred.join("; "));
                let hint = "the host bars its user from running programs: another host may not";
                Err(HostError::new(HostErrorKind::WorkerUnfit, message).hint(hint))
            }
        }
    }
}

fn script(home: &str, beside: &[&str]) -> String {
    // A job runs on another machine, which does not share these folders.
    let alone = r#"|| [ -n "${outliers_job:-}" ]"#;
    let others = (1..).zip(beside).map(|(i, folder)| format!(" || try {i} {folder}/outliers-$uid 077"));
    let others: String = others.collect();
    format!("{TRY}\nuid=$(id -u); echo \"@uid $uid\"\ntry 0 {} 022 {alone}{others}\n:", quote(home))
}

fn chosen(answer: &ScriptOutput, home: &str, beside: &[&str]) -> Option<String> {
    match usize::try_from(answer.number("place")?).ok()? {
        0 => Some(home.to_owned()),
        other => Some(format!("{}/outliers-{}", beside.get(other - 1)?, answer.number("uid")?)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// Output of the script in a real shell.
    fn answer(home: &Path, beside: &[&str]) -> ScriptOutput {
        let script = script(home.to_str().unwrap(), beside);
        let out = Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        ScriptOutput { status: Some(0), stdout: out.stdout, stderr: String::new() }
    }

    #[test]
    fn first_usable_folder_is_chosen_and_others_have_reasons() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let beside = at("beside");
        let beside = [beside.to_str().unwrap()];
        let home = at("it's home");
        let good = answer(&home, &beside);
        assert_eq!(chosen(&good, home.to_str().unwrap(), &beside).as_deref(), home.to_str());
        assert!(home.is_dir() && !at("beside").exists());

        // No folder can be created below a file.
        std::fs::write(at("file"), "").unwrap();
        let other = answer(&at("file").join("home"), &beside);
        let place = chosen(&other, "", &beside).unwrap();
        assert!(place.starts_with(beside[0]) && Path::new(&place).is_dir(), "{place}");
        assert_eq!(std::fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "what was tried is gone");
        assert!(other.field("barred").ends_with("cannot be made"), "{}", other.field("barred"));

        // Another user has put a link at this path.
        std::fs::remove_dir(&place).unwrap();
        std::os::unix::fs::symlink("/", &place).unwrap();
        let none = answer(&at("file").join("home"), &beside);
        assert_eq!(chosen(&none, "", &beside), None);
        assert!(none.fields("barred")[1].ends_with("is another user's"), "{:?}", none.fields("barred"));
    }

    #[test]
    fn cluster_uses_only_the_shared_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        std::fs::write(at("file"), "").unwrap();
        let beside = at("beside");
        let script = script(&at("file/home"), &[&beside]);
        let out = Command::new("sh").arg("-c").arg(script).env("outliers_job", "open").output().unwrap();
        let said = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success() && said.contains("@barred ") && !said.contains("@place"), "{said}");
        assert!(!Path::new(&beside).exists(), "nothing is put where no node sees it");
    }

    #[test]
    fn host_cannot_choose_a_folder_outside_the_candidates() {
        let said = |text: &str| ScriptOutput { status: Some(0), stdout: text.into(), stderr: String::new() };
        for text in ["@place /bin", "@place 4\n@uid 0", "@place 1", "@place 1\n@uid ../x", "@place -1\n@uid 0", ""] {
            assert_eq!(chosen(&said(text), "/root", &["/a", "/b", "/c"]), None, "{text}");
        }
        let good = chosen(&said("@uid 7\n@barred /root no\n@place 2\n"), "/root", &["/a", "/b", "/c"]);
        assert_eq!(good.as_deref(), Some("/b/outliers-7"));
    }
}
