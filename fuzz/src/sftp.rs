//! An SFTP server with given answers.

use std::time::Duration;

use outliers::host::transport::ssh::Sftp;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use crate::assert_harmless;

/// Longest request that is read; the client's have names and numbers only.
const LONGEST: usize = 64 << 10;
/// Longest time for an answer, by the runtime's clock.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The first request, the only one without a number, and its answer.
const INIT: u8 = 1;
const VERSION: u8 = 2;

/// Reads a file from the server. `script` has the offset (8 bytes), the length (2 bytes) and
/// answers, each with its length (2 bytes) first, then the packet's type and the data after the
/// request's number. All little-endian.
pub fn read(script: &[u8]) {
    let Some((offset, rest)) = script.split_first_chunk::<8>() else { return };
    let Some((limit, answers)) = rest.split_first_chunk::<2>() else { return };
    let (offset, limit) = (u64::from_le_bytes(*offset), u64::from(u16::from_le_bytes(*limit)));
    let answers = answers.to_vec();
    crate::run(async {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let server = tokio::spawn(serve(theirs, answers));
        let read = async { Sftp::over(ours, TIMEOUT).await?.read("a file", offset, limit).await };
        match read.await {
            Ok(content) => assert!(content.is_none_or(|content| content.len() as u64 <= limit), "more than asked for"),
            Err(error) => assert_harmless(&error.message),
        }
        server.abort();
    });
}

/// Answers each request in turn; closes after the last.
async fn serve(mut stream: DuplexStream, answers: Vec<u8>) {
    let mut answers = &answers[..];
    while let Some(request) = request(&mut stream).await {
        let Some((length, rest)) = answers.split_first_chunk::<2>() else { return };
        let (answer, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        answers = rest;
        let Some((kind, said)) = answer.split_first() else { return };
        let number = if request.first() == Some(&INIT) { &[] } else { request.get(1..5).unwrap_or_default() };
        let kind = if number.is_empty() { VERSION } else { *kind };
        let packet = [&[kind], number, said].concat();
        let framed = [&(packet.len() as u32).to_be_bytes()[..], &packet].concat();
        if stream.write_all(&framed).await.is_err() {
            return;
        }
    }
}

async fn request(stream: &mut DuplexStream) -> Option<Vec<u8>> {
    let mut request = vec![0; (stream.read_u32().await.ok()? as usize).min(LONGEST)];
    stream.read_exact(&mut request).await.ok()?;
    Some(request)
}
