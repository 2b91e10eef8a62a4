//! Runs one command on one channel.

use std::time::Duration;

use russh::ChannelMsg;
use russh::client::{Handle, Msg};

use super::clock::Clock;
use super::connect::{Client, broken};
use crate::host::transport::{ExecOutput, TransportError, TransportErrorKind as Kind};
use crate::text::clean;

/// Maximum output of one command in bytes.
const MAX_OUTPUT: usize = 64 << 20;
/// Pauses between attempts to open a channel.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// Stream number of standard error.
const STDERR: u32 = 1;

/// Runs `command` in the login shell with `stdin` as its input and waits for its end.
pub(super) async fn exec(
    handle: &Handle<Client>,
    command: &str,
    stdin: &[u8],
    limit: Duration,
) -> Result<ExecOutput, TransportError> {
    let name = name(command);
    match tokio::time::timeout(limit, run(handle, command, stdin, &name, &|| {})).await {
        Ok(result) => result,
        Err(_) => Err(TransportError::new(Kind::TimedOut, format!("{name} did not end within {} s", limit.as_secs()))),
    }
}

/// As [`exec`] for a command that receives a part of a transfer. The transfer's clock is its time
/// limit and counts every byte sent.
pub(super) async fn feed(
    handle: &Handle<Client>,
    command: &str,
    stdin: &[u8],
    clock: &Clock<'_>,
) -> Result<ExecOutput, TransportError> {
    run(handle, command, stdin, &name(command), &|| clock.record_activity()).await
}

fn name(command: &str) -> String {
    format!("`{}`", clean(command.as_bytes(), 60))
}

async fn run(
    handle: &Handle<Client>,
    command: &str,
    stdin: &[u8],
    name: &str,
    record_activity: &(dyn Fn() + Send + Sync),
) -> Result<ExecOutput, TransportError> {
    let fail = |e: russh::Error| broken(&name, &e);
    let channel = open(handle).await.map_err(fail)?;
    channel.exec(true, command).await.map_err(fail)?;
    let (mut from, to) = channel.split();
    let feed = async {
        // A command may end without reading its input. Its status decides.
        if stdin.is_empty() || to.data_bytes(stdin.to_vec()).await.is_ok() {
            let _ = to.eof().await;
        }
    };
    tokio::pin!(feed);
    let mut feeding = true;
    let mut gathered = CollectedOutput::default();
    loop {
        let message = tokio::select! {
            () = &mut feed, if feeding => {
                feeding = false;
                continue;
            }
            message = from.wait() => message,
        };
        record_activity();
        if let Some(result) = gathered.take(message, name) {
            // The server may wait for this side's close. An error means that it closed first.
            let _ = to.close().await;
            return result;
        }
    }
}

/// Opens a channel. A server with few channels may not yet have seen the last one close.
async fn open(handle: &Handle<Client>) -> Result<Channel, russh::Error> {
    for pause in PAUSES {
        match handle.channel_open_session().await {
            Err(russh::Error::ChannelOpenFailure(_)) => tokio::time::sleep(pause).await,
            opened => return opened,
        }
    }
    handle.channel_open_session().await
}

/// Output of a channel so far.
#[derive(Default)]
struct CollectedOutput {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: Option<i32>,
    signalled: bool,
}

impl CollectedOutput {
    /// Processes one message; `Some` when the channel is closed.
    ///
    /// The status may arrive before or after the last data and the end of file, so only the
    /// channel's close ends the command.
    fn take(&mut self, message: Option<ChannelMsg>, name: &str) -> Option<Result<ExecOutput, TransportError>> {
        match message {
            Some(ChannelMsg::Data { data }) => return self.keep(&data, false, name),
            Some(ChannelMsg::ExtendedData { data, ext: STDERR }) => return self.keep(&data, true, name),
            Some(ChannelMsg::ExitStatus { exit_status }) => self.status = i32::try_from(exit_status).ok(),
            Some(ChannelMsg::ExitSignal { .. }) => self.signalled = true,
            Some(ChannelMsg::Failure) => {
                let message = format!("{name}: the server does not run commands");
                return Some(Err(TransportError::new(Kind::Remote, message)));
            }
            Some(ChannelMsg::Close) | None => return Some(self.end(name)),
            Some(_) => {}
        }
        None
    }

    fn keep(&mut self, data: &[u8], stderr: bool, name: &str) -> Option<Result<ExecOutput, TransportError>> {
        if self.stdout.len() + self.stderr.len() + data.len() > MAX_OUTPUT {
            let message = format!("{name} printed more than {} MiB", MAX_OUTPUT >> 20);
            return Some(Err(TransportError::new(Kind::Remote, message)));
        }
        if stderr { &mut self.stderr } else { &mut self.stdout }.extend_from_slice(data);
        None
    }

    fn end(&mut self, name: &str) -> Result<ExecOutput, TransportError> {
        if self.status.is_none() && !self.signalled {
            let message = format!("{name}: the connection broke off before its exit status came");
            return Err(TransportError::new(Kind::Reset, message));
        }
        let (stdout, stderr) = (std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr));
        Ok(ExecOutput { status: self.status, stdout, stderr })
    }
}

pub(super) type Channel = russh::Channel<Msg>;
