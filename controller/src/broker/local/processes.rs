//! Everything an instance started, found and ended.
//!
//! Four marks, because a command may shed any one of them: the environment variable every command inherits (lost by `env -i`),
//! the instance's session (left by `setsid`), descent from the instance's process (which adopts orphans where the system lets
//! it, so this one cannot be shed while it lives), and running a program that lies in the instance's home.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use sysinfo::{Pid, ProcessRefreshKind, ProcessStatus, ProcessesToUpdate, System, UpdateKind};

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
    leader: Option<u32>,
    leader_lives: bool,
}

impl Marks {
    /// `leader` is the process id of the instance, `leader_lives` whether the instance's lock is held: the id of a dead
    /// process may by now be somebody else's.
    pub(super) fn new(id: &str, home: PathBuf, leader: Option<u32>, leader_lives: bool) -> Self {
        // The system reports programs by their real paths.
        let home = home.canonicalize().unwrap_or(home);
        Self { mark: format!("{MARKER}={id}"), home, leader, leader_lives }
    }

    /// Processes of the instance that live now, the caller excepted.
    pub(super) fn find(&self) -> Vec<u32> {
        let Ok(mut system) = System::new() else { return Vec::new() };
        let wanted =
            ProcessRefreshKind::nothing().with_environ(UpdateKind::Always).with_exe(UpdateKind::Always).without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::All, true, wanted);
        let parents = system.processes().values().filter_map(|p| Some((p.pid(), p.parent()?))).collect();
        let marked = system.processes().values().filter(|p| self.is_alive_and_other(p));
        marked.filter(|p| self.owns(p, &system, &parents)).map(|p| p.pid().as_u32()).collect()
    }

    fn is_alive_and_other(&self, process: &sysinfo::Process) -> bool {
        let ended = matches!(process.status(), ProcessStatus::Zombie | ProcessStatus::Dead);
        !ended && process.pid().as_u32() != std::process::id()
    }

    fn owns(&self, process: &sysinfo::Process, system: &System, parents: &HashMap<Pid, Pid>) -> bool {
        process.environ().iter().any(|variable| variable.to_str() == Some(&self.mark))
            || process.exe().is_some_and(|exe| exe.starts_with(&self.home))
            || self.leader.is_some_and(|leader| self.is_led(process, Pid::from_u32(leader), system, parents))
    }

    fn is_led(&self, process: &sysinfo::Process, leader: Pid, system: &System, parents: &HashMap<Pid, Pid>) -> bool {
        if self.leader_lives {
            return process.session_id() == Some(leader) || descends(process.pid(), leader, parents);
        }
        // An id in use as a session's is not given to a new process, so a living process of that id began another session.
        process.session_id() == Some(leader) && system.process(leader).is_none()
    }

    /// Asks every process of the instance to end, kills what stays, and returns when none is left.
    ///
    /// # Errors
    /// The process ids that outlived it all.
    pub(super) fn end_all(&self) -> Result<(), Vec<u32>> {
        let begun = Instant::now();
        let mut asked = HashSet::new();
        let mut clean_sweeps = 0;
        loop {
            let pids = self.find();
            // A process that forks while the table is read can hide its child once, not twice.
            clean_sweeps = if pids.is_empty() { clean_sweeps + 1 } else { 0 };
            if clean_sweeps == 2 {
                return Ok(());
            }
            if begun.elapsed() > LIMIT {
                return Err(pids);
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
