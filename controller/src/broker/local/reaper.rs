//! Children of the instance's process, waited for by one hand.
//!
//! The instance adopts the orphans of the commands it ran, as process 1 does on a machine of its own. So somebody must wait for
//! children nobody here has started, and that somebody would take the exit status of the others from under any library that
//! waits for them. Hence one reaper for all.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Starts commands and tells when they ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Reaper(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<u32, oneshot::Sender<WaitStatus>>,
    closed: bool,
}

impl Reaper {
    /// Adopts orphans from now on, and reaps in the background of the current runtime.
    pub(super) fn start() -> io::Result<Self> {
        adopt_orphans();
        let reaper = Self::default();
        let ended = signal(SignalKind::child())?;
        tokio::spawn(reaper.clone().run(ended));
        Ok(reaper)
    }

    async fn run(self, mut ended: Signal) {
        while ended.recv().await.is_some() {
            self.reap();
        }
    }

    /// Starts `command`; its status comes through the receiver.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<(Child, oneshot::Receiver<WaitStatus>)> {
        // Held while spawning: a child that ends at once is not reaped before it is known, nor is the half-made child of a
        // failed start, which the standard library waits for itself.
        let mut state = self.state();
        if state.closed {
            return Err(io::Error::other("the instance is ending"));
        }
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        state.waiting.insert(child.id(), sender);
        Ok((child, receiver))
    }

    /// No command starts any more.
    pub(super) fn close(&self) {
        self.state().closed = true;
    }

    fn reap(&self) {
        let mut state = self.state();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            if let Some(sender) = state.waiting.remove(&pid) {
                // The channel of the command may be gone; the command is not kept waiting for that.
                let _ = sender.send(status);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(target_os = "linux")]
fn adopt_orphans() {
    // Any non-zero value switches it on.
    let on = Some(rustix::process::getpid());
    if let Err(error) = rustix::process::set_child_subreaper(on) {
        tracing::warn!(%error, "orphans are not adopted; they are still found by their other marks");
    }
}

#[cfg(not(target_os = "linux"))]
fn adopt_orphans() {}
