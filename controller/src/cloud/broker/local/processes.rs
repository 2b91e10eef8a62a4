//! Finds and ends all processes of an instance.
//!
//! A process has one of two marks: an inherited environment variable, or a program in the
//! instance's home folder. A process without either (`env -i` with a system program) is not found.

use std::collections::HashSet;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use sysinfo::{Process, ProcessRefreshKind, ProcessStatus, ProcessesToUpdate, System, UpdateKind};

/// The environment variable of every process of an instance, with the instance's id.
pub const MARKER: &str = "OUTLIERS_LOCAL_INSTANCE";

/// Time for a process to exit after SIGTERM.
const GRACE: Duration = Duration::from_millis(1500);
/// Time limit for a killed process to disappear.
const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// Marks of an instance's processes.
#[derive(Clone, Debug)]
pub(super) struct ProcessMarks {
    mark: String,
    home: PathBuf,
}

impl ProcessMarks {
    pub(super) fn new(id: &str, home: PathBuf) -> Self {
        // The system reports real paths.
        let home = home.canonicalize().unwrap_or(home);
        Self { mark: format!("{MARKER}={id}"), home }
    }

    /// Live processes of the instance, except the caller.
    ///
    /// # Errors
    /// The system does not list processes, which does not mean that there are none.
    pub(super) fn find(&self) -> Result<Vec<u32>, String> {
        let mut system = System::new().map_err(|error| format!("processes cannot be listed: {error}"))?;
        let always = UpdateKind::Always;
        let wanted = ProcessRefreshKind::nothing().with_environ(always).with_exe(always).without_tasks();
        // This process always exists, so a list without it is invalid.
        if system.refresh_processes_specifics(ProcessesToUpdate::All, true, wanted) == 0 {
            return Err("processes cannot be listed".to_owned());
        }
        let owned = system.processes().values().filter(|p| is_alive_and_other(p) && self.is_marked(p));
        Ok(owned.map(|p| p.pid().as_u32()).collect())
    }

    fn is_marked(&self, process: &Process) -> bool {
        process.environ().iter().any(|variable| variable.to_str() == Some(&self.mark))
            || process.exe().is_some_and(|exe| exe.starts_with(&self.home))
    }

    /// Sends SIGTERM to every process of the instance, kills the remaining ones, and returns when
    /// none is left.
    ///
    /// # Errors
    /// Processes remain, or cannot be listed.
    pub(super) fn end_all(&self) -> Result<(), String> {
        let begun = Instant::now();
        let mut asked = HashSet::new();
        let mut clean_sweeps = 0;
        loop {
            let pids = self.find()?;
            // A process that forks during a listing can hide its child once, not twice.
            clean_sweeps = if pids.is_empty() { clean_sweeps + 1 } else { 0 };
            if clean_sweeps == 2 {
                return Ok(());
            }
            if begun.elapsed() > LIMIT {
                return Err(format!("these processes cannot be ended: {pids:?}"));
            }
            for pid in pids {
                if begun.elapsed() > GRACE {
                    signal(pid, Signal::KILL);
                } else if asked.insert(pid) {
                    signal(pid, Signal::TERM);
                }
            }
            thread::sleep(PAUSE);
        }
    }
}

fn is_alive_and_other(process: &Process) -> bool {
    let ended = matches!(process.status(), ProcessStatus::Zombie | ProcessStatus::Dead);
    !ended && process.pid().as_u32() != std::process::id()
}

/// Sends a signal. A missing process is ignored.
pub(super) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn only_marked_processes_are_killed() {
        let home = tempfile::tempdir().unwrap();
        let marks = ProcessMarks::new("i-test", home.path().to_owned());
        assert!(marks.find().unwrap().is_empty());
        marks.end_all().unwrap();
        let mut ours = Command::new("sleep").arg("100").env(MARKER, "i-test").spawn().unwrap();
        let mut other = Command::new("sleep").arg("100").env(MARKER, "i-test2").spawn().unwrap();
        let begun = Instant::now();
        while marks.find().unwrap() != [ours.id()] {
            assert!(begun.elapsed() < Duration::from_secs(10), "the process is not found");
        }
        marks.end_all().unwrap();
        assert!(!ours.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none(), "another's process is left alone");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
