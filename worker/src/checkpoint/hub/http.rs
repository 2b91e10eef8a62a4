//! Requests to the hub: redirects, retries, and errors.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::header::{AUTHORIZATION, RANGE};
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::HubOptions;
use super::listing::{RepoFile, RepoKind, RepoListing};
use super::rate_limit::{RateLimiter, WINDOW};
use super::response::{
    RequestFailure, check_endpoint, content_range, encode, etag, header, redirect, same_origin, unreachable,
    wait_asked_for,
};
use crate::error::{Result, WorkerError, printable};

/// Maximum redirects: relative ones within the hub, and one to the file server.
const MAX_REDIRECTS: usize = 5;

/// Idle connections kept open.
pub(super) const MAX_CONNECTIONS: usize = 64;

/// Timeouts and number of attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time limit of a connection.
    pub connect: Duration,
    /// Time limit of the start of an answer.
    pub response: Duration,
    /// Time limit between bytes of an answer.
    pub silence: Duration,
    /// Delay beyond the usual time after which a range of weights is requested again, on another
    /// connection.
    pub late: Duration,
    /// Maximum consecutive attempts without data.
    pub tries: u32,
    /// Pause after the first failed attempt. It doubles each time.
    pub pause: Duration,
    /// Maximum pause that is accepted from a hub. Its limits are per five minutes.
    pub longest_pause: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            response: Duration::from_secs(60),
            silence: Duration::from_secs(60),
            late: Duration::from_secs(3),
            tries: 6,
            pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(330),
        }
    }
}

/// A token; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Removes surrounding white space from files and shells; `None` if nothing is left.
    pub fn new(secret: &str) -> Option<Self> {
        let secret = secret.trim();
        (!secret.is_empty()).then(|| Self(secret.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// Subject of a request, for messages.
pub(super) struct Asked<'a> {
    pub(super) kind: RepoKind,
    pub(super) id: &'a str,
    pub(super) revision: &'a str,
    pub(super) file: Option<&'a str>,
}

impl fmt::Display for Asked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.file {
            Some(file) => write!(f, "{file} of {}", self.id),
            None => f.write_str(self.id),
        }
    }
}

/// An open answer to a file request.
pub(super) struct OpenBody {
    /// Position of the body's first byte in the file.
    pub(super) start: u64,
    pub(super) body: Box<dyn Read>,
}

/// An answer to a range request, with its address after all redirects.
pub(super) struct HubResponse {
    pub(super) response: Response<Body>,
    pub(super) url: String,
}

pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
    pub(super) timeouts: Timeouts,
    /// Time until which the hub asked for a pause. It counts all requests of an address together,
    /// so that all threads wait.
    resting: Mutex<Option<Instant>>,
    rate_limiter: RateLimiter,
}

impl Client {
    pub(super) fn new(options: &HubOptions) -> Result<Self> {
        let (endpoint, token, timeouts) =
            (options.endpoint.trim_end_matches('/').to_owned(), options.token.clone(), options.timeouts);
        let loopback = check_endpoint(&endpoint, token.is_some())?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(timeouts.connect))
            .timeout_recv_response(Some(timeouts.response))
            .timeout_per_read(Some(timeouts.silence))
            // Connections are reused: a new one costs two round trips more and starts slowly.
            .max_idle_connections(MAX_CONNECTIONS)
            .max_idle_connections_per_host(MAX_CONNECTIONS)
            // A compressed body has neither the listed size nor meaningful ranges.
            .accept_encoding("identity")
            .user_agent(concat!("outliers-worker/", env!("CARGO_PKG_VERSION")));
        if loopback {
            config = config.proxy(None);
        }
        let rate_limiter = RateLimiter::new(options.requests, WINDOW);
        Ok(Self { agent: config.build().into(), endpoint, token, timeouts, resting: Mutex::default(), rate_limiter })
    }

    /// The content of a small document, at most `limit` bytes.
    pub(super) fn read_small(&self, path: &str, asked: &Asked<'_>, limit: u64) -> Result<Vec<u8>> {
        let url = format!("{}{path}", self.endpoint);
        self.persist(asked, || {
            let response = self.get(&url, None, asked)?.response;
            let mut bytes = Vec::new();
            let read = response.into_body().into_reader().take(limit + 1).read_to_end(&mut bytes);
            read.map_err(|error| RequestFailure::again(format!("the answer broke off: {error}")))?;
            if bytes.len() as u64 > limit {
                let message = format!("the hub's description of {asked} is over the limit of {limit} bytes");
                return Err(RequestFailure::Final(WorkerError::network(message)));
            }
            Ok(bytes)
        })
    }

    /// Opens `range` of a file, with one attempt. The body may begin before the range, not after
    /// it.
    pub(super) fn open(
        &self,
        listing: &RepoListing,
        file: &str,
        range: Range<u64>,
    ) -> Result<OpenBody, RequestFailure> {
        let response = self.get(&self.file_url(listing, file), Some(&range), &listing.asked(file))?.response;
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => content_range(&response).map(|(start, _)| start),
            _ => Some(0),
        };
        match start {
            Some(start) if start == range.start || start == 0 => {
                Ok(OpenBody { start, body: Box::new(response.into_body().into_reader()) })
            }
            _ => Err(RequestFailure::again("the hub answered with other bytes than were asked for".to_owned())),
        }
    }

    /// Size and hash of a file by the headers of its download.
    pub(super) fn describe(&self, listing: &RepoListing, file: &str) -> Result<RepoFile> {
        let asked = listing.asked(file);
        self.persist(&asked, || {
            let mut digest = None;
            let answer = self.follow(&self.file_url(listing, file), Some(&(0..1)), &asked, true, &mut |response| {
                digest = digest.take().or_else(|| etag(response));
            })?;
            let size = content_range(&answer.response).and_then(|(_, total)| total);
            Ok(RepoFile { name: file.to_owned(), size, digest })
        })
    }

    pub(super) fn file_url(&self, listing: &RepoListing, file: &str) -> String {
        let file: Vec<String> = file.split('/').map(encode).collect();
        format!(
            "{}/{}{}/resolve/{}/{}",
            self.endpoint,
            listing.kind.prefix(),
            listing.id,
            listing.commit,
            file.join("/")
        )
    }

    /// Requests a document from the hub.
    pub(super) fn get(
        &self,
        url: &str,
        range: Option<&Range<u64>>,
        asked: &Asked<'_>,
    ) -> Result<HubResponse, RequestFailure> {
        self.follow(url, range, asked, true, &mut |_| ())
    }

    /// Requests bytes from a known address. A hub that sends files itself does not count such
    /// requests.
    pub(super) fn get_at(
        &self,
        address: &str,
        range: &Range<u64>,
        asked: &Asked<'_>,
    ) -> Result<HubResponse, RequestFailure> {
        self.follow(address, Some(range), asked, false, &mut |_| ())
    }

    /// Sends a request and follows redirects; `see` receives every answer. The token is sent only
    /// to the hub's address. `counted` tells whether requests there count against the limit.
    fn follow(
        &self,
        url: &str,
        range: Option<&Range<u64>>,
        asked: &Asked<'_>,
        counted: bool,
        see: &mut dyn FnMut(&Response<Body>),
    ) -> Result<HubResponse, RequestFailure> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if self.is_hub(&url) {
                if counted {
                    self.rate_limiter.take();
                }
                self.let_it_rest();
                if let Some(token) = &self.token {
                    request = request.header(AUTHORIZATION, format!("Bearer {}", token.0));
                }
            }
            if let Some(range) = range {
                request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
            }
            let response = request.call().map_err(unreachable)?;
            see(&response);
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(HubResponse { response, url }),
                status if status.is_redirection() => url = redirect(&url, &response)?,
                _ => return Err(self.refused(&response, asked, self.is_hub(&url))),
            }
        }
        Err(RequestFailure::Final(WorkerError::network(format!("{asked}: more than {MAX_REDIRECTS} redirects"))))
    }

    /// Whether an address is the hub's: it receives the token, and its limits count.
    pub(super) fn is_hub(&self, url: &str) -> bool {
        same_origin(url, &self.endpoint)
    }

    fn let_it_rest(&self) {
        let until = *self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(left) = until.and_then(|until| until.checked_duration_since(Instant::now())) {
            thread::sleep(left);
        }
    }

    fn rest_for(&self, wait: Duration) {
        let until = Instant::now() + wait;
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        *resting = Some(resting.map_or(until, |other| other.max(until)));
    }

    /// Retries until success, a permanent error, or the last attempt.
    pub(super) fn persist<T>(
        &self,
        asked: &Asked<'_>,
        mut attempt: impl FnMut() -> Result<T, RequestFailure>,
    ) -> Result<T> {
        let mut tries = 0;
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(RequestFailure::Final(error)) => return Err(error),
                Err(refusal) => {
                    tries += 1;
                    self.pause(tries, refusal).map_err(|error| error.context(format!("cannot fetch {asked}")))?;
                }
            }
        }
    }

    /// Waits before the next attempt, or returns the error after the last.
    pub(super) fn pause(&self, failed: u32, refusal: RequestFailure) -> Result<()> {
        let Timeouts { tries, pause, longest_pause, .. } = self.timeouts;
        let (why, asked_for) = match refusal {
            RequestFailure::Final(error) => return Err(error),
            // A new address needs only one request.
            RequestFailure::Expired(why) => (why, (failed == 1).then_some(Duration::ZERO)),
            RequestFailure::Retry { why, pause } => (why, pause),
        };
        if failed >= tries {
            let message = format!("{why} (tried {failed} times)");
            return Err(WorkerError::network(message).hint("check the network, or try again later"));
        }
        match asked_for {
            Some(wait) if wait > longest_pause => {
                let message = format!("{why}; the hub asks to wait {} seconds", wait.as_secs());
                Err(WorkerError::network(message)
                    .hint("try again later; with a token (HF_TOKEN) the limits are higher"))
            }
            wait => {
                let wait = wait.unwrap_or(pause * 2_u32.saturating_pow(failed - 1)).min(longest_pause);
                tracing::warn!(seconds = wait.as_secs_f32(), "{why}; trying again");
                thread::sleep(wait);
                Ok(())
            }
        }
    }

    /// The error of a status other than success.
    fn refused(&self, response: &Response<Body>, asked: &Asked<'_>, from_hub: bool) -> RequestFailure {
        let status = response.status();
        let said =
            header(response, "x-error-message").map_or(String::new(), |text| format!(": {}", printable(text, 300)));
        let host = if from_hub { "the hub" } else { "the hub's file server" };
        let why = format!("{host} answered {}{said}", status.as_u16());
        if status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::REQUEST_TIMEOUT || status.is_server_error()
        {
            let pause = wait_asked_for(response);
            if let Some(wait) = pause.filter(|wait| from_hub && *wait <= self.timeouts.longest_pause) {
                self.rest_for(wait);
            }
            return RequestFailure::Retry { why, pause };
        }
        if !from_hub && status == StatusCode::RANGE_NOT_SATISFIABLE {
            // Ranges are within the listed size.
            return RequestFailure::Expired(format!(
                "{why}: its file is shorter than the hub's, it is another version"
            ));
        }
        if !from_hub {
            return RequestFailure::Expired(why);
        }
        RequestFailure::Final(self.explained(status, header(response, "x-error-code").unwrap_or(""), &said, asked))
    }

    fn explained(&self, status: StatusCode, code: &str, said: &str, asked: &Asked<'_>) -> WorkerError {
        let Asked { kind, id, revision, .. } = asked;
        let page = format!("{}/{}{id}", self.endpoint, kind.prefix());
        match (status.as_u16(), code, &self.token, asked.file) {
            (_, "GatedRepo", None, _) => WorkerError::model_gated(format!("{kind} {id} is gated{said}"))
                .hint(format!("accept its conditions at {page}, then set HF_TOKEN")),
            (_, "GatedRepo", Some(_), _) => {
                WorkerError::model_gated(format!("the token has no access to the gated {kind} {id}{said}"))
                    .hint(format!("accept its conditions at {page} with the token's account"))
            }
            (_, "RevisionNotFound", ..) => {
                WorkerError::model_not_found(format!("{kind} {id} has no revision {revision}"))
                    .hint("use a branch, tag or commit that its page lists; the default is main")
            }
            (404, "EntryNotFound", _, Some(file)) => WorkerError::checkpoint(format!("{kind} {id} has no file {file}")),
            (401, "", Some(_), _) => WorkerError::model_gated(format!("the hub refused the token{said}"))
                .hint("check HF_TOKEN: it may be mistyped, expired or revoked"),
            (401 | 404, ..) => WorkerError::model_not_found(format!("there is no {kind} {id} on {}", self.endpoint))
                .hint("check the spelling; a private one needs HF_TOKEN"),
            (403, ..) => WorkerError::model_gated(format!("access to {kind} {id} is forbidden{said}"))
                .hint("check what the token in HF_TOKEN may read"),
            (other, ..) => WorkerError::network(format!("the hub answered {other} for {asked}{said}")),
        }
    }
}

impl RepoListing {
    pub(super) fn asked<'a>(&'a self, file: &'a str) -> Asked<'a> {
        Asked { kind: self.kind, id: &self.id, revision: &self.revision, file: Some(file) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_never_printed() {
        let token = Token::new(" hf_secret\n").unwrap();
        assert_eq!(format!("{token:?}"), "Token(***)");
        assert_eq!(Token::new(" \n"), None);
    }
}
