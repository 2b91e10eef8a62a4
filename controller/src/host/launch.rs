//! Starts the worker at most once, so that it outlives the connection.

use std::time::Duration;

use outliers_protocol::{JobSpec, files};

use super::retry::again;
use super::{HostError, HostErrorKind, RemoteHost, RemoteWorker, SHORT, ScriptOutput, TIMEOUT};
use crate::host::transport::quote::quote;
use crate::secret::Secret;

/// The script that runs the worker. It reads and removes the secrets.
const WRAPPER: &str = "launch.sh";
const SECRETS: &str = ".secrets";

/// Time for the worker to exit after SIGTERM, and for the kernel to kill it.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Result of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launched {
    /// The worker was started.
    Started {
        /// Process id of its wrapper.
        pid: u32,
    },
    /// The worker was already running. Nothing was started.
    Running {
        /// Process id of its wrapper.
        pid: u32,
    },
    /// The worker has already ended. Nothing was started.
    Ended {
        /// Its exit status, `None` if it was killed together with its wrapper.
        exit: Option<i32>,
    },
}

/// State of a run's worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobStatus {
    /// Never launched.
    NotStarted,
    /// Running.
    Running,
    /// The worker has ended.
    Ended {
        /// Exit status, 128 + signal if a signal ended it; `None` if it was killed together with
        /// its wrapper.
        exit: Option<i32>,
    },
}

/// Shell functions for the run in the current folder: `state`, `alive`, `start_worker`,
/// `stop_worker`, `ticks`.
pub(super) const PROCESS: &str = include_str!("process.sh");

/// Parses the output of `state` of [`PROCESS`]: the status, and the wrapper's pid while it runs.
pub(super) fn read_state(host: &RemoteHost, answer: &ScriptOutput) -> Result<(JobStatus, Option<u32>), HostError> {
    let line = answer.field("state");
    let mut words = line.split_whitespace();
    match (words.next(), words.next()) {
        (Some("none"), _) => Ok((JobStatus::NotStarted, None)),
        (Some("running"), pid) => Ok((JobStatus::Running, pid.and_then(|pid| pid.parse().ok()))),
        (Some("ended"), exit) => Ok((JobStatus::Ended { exit: exit.and_then(|exit| exit.parse().ok()) }, None)),
        _ => Err(host.odd("its answer lacks the state of the worker")),
    }
}

impl RemoteHost {
    /// Starts `worker` on `job` in the run's folder, in its own session.
    ///
    /// Idempotent: a run that has been started is left alone. `secrets` become environment
    /// variables of the worker. They are passed in a file of mode 0600 that is removed before the
    /// worker starts, and never on a command line.
    pub async fn launch(
        &self,
        worker: &RemoteWorker,
        run: &str,
        job: &JobSpec,
        secrets: &[(&str, &Secret)],
    ) -> Result<Launched, HostError> {
        Ok(again!(TIMEOUT, &|_| {}, self.launch_once(worker, run, job, secrets)))
    }

    async fn launch_once(
        &self,
        worker: &RemoteWorker,
        run: &str,
        job: &JobSpec,
        secrets: &[(&str, &Secret)],
    ) -> Result<Launched, HostError> {
        let folder = self.run_folder(run).await?;
        match self.state(run).await? {
            (JobStatus::NotStarted, _) => {}
            (JobStatus::Running, pid) => return Ok(Launched::Running { pid: pid.unwrap_or(0) }),
            (JobStatus::Ended { exit }, _) => return Ok(Launched::Ended { exit }),
        }
        let job = serde_json::to_vec_pretty(job)
            .map_err(|e| HostError::new(HostErrorKind::Local, format!("the job cannot be written: {e}")))?;
        let at = |name: &str| format!("{folder}/{name}");
        self.sh(&format!("umask 077; mkdir -p {}", quote(&folder)), SHORT).await?;
        self.transport.put_bytes(&job, &at(files::JOB), 0o600).await?;
        self.transport.put_bytes(wrapper(worker, &folder).as_bytes(), &at(WRAPPER), 0o700).await?;
        self.put_secrets(&folder, secrets).await?;
        self.start(&folder).await
    }

    async fn put_secrets(&self, folder: &str, secrets: &[(&str, &Secret)]) -> Result<(), HostError> {
        let secrets = secrets_file(secrets)?;
        if !secrets.is_empty() {
            self.transport.put_bytes(secrets.as_bytes(), &format!("{folder}/{SECRETS}"), 0o600).await?;
        }
        Ok(())
    }

    /// Restarts a worker that died. It continues from its last save point with the same job.
    ///
    /// Idempotent: a running worker, or one that wrote its manifest, is left alone.
    pub async fn restart(&self, run: &str, secrets: &[(&str, &Secret)]) -> Result<Launched, HostError> {
        Ok(again!(TIMEOUT, &|_| {}, self.restart_once(run, secrets)))
    }

    async fn restart_once(&self, run: &str, secrets: &[(&str, &Secret)]) -> Result<Launched, HostError> {
        let folder = self.run_folder(run).await?;
        // Processes that the dead worker left running are ended first: two workers in one folder
        // would corrupt it.
        let clear = format!(
            "{PROCESS}\ncd {} || exit 1\n[ -f {WRAPPER} ] && [ -f {job} ] || exit 1\n\
             if [ -f {manifest} ] || alive worker.pid; then echo '@left alone'; exit 0; fi\n\
             if [ \"${{outliers_job:-}}\" = over ]; then echo \"its job is over: $outliers_job_says\" >&2; exit 1; fi\n\
             stop_worker || exit 1\nrm -f {exit} worker.pid",
            quote(&folder),
            job = files::JOB,
            manifest = files::MANIFEST,
            exit = files::EXIT_CODE,
        );
        if self.sh(&clear, SHORT + STOP_TIMEOUT).await?.field("left") == "alone" {
            return Ok(match self.state(run).await? {
                (JobStatus::Ended { exit }, _) => Launched::Ended { exit },
                (_, pid) => Launched::Running { pid: pid.unwrap_or(0) },
            });
        }
        self.put_secrets(&folder, secrets).await?;
        self.start(&folder).await
    }

    /// Starts the wrapper and waits for its pid. Of two started at once, one continues.
    async fn start(&self, folder: &str) -> Result<Launched, HostError> {
        // All inherited streams are closed or files. An open stream would keep the connection's
        // channel open for hours.
        let script = format!(
            "{PROCESS}\ncd {} || exit 1\nstart_worker || exit 1\n\
             i=0; while ! in_job && [ ! -f worker.pid ] && [ $i -lt 100 ]; do\n\
               i=$((i + 1)); sleep 0.1 2>/dev/null || sleep 1\ndone\n\
             state\ntail -c 300 {log} >&2",
            quote(folder),
            log = files::LOG
        );
        let answer = self.sh(&script, SHORT).await?;
        match read_state(self, &answer)? {
            (JobStatus::Running, pid) => Ok(Launched::Started { pid: pid.unwrap_or(0) }),
            (JobStatus::Ended { exit }, _) => Ok(Launched::Ended { exit }),
            (JobStatus::NotStarted, _) => Err(self.odd(&format!("the worker did not start: {}", answer.stderr))),
        }
    }

    /// State of a run's worker.
    pub async fn status(&self, run: &str) -> Result<JobStatus, HostError> {
        Ok(again!(TIMEOUT, &|_| {}, self.state(run)).0)
    }

    async fn state(&self, run: &str) -> Result<(JobStatus, Option<u32>), HostError> {
        let folder = self.run_folder(run).await?;
        let script =
            format!("{PROCESS}\nif cd {} 2>/dev/null; then state; else echo '@state none'; fi", quote(&folder));
        read_state(self, &self.sh(&script, SHORT).await?)
    }

    /// Ends a run's worker and its children: SIGTERM, 15 seconds, SIGKILL. A worker that does not
    /// run counts as success.
    pub async fn stop_worker(&self, run: &str) -> Result<(), HostError> {
        let folder = again!(TIMEOUT, &|_| {}, self.run_folder(run));
        let script = format!("{PROCESS}\ncd {} 2>/dev/null || exit 0\nstop_worker", quote(&folder));
        let limit = SHORT + STOP_TIMEOUT;
        again!(TIMEOUT, &|_| {}, self.sh(&script, limit));
        Ok(())
    }
}

/// A shell script that sets the secrets as variables.
fn secrets_file(secrets: &[(&str, &Secret)]) -> Result<String, HostError> {
    let mut text = String::new();
    for (name, secret) in secrets {
        let word = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.bytes().all(word) {
            return Err(HostError::new(HostErrorKind::Local, format!("{name:?} cannot name a secret's variable")));
        }
        if secret.expose().contains('\0') {
            return Err(HostError::new(HostErrorKind::Local, format!("the secret {name} holds a NUL byte")));
        }
        text.push_str(&format!("{name}={}; export {name}\n", quote(secret.expose())));
    }
    Ok(text)
}

/// The script around the worker: pid file, log, exit-code file.
fn wrapper(worker: &RemoteWorker, folder: &str) -> String {
    // `ln` fails if the name exists, so that one of two wrappers continues. The traps let the
    // wrapper outlive the signal that ends its worker, so that it records an exit status. A job
    // that is requeued needs the secrets again when no controller may be connected.
    format!(
        "#!/bin/sh\n{PROCESS}\ncd {folder} || exit 125\numask 077\n\
         if [ -f {SECRETS} ]; then . ./{SECRETS}; [ -n \"${{OUTLIERS_JOB:-}}\" ] || rm -f {SECRETS}; fi\n\
         {{ echo $$; started $$; }} > .pid.$$\n\
         ln .pid.$$ worker.pid 2>/dev/null || {{ rm -f .pid.$$; exit 0; }}\nrm -f .pid.$$\n\
         trap : TERM INT HUP\n\
         {worker} run {job} --output {folder} &\nchild=$!\n\
         while :; do wait $child; code=$?; kill -0 $child 2>/dev/null || break; done\n\
         echo $code > {exit}.part && mv -f {exit}.part {exit}\n",
        folder = quote(folder),
        worker = quote(&worker.path),
        job = files::JOB,
        exit = files::EXIT_CODE,
    )
}

/// The scripts contain these file names literally.
const _: () = {
    assert!(same(files::PID, "worker.pid") && same(files::EXIT_CODE, "exit_code"));
    assert!(same(files::LOG, "worker.log") && same(files::MANIFEST, "manifest.json") && same(WRAPPER, "launch.sh"));
};

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Command, Output};

    use super::*;

    /// A function of the scripts in a run's folder, of a job that is `open`, `ending` or `over`.
    fn in_job(job: &str, folder: &Path, function: &str) -> Output {
        let script = format!("{PROCESS}\n{function}");
        Command::new("sh").args(["-c", &script]).env("outliers_job", job).current_dir(folder).output().unwrap()
    }

    #[test]
    fn worker_that_slurm_ends_did_not_die() {
        for (job, files, says) in [
            ("open", &["go", "exit_code"][..], "@state ended 137\n"),
            ("open", &["go", "exit_code", "ending"], "@state running\n"),
            ("ending", &["go", "exit_code"], "@state running\n"),
            ("over", &["go", "exit_code", "ending"], "@state ended 137\n"),
            ("open", &["go", "exit_code", "ending", "manifest.json"], "@state ended 137\n"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            files.iter().for_each(|name| std::fs::write(folder.path().join(name), "137\n").unwrap());
            let out = in_job(job, folder.path(), "state");
            assert_eq!(String::from_utf8_lossy(&out.stdout), says, "{job} {files:?}");
        }
    }

    #[test]
    fn no_worker_is_started_in_a_job_that_slurm_ends() {
        for (job, files, starts) in
            [("open", &["ending"][..], false), ("open", &[], true), ("ending", &[], false), ("over", &[], false)]
        {
            let folder = tempfile::tempdir().unwrap();
            files.iter().for_each(|name| std::fs::write(folder.path().join(name), "").unwrap());
            let out = in_job(job, folder.path(), "start_worker");
            assert_eq!((out.status.success(), folder.path().join("go").exists()), (starts, starts), "{job}: {out:?}");
        }
    }

    #[test]
    fn shell_round_trips_secrets_and_bad_names_are_refused() {
        let odd = Secret::new("it's $HOME `x` \\ \"y\"\nend");
        let text = secrets_file(&[("HF_TOKEN", &odd), ("B2", &Secret::new("x"))]).unwrap();
        let script = format!("{text}exec sh -c 'printf %s:%s \"$HF_TOKEN\" \"$B2\"'");
        let out = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), format!("{}:x", odd.expose()));
        for bad in ["", "A B", "A;rm", "1A", "a", "A=1"] {
            assert!(secrets_file(&[(bad, &odd)]).is_err(), "{bad}");
        }
        let error = secrets_file(&[("A", &Secret::new("tok\0en"))]).unwrap_err();
        assert!(!error.message.contains("tok"), "{error}");
    }
}
