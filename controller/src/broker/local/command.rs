//! One command on one channel.

use std::ffi::OsStr;
use std::io;
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::pin::pin;
use std::process::{Command, Stdio};

use russh::server::{Handle, Msg};
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};
use tokio::sync::{oneshot, watch};

use super::processes::MARKER;
use super::reaper::Reaper;
use super::session::USER;

/// Where programs are found on an instance, those of GPU drivers in containers included.
const PATH: &str =
    "/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const STDERR: u32 = 1;
const CHUNK: usize = 32 << 10;

/// How commands run on one instance.
pub(super) struct Shell {
    /// The instance's id, handed to every command as its mark.
    pub(super) id: String,
    /// Home and working folder of every command.
    pub(super) home: PathBuf,
    /// The GPUs the instance was rented; a command sees no others.
    pub(super) gpus: String,
    /// Who waits for them.
    pub(super) reaper: Reaper,
}

/// A command that was started.
pub(super) struct Running {
    group: u32,
    stdin: ChildStdin,
    stdout: ChildStdout,
    stderr: ChildStderr,
    ended: oneshot::Receiver<WaitStatus>,
}

impl Shell {
    /// Starts `sh -c command`, or a shell that reads its commands from standard input.
    pub(super) fn start(&self, command: Option<&[u8]>) -> io::Result<Running> {
        let (mut child, ended) = self.reaper.spawn(&mut self.prepare(command))?;
        let missing = || io::Error::other("a pipe is missing");
        Ok(Running {
            group: child.id(),
            stdin: ChildStdin::from_std(child.stdin.take().ok_or_else(missing)?)?,
            stdout: ChildStdout::from_std(child.stdout.take().ok_or_else(missing)?)?,
            stderr: ChildStderr::from_std(child.stderr.take().ok_or_else(missing)?)?,
            ended,
        })
    }

    fn prepare(&self, command: Option<&[u8]>) -> Command {
        let mut shell = Command::new("/bin/sh");
        if let Some(command) = command {
            shell.arg("-c").arg(OsStr::from_bytes(command));
        }
        shell.env_clear().envs([("PATH", PATH), ("LANG", "C.UTF-8"), ("SHELL", "/bin/sh")]);
        shell.envs([("USER", USER), ("LOGNAME", USER), (MARKER, &self.id)]).env("HOME", &self.home);
        shell.envs([("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), ("CUDA_VISIBLE_DEVICES", &self.gpus)]);
        shell.current_dir(&self.home).process_group(0);
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell
    }
}

/// Carries a command's streams and its status over `channel` until the command ended and its output with it, or until the
/// client closes the channel. As with OpenSSH, a command without a terminal is then not killed: it loses its pipes.
pub(super) async fn serve(running: Running, channel: Channel<Msg>, handle: Handle, closed: watch::Receiver<()>) {
    let Running { group, stdin, stdout, stderr, ended } = running;
    let (input, output) = channel.split();
    let streams = async {
        let status = async {
            if let Ok(status) = ended.await {
                report(status, &output, &handle).await;
            }
        };
        tokio::join!(pump(stdout, &output, None), pump(stderr, &output, Some(STDERR)), status);
    };
    carry(input, stdin, streams, closed, |sig| forward(group, &sig)).await;
    // Refused only when the connection is gone, and then there is nobody to tell.
    let _ = output.eof().await;
    let _ = output.close().await;
}

/// Feeds `input` into `stdin` while `work` goes on; ends with `work`, or when the client closes the channel.
pub(super) async fn carry<W: AsyncWrite + Unpin>(
    mut input: ChannelReadHalf,
    stdin: W,
    work: impl Future<Output = ()>,
    mut closed: watch::Receiver<()>,
    on_signal: impl Fn(Sig),
) {
    let mut work = pin!(work);
    let feeding = async {
        let mut stdin = Some(stdin);
        while let Some(message) = input.wait().await {
            match message {
                ChannelMsg::Data { data } => feed(&mut stdin, &data).await,
                ChannelMsg::Eof => stop_feeding(&mut stdin).await,
                ChannelMsg::Signal { signal } => on_signal(signal),
                ChannelMsg::Close => break,
                _ => {}
            }
        }
    };
    tokio::select! {
        () = &mut work => {}
        () = feeding => {}
        // The sender is only ever dropped.
        _ = closed.changed() => {}
    }
}

async fn feed<W: AsyncWrite + Unpin>(stdin: &mut Option<W>, data: &[u8]) {
    if let Some(writer) = stdin
        && writer.write_all(data).await.is_err()
    {
        // The command reads no more; what else comes for it is thrown away, or the connection would stall.
        *stdin = None;
    }
}

async fn stop_feeding<W: AsyncWrite + Unpin>(stdin: &mut Option<W>) {
    if let Some(mut writer) = stdin.take() {
        // Nobody reads any more: as good as closed.
        let _ = writer.shutdown().await;
    }
}

/// Sends what comes from `source`, as much at a time as the client's window takes.
pub(super) async fn pump(mut source: impl AsyncRead + Unpin, output: &ChannelWriteHalf<Msg>, stream: Option<u32>) {
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        match source.read_buf(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let sent = match stream {
            None => output.data_bytes(chunk).await,
            Some(stream) => output.extended_data_bytes(stream, chunk).await,
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn report(status: WaitStatus, output: &ChannelWriteHalf<Msg>, handle: &Handle) {
    // As above: refused only when nobody is there.
    if let Some(code) = status.exit_status() {
        let _ = output.exit_status(code.unsigned_abs()).await;
    } else if let Some(number) = status.terminating_signal() {
        let _ = handle.exit_signal_request(output.id(), signal_name(number), false, String::new(), String::new()).await;
    }
}

const SIGNALS: [(Signal, Sig); 12] = [
    (Signal::ABORT, Sig::ABRT),
    (Signal::ALARM, Sig::ALRM),
    (Signal::FPE, Sig::FPE),
    (Signal::HUP, Sig::HUP),
    (Signal::ILL, Sig::ILL),
    (Signal::INT, Sig::INT),
    (Signal::KILL, Sig::KILL),
    (Signal::PIPE, Sig::PIPE),
    (Signal::QUIT, Sig::QUIT),
    (Signal::SEGV, Sig::SEGV),
    (Signal::TERM, Sig::TERM),
    (Signal::USR1, Sig::USR1),
];

fn signal_name(number: i32) -> Sig {
    let known = SIGNALS.into_iter().find(|(signal, _)| signal.as_raw() == number);
    known.map_or_else(|| Sig::Custom(format!("{number}@local")), |(_, name)| name)
}

fn forward(group: u32, name: &Sig) {
    let same = |known: &Sig| mem::discriminant(known) == mem::discriminant(name);
    let signal = SIGNALS.into_iter().find(|(_, known)| same(known)).map(|(signal, _)| signal);
    let group = i32::try_from(group).ok().and_then(Pid::from_raw);
    if let (Some(signal), Some(group)) = (signal, group) {
        // The command may have ended meanwhile.
        let _ = kill_process_group(group, signal);
    }
}
