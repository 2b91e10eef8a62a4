//! Parses the hub's answers: ranges, hashes, retry pauses, redirects.

use std::time::Duration;

use ureq::Body;
use ureq::http::{Response, Uri};

use super::listing::Digest;
use crate::error::{Result, WorkerError};

/// Reasons of a failed request.
pub(super) enum RequestFailure {
    /// Another attempt may succeed.
    Retry { why: String, pause: Option<Duration> },
    /// A signed address has expired or serves another file. The next attempt needs a new address
    /// from the hub.
    Expired(String),
    /// Further attempts are useless.
    Final(WorkerError),
}

impl RequestFailure {
    pub(super) fn again(why: String) -> Self {
        Self::Retry { why, pause: None }
    }
}

/// Checks the endpoint. Returns whether it is this machine.
pub(super) fn check_endpoint(endpoint: &str, with_token: bool) -> Result<bool> {
    let bad = |what: &str| Err(WorkerError::job(format!("the hub's endpoint {what}")).hint("check HF_ENDPOINT"));
    let Ok(uri) = endpoint.parse::<Uri>() else { return bad("is not an address") };
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return bad("is not an address") };
    if authority.as_str().contains('@') {
        return bad("holds a password, which would show up in messages");
    }
    let host = authority.host();
    let loopback = host == "localhost" || host == "[::1]" || host.starts_with("127.");
    match scheme {
        "https" => Ok(loopback),
        "http" if loopback || !with_token => Ok(loopback),
        "http" => bad("is not encrypted: the token would be sent in the clear"),
        _ => bad("is not an http address"),
    }
}

pub(super) fn same_origin(url: &str, endpoint: &str) -> bool {
    url.strip_prefix(endpoint).is_some_and(|rest| rest.starts_with('/'))
}

/// Target of a redirect: an absolute address, or a path on the same host. Redirects from https to
/// http are refused.
pub(super) fn redirect(from: &str, response: &Response<Body>) -> Result<String, RequestFailure> {
    let broken = || RequestFailure::Final(WorkerError::network("the hub redirects to nowhere"));
    let to = header(response, "location").ok_or_else(broken)?;
    let base: Uri = from.parse().map_err(|_| broken())?;
    let (Some(scheme), Some(authority)) = (base.scheme_str(), base.authority()) else { return Err(broken()) };
    if to.starts_with('/') && !to.starts_with("//") {
        return Ok(format!("{scheme}://{authority}{to}"));
    }
    let target: Uri = to.parse().map_err(|_| broken())?;
    match target.scheme_str() {
        Some("https") => Ok(to.to_owned()),
        Some("http") if scheme == "http" => Ok(to.to_owned()),
        _ => Err(RequestFailure::Final(WorkerError::network("the hub redirects to an unencrypted address"))),
    }
}

/// A failure below HTTP. Only the kind of the library's error is kept, since its text may contain
/// a signed address, which is a secret.
pub(super) fn unreachable(error: ureq::Error) -> RequestFailure {
    let why = match error {
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        ureq::Error::Io(error) => format!("the connection failed: {error}"),
        ureq::Error::HostNotFound => "the host name is unknown".to_owned(),
        ureq::Error::ConnectionFailed => "the connection was refused".to_owned(),
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => "the connection could not be encrypted".to_owned(),
        ureq::Error::Protocol(_) => "the answer is not HTTP".to_owned(),
        _ => "the request failed".to_owned(),
    };
    RequestFailure::again(why)
}

pub(super) fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name).and_then(|value| value.to_str().ok())
}

/// The pause of `Retry-After: seconds`, or the `t` of the hub's `RateLimit:
/// "resolvers";r=0;t=120`.
pub(super) fn wait_asked_for(response: &Response<Body>) -> Option<Duration> {
    let seconds = header(response, "retry-after").and_then(|text| text.trim().parse().ok()).or_else(|| {
        let limit = header(response, "ratelimit")?;
        limit.split(';').find_map(|part| part.trim().strip_prefix("t=")?.parse().ok())
    });
    seconds.map(Duration::from_secs)
}

/// First byte and, if stated, the file's size.
pub(super) fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let (range, total) = header(response, "content-range")?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    Some((start.parse().ok()?, total.parse().ok()))
}

/// The content's hash, if the entity tag is one.
pub(super) fn etag(response: &Response<Body>) -> Option<Digest> {
    let tag = header(response, "x-linked-etag").or_else(|| header(response, "etag"))?;
    Digest::from_hex(tag.trim_start_matches("W/").trim_matches('"'))
}

/// One segment of a path, percent-encoded.
pub(super) fn encode(segment: &str) -> String {
    let byte = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    segment.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked_before_the_token_is_sent() {
        for (endpoint, with_token, fine) in [
            ("https://huggingface.co", true, true),
            ("http://127.0.0.1:8080", true, true),
            ("http://mirror.example", false, true),
            ("http://mirror.example", true, false),
            ("http://localhost.example", true, false),
            ("https://user:pw@mirror.example", false, false),
            ("ftp://mirror.example", false, false),
            ("huggingface.co", false, false),
            ("", false, false),
        ] {
            assert_eq!(check_endpoint(endpoint, with_token).is_ok(), fine, "{endpoint}");
        }
    }

    #[test]
    fn token_is_not_sent_to_other_hosts() {
        let home = "https://hub.example";
        assert!(same_origin("https://hub.example/a", home));
        for away in ["https://hub.example.evil/a", "https://hub.example:81/a", "http://hub.example/a", "https://cdn/a"]
        {
            assert!(!same_origin(away, home), "{away}");
        }
    }

    #[test]
    fn segments_are_encoded() {
        assert_eq!(encode("refs/pr/1 é"), "refs%2Fpr%2F1%20%C3%A9");
    }
}
