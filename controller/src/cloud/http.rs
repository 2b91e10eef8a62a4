//! The HTTP client for all clouds.
//!
//! Whether a call is repeated depends on its effect. A call that was certainly not accepted is
//! repeated. An idempotent one is repeated after any failure. A creating one is never repeated
//! unless the cloud refused it. Keys never appear in errors, logs or explanations.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rand::Rng;
use reqwest::header::{AUTHORIZATION, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;

pub use reqwest::{Method, header};

use crate::cloud::broker_error::{BrokerError, BrokerErrorKind};
use crate::secret::Secret;
use crate::text::{clean, clean_lines};
use crate::waiting::{self, Failed};

mod rate_limit;
mod redact;
#[cfg(test)]
mod tests;

use rate_limit::RateLimits;
use redact::Hidden;
pub(crate) use redact::{address, percent};

/// Maximum bytes of a reply: a listing of some thousand instances.
const LARGEST_REPLY: usize = 32 << 20;
/// Maximum characters of a cloud's message that are shown.
const LONGEST_WORDS: usize = 400;
/// Factor of the pause after "too many requests" without a stated time, compared with a failure:
/// such limits are for some seconds.
const TOO_OFTEN: u32 = 8;

/// Marks an unknown clock skew.
const NO_SKEW: i64 = i64::MIN;

/// Effect of making a call twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idempotency {
    /// None: it reads.
    Read,
    /// The same as once.
    Idempotent,
    /// A second effect. Never repeated blindly.
    Once,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Call {
    method: Method,
    path: String,
    query: Vec<(String, String)>,
    body: Option<Value>,
    effect: Idempotency,
    pace: Option<&'static str>,
}

impl Call {
    /// Reads `path`, relative to the base URL, with a leading `/`.
    pub fn get(path: impl Into<String>) -> Self {
        Self {
            method: Method::GET,
            path: path.into(),
            query: Vec::new(),
            body: None,
            effect: Idempotency::Read,
            pace: None,
        }
    }

    /// Any other call.
    pub fn new(method: Method, path: impl Into<String>, effect: Idempotency) -> Self {
        Self { method, effect, ..Self::get(path) }
    }

    /// Adds a query parameter, encoded.
    #[must_use]
    pub fn query(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.query.push((name.to_owned(), value.to_string()));
        self
    }

    /// Sets a JSON body.
    #[must_use]
    pub fn body(self, body: Value) -> Self {
        Self { body: Some(body), ..self }
    }

    /// Applies the rate limit of this name, see [`Http::paced`].
    #[must_use]
    pub fn at_pace(self, name: &'static str) -> Self {
        Self { pace: Some(name), ..self }
    }
}

/// Timeouts and attempts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HttpLimits {
    /// Timeout of a connection.
    pub connect: Duration,
    /// Timeout between two bytes of a reply.
    pub read: Duration,
    /// Time limit of all attempts of a call, pauses included. A started attempt still has
    /// [`HttpLimits::read`].
    pub total: Duration,
    /// Attempts, the first included.
    pub attempts: u32,
    /// First pause after a failure. It doubles.
    pub backoff: Duration,
    /// Divisor of rate limits and pauses: 1 outside of tests. Pauses that a cloud requests are not
    /// shortened.
    pub hurry: u32,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(30),
            total: Duration::from_secs(90),
            attempts: 5,
            backoff: Duration::from_millis(500),
            hurry: 1,
        }
    }
}

/// A callback for descriptions of requests and replies, without secrets.
pub type Explain = Arc<dyn Fn(&str) + Send + Sync>;

/// A server's answer to one request.
#[derive(Clone, Debug)]
pub struct RawResponse {
    /// HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Vec<u8>,
    /// Seconds by which the server's clock was ahead of this machine's when the headers arrived.
    pub clock_skew: Option<i64>,
}

/// Failure of a request without a complete answer.
#[derive(Clone, Debug)]
pub struct NoResponse {
    /// Whether certainly no server accepted the request.
    pub certainly_not_taken: bool,
    /// Description of the failure.
    pub words: String,
}

/// Sends single requests for [`Http`], which decides on pauses, repetition and redaction.
#[async_trait]
pub trait HttpTransport: Send + Sync {
    /// Sends `call` to `url`, the base URL with the call's path.
    ///
    /// # Errors
    /// [`NoResponse`].
    async fn exchange(&self, url: &str, call: &Call) -> Result<RawResponse, NoResponse>;
}

/// The real network.
struct Network {
    client: reqwest::Client,
    /// Opens a new connection per call, for calls with effect once: a kept connection may be
    /// closed by the server at any moment, and then it would be unknown whether the call was
    /// executed.
    fresh: reqwest::Client,
}

#[async_trait]
impl HttpTransport for Network {
    async fn exchange(&self, url: &str, call: &Call) -> Result<RawResponse, NoResponse> {
        let client = if call.effect == Idempotency::Once { &self.fresh } else { &self.client };
        let mut request = client.request(call.method.clone(), url).query(&call.query);
        if let Some(body) = &call.body {
            request = request.json(body);
        }
        let begun = SystemTime::now();
        let mut response = request.send().await.map_err(|error| no_answer(&error))?;
        let clock_skew = skew(response.headers(), begun);
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| no_answer(&error))? {
            if body.len() + chunk.len() > LARGEST_REPLY {
                let words = format!("its reply has more than {} MiB", LARGEST_REPLY >> 20);
                return Err(NoResponse { certainly_not_taken: false, words });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(RawResponse { status, headers, body, clock_skew })
    }
}

fn no_answer(error: &reqwest::Error) -> NoResponse {
    // No server accepted it.
    if error.is_connect() || error.is_builder() {
        return NoResponse { certainly_not_taken: true, words: chain(error) };
    }
    let what = if error.is_timeout() { "no answer in time" } else { "the connection broke" };
    NoResponse { certainly_not_taken: false, words: format!("{what}: {}", chain(error)) }
}

/// Client of one cloud. Clones share rate limits.
#[derive(Clone)]
pub struct Http {
    transport: Arc<dyn HttpTransport>,
    broker: &'static str,
    base: String,
    key: Option<Hidden>,
    limits: HttpLimits,
    paces: Arc<RateLimits>,
    /// Seconds by which the cloud's clock is ahead of the local one, by its latest answer; the
    /// minimum value: no answer yet.
    skew: Arc<AtomicI64>,
    /// Text in a "too many requests" answer which means that waiting does not help.
    final_words: &'static [&'static str],
    explain: Option<Explain>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("broker", &self.broker).field("base", &self.base).finish_non_exhaustive()
    }
}

impl Http {
    /// A client of the cloud `broker` at `base`, with `key` as bearer token.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Rejected`] if `base` is not a valid URL, [`BrokerErrorKind::Auth`] if
    /// the key is not a valid header.
    pub fn new(broker: &'static str, base: &str, key: Option<Secret>, limits: HttpLimits) -> Result<Self, BrokerError> {
        let error = |kind, message: String| BrokerError { broker, kind, message };
        let base = base.trim_end_matches('/').to_owned();
        let url = reqwest::Url::parse(&base).ok().filter(|url| ["http", "https"].contains(&url.scheme()));
        let Some(url) = url else {
            return Err(error(
                BrokerErrorKind::Rejected,
                format!("`{}` is no web address", clean(redact::address(&base).as_bytes(), 200)),
            ));
        };
        if !url.username().is_empty() || url.password().is_some() {
            let shown = clean(redact::address(&base).as_bytes(), 200);
            let message = format!("`{shown}` holds a password, beside which no key can be sent: leave it out");
            return Err(error(BrokerErrorKind::Rejected, message));
        }
        let is_here = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        if url.scheme() == "http" && !is_here && key.is_some() {
            let message = format!("`{base}` is not encrypted: the key would be read on the way");
            return Err(error(BrokerErrorKind::Rejected, message));
        }
        let mut headers = HeaderMap::new();
        if let Some(key) = &key {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", key.expose()))
                .map_err(|_| error(BrokerErrorKind::Auth, "the key holds characters that no key has".to_owned()))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = |kept: usize| {
            let builder = reqwest::Client::builder()
                .user_agent(concat!("outliers/", env!("CARGO_PKG_VERSION")))
                .default_headers(headers.clone())
                .connect_timeout(limits.connect)
                .read_timeout(limits.read)
                .pool_max_idle_per_host(kept)
                // A followed redirect could repeat a creation, or send the key elsewhere.
                .redirect(reqwest::redirect::Policy::none());
            // Local servers are not reached through a proxy.
            let builder = if is_here { builder.no_proxy() } else { builder };
            let failed = |cause| error(BrokerErrorKind::Unavailable, format!("no HTTP client: {}", chain(&cause)));
            builder.build().map_err(failed)
        };
        let network = Network { client: client(usize::MAX)?, fresh: client(0)? };
        let key = key.map(|key| Hidden::new(&key));
        Ok(Self {
            transport: Arc::new(network),
            broker,
            base,
            key,
            limits,
            paces: Arc::default(),
            skew: Arc::new(AtomicI64::new(NO_SKEW)),
            final_words: &[],
            explain: None,
        })
    }

    /// At most one call per `every`: of all calls, or of those marked with `name`.
    #[must_use]
    pub fn paced(self, name: Option<&'static str>, every: Duration) -> Self {
        self.paces.set(name, every / self.limits.hurry.max(1));
        self
    }

    /// Returns "too many requests" answers that contain such text as ordinary answers, since
    /// waiting does not help.
    #[must_use]
    pub fn final_when(self, final_words: &'static [&'static str]) -> Self {
        Self { final_words, ..self }
    }

    /// Describes requests and replies to `explain`.
    #[must_use]
    pub fn explained(self, explain: Option<Explain>) -> Self {
        Self { explain, ..self }
    }

    /// Sends requests through `transport` instead of the network.
    #[must_use]
    pub fn over(self, transport: Arc<dyn HttpTransport>) -> Self {
        Self { transport, ..self }
    }

    /// An error of this cloud that is about no reply.
    pub fn error(&self, kind: BrokerErrorKind, message: impl Into<String>) -> BrokerError {
        BrokerError { broker: self.broker, kind, message: message.into() }
    }

    /// Seconds by which the cloud's clock is ahead of this machine's, by its latest answer.
    pub fn clock_skew(&self) -> Option<i64> {
        Some(self.skew.load(Ordering::Relaxed)).filter(|skew| *skew != NO_SKEW)
    }

    /// Makes the call, and repeats it if that is safe. Any answer except rate limits and server
    /// failures is returned, refusals included. While the cloud asks for a pause, no call of this
    /// rate limit is made.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Maybe`] if a call with [`Idempotency::Once`] may have been executed;
    /// [`BrokerErrorKind::RateLimited`] and [`BrokerErrorKind::Unavailable`] if it was not, after
    /// all attempts.
    pub async fn call(&self, call: Call) -> Result<Response, BrokerError> {
        let held = self.paces.held(call.pace);
        if held >= self.limits.total {
            let failure = Failure::too_often("it has asked to be left alone".to_owned(), Some(held));
            return Err(self.give_up(&call, failure));
        }
        self.paces.acquire(call.pace).await;
        // Set now, since waiting for the rate limit does not count.
        let deadline = Instant::now() + self.limits.total;
        let mut attempt = 1;
        loop {
            let failure = match self.attempt(&call, deadline).await {
                Ok(reply) => return Ok(reply),
                Err(failure) => failure,
            };
            self.tell(|| format!("! {}", failure.words));
            if let Some(wait) = failure.wait {
                self.paces.hold(call.pace, wait);
            }
            let again = failure.certainly_not_taken || call.effect != Idempotency::Once;
            let pause = failure.wait.unwrap_or_else(|| self.backoff(attempt, &failure));
            let left = deadline.saturating_duration_since(Instant::now());
            if !again || attempt >= self.limits.attempts || pause >= left {
                return Err(self.give_up(&call, failure));
            }
            tracing::info!("{}: {}; again in {:.1} s", self.broker, failure.words, pause.as_secs_f64());
            waiting::tell(|| Failed { words: format!("{}: {}", self.broker, failure.words), pause });
            tokio::time::sleep(pause).await;
            self.paces.acquire(call.pace).await;
            attempt += 1;
        }
    }

    async fn attempt(&self, call: &Call, deadline: Instant) -> Result<Response, Failure> {
        let left = deadline.saturating_duration_since(Instant::now()).max(self.limits.read);
        let (status, headers, body) = match tokio::time::timeout(left, self.exchange(call)).await {
            Ok(answered) => answered?,
            Err(_) => return Err(Failure::unknown(format!("no whole answer within {:.0} s", left.as_secs_f64()))),
        };
        let body = self.redacted(&body);
        self.tell(|| format!("< {status}\n{}", redact::document(&body)));
        let reply = Response { broker: self.broker, effect: call.effect, key: self.key.clone(), status, body };
        match status {
            429 if self.final_words.iter().any(|word| reply.body.contains(word)) => Ok(reply),
            429 => Err(Failure::too_often(reply.in_words(), retry_after(&headers))),
            // A failure of the server, or its timeout for a slow request. It is unknown what was
            // executed.
            408 | 500.. => Err(Failure { wait: retry_after(&headers), ..Failure::unknown(reply.in_words()) }),
            _ => Ok(reply),
        }
    }

    /// Status, headers, body.
    async fn exchange(&self, call: &Call) -> Result<(u16, HeaderMap, String), Failure> {
        let url = format!("{}{}", self.base, call.path);
        self.tell(|| self.request_in_words(call));
        let answer = self.transport.exchange(&url, call).await.map_err(|error| self.failure(&error))?;
        if let Some(skew) = answer.clock_skew {
            self.skew.store(skew, Ordering::Relaxed);
        }
        Ok((answer.status, answer.headers, String::from_utf8_lossy(&answer.body).into_owned()))
    }

    fn failure(&self, error: &NoResponse) -> Failure {
        let words = self.redacted(&error.words);
        if error.certainly_not_taken {
            return Failure::refused(format!("{} cannot be reached: {words}", self.base));
        }
        Failure::unknown(words)
    }

    fn give_up(&self, call: &Call, failure: Failure) -> BrokerError {
        let kind = match failure.kind {
            Some(kind) => kind,
            None if call.effect == Idempotency::Once && !failure.certainly_not_taken => BrokerErrorKind::Maybe,
            None => BrokerErrorKind::Unavailable,
        };
        let words = match failure.wait {
            Some(wait) => format!("{} (it asks to wait {} s)", failure.words, wait.as_secs()),
            None => failure.words,
        };
        self.error(kind, format!("{} {}: {words}", call.method, call.path))
    }

    /// With jitter, so that calls that failed together are not repeated together.
    fn backoff(&self, attempt: u32, failure: &Failure) -> Duration {
        let too_often = failure.kind == Some(BrokerErrorKind::RateLimited);
        let first = self.limits.backoff * if too_often { TOO_OFTEN } else { 1 } / self.limits.hurry.max(1);
        let most = first * 2u32.saturating_pow(attempt - 1).min(64);
        most.mul_f64(rand::rng().random_range(0.5..1.0))
    }

    fn redacted(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| key.out_of(text))
    }

    fn tell(&self, words: impl FnOnce() -> String) {
        if let Some(explain) = &self.explain {
            // Cleaning may join a key that control characters separated, so it is redacted again.
            explain(&self.redacted(&clean_lines(&self.redacted(&words()))));
        }
    }

    fn request_in_words(&self, call: &Call) -> String {
        let query: Vec<String> = call.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
        let key = if self.key.is_some() { "\nAuthorization: Bearer ***" } else { "" };
        let body = call.body.as_ref().map(|body| format!("\n{}", redact::value(body))).unwrap_or_default();
        format!("> {} {}{}{query}{key}{body}", call.method, self.base, call.path)
    }
}

/// An attempt without a usable answer.
struct Failure {
    certainly_not_taken: bool,
    wait: Option<Duration>,
    kind: Option<BrokerErrorKind>,
    words: String,
}

impl Failure {
    fn refused(words: String) -> Self {
        Self { certainly_not_taken: true, wait: None, kind: None, words }
    }

    fn too_often(words: String, wait: Option<Duration>) -> Self {
        Self { wait, kind: Some(BrokerErrorKind::RateLimited), ..Self::refused(words) }
    }

    fn unknown(words: String) -> Self {
        Self { certainly_not_taken: false, wait: None, kind: None, words }
    }
}

/// A cloud's answer. The key is removed from it.
#[derive(Clone, Debug)]
pub struct Response {
    broker: &'static str,
    effect: Idempotency,
    key: Option<Hidden>,
    /// HTTP status below 500, except 408; 429 only by [`Http::final_when`].
    pub status: u16,
    /// The body as text.
    pub body: String,
}

impl Response {
    /// A recorded reply, for tests.
    #[cfg(test)]
    pub(crate) fn recorded(effect: Idempotency, status: u16, body: impl fmt::Display) -> Self {
        Self { broker: "test", effect, status, body: body.to_string(), key: None }
    }

    /// Whether the status reports success.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The reply, unless it is a refusal, of the kind that `kind_of` tells.
    pub fn granted(self, kind_of: impl Fn(&Self) -> BrokerErrorKind) -> Result<Self, BrokerError> {
        if self.is_success() { Ok(self) } else { Err(self.refusal(kind_of(&self))) }
    }

    /// Parses the body as `T`; `what` names it in the error.
    ///
    /// # Errors
    /// The body is something else. The effect of a call with [`Idempotency::Once`] is then
    /// unknown.
    pub fn json<T: DeserializeOwned>(&self, what: &str) -> Result<T, BrokerError> {
        serde_json::from_str(&self.body).map_err(|error| {
            let message = format!("its answer is not {what} ({error}): {}", clean(self.body.as_bytes(), 120));
            self.error(self.unclear(), message)
        })
    }

    /// The body as JSON; `None` if it is not JSON.
    pub fn value(&self) -> Option<Value> {
        serde_json::from_str(&self.body).ok()
    }

    /// An error about this reply.
    pub fn error(&self, kind: BrokerErrorKind, message: impl Into<String>) -> BrokerError {
        BrokerError { broker: self.broker, kind, message: self.without_key(&message.into()) }
    }

    /// Redacts again after every change of the text: an escape, or a control character in it, may
    /// have hidden the key.
    fn without_key(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| key.out_of(text))
    }

    /// An error with the cloud's message.
    pub fn refusal(&self, kind: BrokerErrorKind) -> BrokerError {
        self.error(kind, self.in_words())
    }

    /// Error kind of an invalid answer.
    pub fn unclear(&self) -> BrokerErrorKind {
        if self.effect == Idempotency::Once { BrokerErrorKind::Maybe } else { BrokerErrorKind::Unavailable }
    }

    /// The cloud's message with the status: its title, detail, error or message fields, else the
    /// body.
    pub fn in_words(&self) -> String {
        let words = self.value().map(|value| redact::sentences(&value)).filter(|words| !words.is_empty());
        let words = words.unwrap_or_else(|| self.body.clone());
        let words = clean(self.without_key(&words).trim().as_bytes(), LONGEST_WORDS);
        let words = self.without_key(&words);
        if words.is_empty() { format!("HTTP {}", self.status) } else { format!("HTTP {}: {words}", self.status) }
    }
}

/// The pause of `Retry-After` in seconds or as a date, else the first window of a `RateLimit`
/// header (`"default";r=0;t=5`).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(after) = text(RETRY_AFTER.as_str()) {
        if let Ok(seconds) = after.trim().parse() {
            return Some(Duration::from_secs(seconds));
        }
        let date = httpdate::parse_http_date(after).ok()?;
        return Some(date.duration_since(SystemTime::now()).unwrap_or_default());
    }
    let window = text("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
    window.parse().ok().map(Duration::from_secs)
}

/// Seconds by which a server's clock is ahead of the local one, by the date of any answer of
/// `url`; `None` if it has none.
///
/// # Errors
/// A message, if it does not answer.
pub async fn clock_skew(url: &str) -> Result<Option<i64>, String> {
    let limits = HttpLimits::default();
    let client = reqwest::Client::builder().connect_timeout(limits.connect).timeout(limits.read).build();
    let client = client.map_err(|error| chain(&error))?;
    let begun = SystemTime::now();
    let response = client.head(url).send().await.map_err(|error| chain(&error))?;
    Ok(skew(response.headers(), begun))
}

/// Seconds by which an answer's date is ahead of the local clock. A date since `begun` counts as
/// no skew.
fn skew(headers: &HeaderMap, begun: SystemTime) -> Option<i64> {
    let theirs = httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()?;
    let seconds =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let (theirs, begun, ended) = (seconds(theirs), seconds(begun), seconds(SystemTime::now()));
    Some(theirs - theirs.clamp(begun.min(ended), ended))
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !words.contains(&next) {
            words = format!("{words}: {next}");
        }
        cause = error.source();
    }
    words
}
