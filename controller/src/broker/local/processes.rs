//! Everything an instance started, found and ended.
//!
//! Several marks, because a command may shed any one of them: the environment variable every command inherits (lost by
//! `env -i`), the instance's session (left by `setsid`), descent from the instance's process (which adopts orphans where the
//! system lets it, so this one cannot be shed while it lives), and running a program that lies in the instance's home.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use sysinfo::{Pid, Process, ProcessRefreshKind, ProcessStatus, ProcessesToUpdate, System, UpdateKind};

/// The environment variable that marks every process of an instance; its value is the instance's id.
pub const MARKER: &str = "OUTLIERS_LOCAL_INSTANCE";

/// How long a process may take to end itself before it is killed.
const GRACE: Duration = Duration::from_millis(1500);
/// After this, a process that still lives is in the kernel's hands, not ours.
const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// How to tell an instance's processes from all others.
#[derive(Clone, Debug)]
pub(super) struct Marks {
    mark: String,
    home: PathBuf,
    leader: Option<Pid>,
}

impl Marks {
    /// `leader` is the process id under which the instance was last known. It may by now be somebody else's.
    pub(super) fn new(id: &str, home: PathBuf, leader: Option<u32>) -> Self {
        // The system reports programs and folders by their real paths.
        let home = home.canonicalize().unwrap_or(home);
        Self { mark: format!("{MARKER}={id}"), home, leader: leader.map(Pid::from_u32) }
    }

    /// Processes of the instance that live now, the caller excepted.
    ///
    /// # Errors
    /// The system does not tell which processes there are: that is not to say that there are none.
    pub(super) fn find(&self) -> Result<Vec<u32>, String> {
        let mut system = System::new().map_err(|error| format!("processes cannot be listed: {error}"))?;
        let always = UpdateKind::Always;
        let wanted =
            ProcessRefreshKind::nothing().with_environ(always).with_exe(always).with_cwd(always).without_tasks();
        // This one is always there, so a table without it is no table.
        if system.refresh_processes_specifics(ProcessesToUpdate::All, true, wanted) == 0 {
            return Err("processes cannot be listed".to_owned());
        }
        let parents = system.processes().values().filter_map(|p| Some((p.pid(), p.parent()?))).collect();
        let leader_lives = self.leader.is_some_and(|leader| self.is_instance(leader, &system));
        let others = system.processes().values().filter(|p| is_alive_and_other(p));
        let owned = others
            .filter(|p| self.is_marked(p) || if leader_lives { self.is_led(p, &parents) } else { self.was_led(p) });
        Ok(owned.map(|p| p.pid().as_u32()).collect())
    }

    fn is_instance(&self, leader: Pid, system: &System) -> bool {
        let known = system.process(leader).is_some_and(|process| self.is_marked(process));
        known || leader.as_u32() == std::process::id()
    }

    fn is_marked(&self, process: &Process) -> bool {
        process.environ().iter().any(|variable| variable.to_str() == Some(&self.mark))
            || process.exe().is_some_and(|exe| exe.starts_with(&self.home))
    }

    fn is_led(&self, process: &Process, parents: &HashMap<Pid, Pid>) -> bool {
        let descends = self.leader.is_some_and(|leader| descends(process.pid(), leader, parents));
        descends || (self.leader.is_some() && process.session_id() == self.leader)
    }

    /// Of a dead leader's session, as long as no other process was given its id and ended in turn: so not by that alone.
    fn was_led(&self, process: &Process) -> bool {
        let at_home = process.cwd().is_some_and(|cwd| cwd.starts_with(&self.home));
        at_home && self.leader.is_some() && process.session_id() == self.leader
    }

    /// Asks every process of the instance to end, kills what stays, and returns when none is left.
    ///
    /// # Errors
    /// Processes outlived it all, or cannot be listed.
    pub(super) fn end_all(&self) -> Result<(), String> {
        let begun = Instant::now();
        let mut asked = HashSet::new();
        let mut clean_sweeps = 0;
        loop {
            let pids = self.find()?;
            // A process that forks while the table is read can hide its child once, not twice.
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

fn descends(pid: Pid, ancestor: Pid, parents: &HashMap<Pid, Pid>) -> bool {
    // The table is read while it changes: bounded, in case it holds a circle.
    let mut line = std::iter::successors(Some(pid), |pid| parents.get(pid).copied()).take(1000);
    line.any(|pid| pid == ancestor)
}

/// Sends a signal; a process that is gone already needs none.
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
    fn only_marked_processes_are_found_and_ended() {
        let home = tempfile::tempdir().unwrap();
        let marks = Marks::new("i-test", home.path().to_owned(), None);
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

    #[test]
    fn descent_ends_in_spite_of_circles() {
        let pid = Pid::from_u32;
        let parents = HashMap::from([(pid(2), pid(3)), (pid(3), pid(2)), (pid(5), pid(4)), (pid(4), pid(1))]);
        assert!(descends(pid(5), pid(1), &parents));
        assert!(!descends(pid(2), pid(1), &parents));
        assert!(!descends(pid(9), pid(1), &parents));
    }
}
