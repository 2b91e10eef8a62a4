//! One HTTP client for all clouds.
//!
//! What may be sent again depends on what may have happened: a call that was certainly not taken
//! is repeated, one that can be made twice without harm is repeated after any failure, and one
//! that creates is never repeated unless the cloud said no. Keys are in no error, log or
//! explanation.

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

/// Largest reply that is read: a listing of some thousand instances.
const LARGEST_REPLY: usize = 32 << 20;
/// Longest sentence of a cloud that is repeated to people.
const LONGEST_WORDS: usize = 400;
/// How many times longer than after a failure one waits after "too often" without a time: such
/// clouds mean some seconds.
const TOO_OFTEN: u32 = 8;

/// No clock is so far away.
const NO_SKEW: i64 = i64::MIN;

/// What happens if a call is made twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: it reads.
    Read,
    /// The same as once.
    Idempotent,
    /// Twice as much. Never repeated blindly.
    Once,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Call {
    method: Method,
    path: String,
    query: Vec<(String, String)>,
    body: Option<Value>,
    effect: Effect,
    pace: Option<&'static str>,
}

impl Call {
    /// Reads `path`, which is seen from the base URL and begins with `/`.
    pub fn get(path: impl Into<String>) -> Self {
        Self { method: Method::GET, path: path.into(), query: Vec::new(), body: None, effect: Effect::Read, pace: None }
    }

    /// Any other call.
    pub fn new(method: Method, path: impl Into<String>, effect: Effect) -> Self {
        Self { method, effect, ..Self::get(path) }
    }

    /// With a parameter of the query; it is encoded.
    #[must_use]
    pub fn query(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.query.push((name.to_owned(), value.to_string()));
        self
    }

    /// With a JSON body.
    #[must_use]
    pub fn body(self, body: Value) -> Self {
        Self { body: Some(body), ..self }
    }

    /// Also bound by the pace of this name, see [`Http::paced`].
    #[must_use]
    pub fn at_pace(self, name: &'static str) -> Self {
        Self { pace: Some(name), ..self }
    }
}

/// How long and how often the client tries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// To connect.
    pub connect: Duration,
    /// Between two bytes of a reply.
    pub read: Duration,
    /// For all attempts of one call together, from the first on, waits between them included. An
    /// attempt that has begun is given [`Limits::read`] all the same.
    pub total: Duration,
    /// Attempts, the first included.
    pub attempts: u32,
    /// First wait after a failure; doubles.
    pub backoff: Duration,
    /// Paces and backoff are this many times shorter: 1 outside of tests. What a cloud asks for is
    /// not shortened.
    pub hurry: u32,
}

impl Default for Limits {
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
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Vec<u8>,
    /// Seconds by which the server's clock was ahead of this machine's when the headers came.
    pub clock_skew: Option<i64>,
}

/// Why a request has no whole answer.
#[derive(Clone, Debug)]
pub struct NoAnswer {
    /// No server was there to take the request.
    pub certainly_not_taken: bool,
    /// What happened.
    pub words: String,
}

/// Sends one request of [`Http`], which decides on waits, repetition and redaction.
#[async_trait]
pub trait HttpTransport: Send + Sync {
    /// Makes `call` at `url`, which is the base URL with the call's path.
    ///
    /// # Errors
    /// [`NoAnswer`].
    async fn exchange(&self, url: &str, call: &Call) -> Result<Answer, NoAnswer>;
}

/// The network.
struct Network {
    client: reqwest::Client,
    /// For calls that are made once: a fresh connection each, because one that was kept may be
    /// closed from the other side at this very moment, and nobody could say whether the call went
    /// through.
    fresh: reqwest::Client,
}

#[async_trait]
impl HttpTransport for Network {
    async fn exchange(&self, url: &str, call: &Call) -> Result<Answer, NoAnswer> {
        let client = if call.effect == Effect::Once { &self.fresh } else { &self.client };
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
                return Err(NoAnswer { certainly_not_taken: false, words });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, headers, body, clock_skew })
    }
}

fn no_answer(error: &reqwest::Error) -> NoAnswer {
    // Nobody was there to take it.
    if error.is_connect() || error.is_builder() {
        return NoAnswer { certainly_not_taken: true, words: chain(error) };
    }
    let what = if error.is_timeout() { "no answer in time" } else { "the connection broke" };
    NoAnswer { certainly_not_taken: false, words: format!("{what}: {}", chain(error)) }
}

/// Speaks to one cloud. Clones share their paces.
#[derive(Clone)]
pub struct Http {
    transport: Arc<dyn HttpTransport>,
    broker: &'static str,
    base: String,
    key: Option<Hidden>,
    limits: Limits,
    paces: Arc<RateLimits>,
    /// Seconds by which the cloud's clock is ahead of ours, by its latest answer; the least
    /// number: no answer yet.
    skew: Arc<AtomicI64>,
    /// Words in an answer "too often" that say that no wait will help.
    final_words: &'static [&'static str],
    explain: Option<Explain>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("broker", &self.broker).field("base", &self.base).finish_non_exhaustive()
    }
}

impl Http {
    /// A client of the cloud `broker` at `base`, with `key` as bearer.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Rejected`] when `base` is no URL of a web server, [`BrokerErrorKind::Auth`] when the key cannot be one.
    pub fn new(broker: &'static str, base: &str, key: Option<Secret>, limits: Limits) -> Result<Self, BrokerError> {
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
                // A redirected creation would be made twice, and a key would go elsewhere.
                .redirect(reqwest::redirect::Policy::none());
            // No proxy knows this machine's own servers.
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

    /// At most one call per `every`, of all or of those marked with `name`.
    #[must_use]
    pub fn paced(self, name: Option<&'static str>, every: Duration) -> Self {
        self.paces.set(name, every / self.limits.hurry.max(1));
        self
    }

    /// A refusal "too often" that holds one of these is an answer as any other: no wait helps.
    #[must_use]
    pub fn final_when(self, final_words: &'static [&'static str]) -> Self {
        Self { final_words, ..self }
    }

    /// Tells `explain` what is sent and what comes back.
    #[must_use]
    pub fn explained(self, explain: Option<Explain>) -> Self {
        Self { explain, ..self }
    }

    /// Requests go through `transport` instead of the network.
    #[must_use]
    pub fn over(self, transport: Arc<dyn HttpTransport>) -> Self {
        Self { transport, ..self }
    }

    /// An error of this cloud that is about no reply.
    pub fn error(&self, kind: BrokerErrorKind, message: impl Into<String>) -> BrokerError {
        BrokerError { broker: self.broker, kind, message: message.into() }
    }

    /// Seconds by which the cloud's clock is ahead of this machine's, by the date of its latest
    /// answer.
    pub fn clock_skew(&self) -> Option<i64> {
        Some(self.skew.load(Ordering::Relaxed)).filter(|skew| *skew != NO_SKEW)
    }

    /// Makes the call, again where that is safe. Any answer that is neither "too often" nor the
    /// server's failure is returned, refusals included. Until the time is over that the cloud has
    /// asked to wait, no call of this pace is made at all.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Maybe`] when a call with [`Effect::Once`] may have been carried out; [`BrokerErrorKind::RateLimited`] and
    /// [`BrokerErrorKind::Unavailable`] when it was not, after all attempts.
    pub async fn call(&self, call: Call) -> Result<Reply, BrokerError> {
        let held = self.paces.held(call.pace);
        if held >= self.limits.total {
            let failure = Failure::too_often("it has asked to be left alone".to_owned(), Some(held));
            return Err(self.give_up(&call, failure));
        }
        self.paces.turn(call.pace).await;
        // Only now: to wait for one's turn is no failure, however many wait before.
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
            let again = failure.certainly_not_taken || call.effect != Effect::Once;
            let pause = failure.wait.unwrap_or_else(|| self.backoff(attempt, &failure));
            let left = deadline.saturating_duration_since(Instant::now());
            if !again || attempt >= self.limits.attempts || pause >= left {
                return Err(self.give_up(&call, failure));
            }
            tracing::info!("{}: {}; again in {:.1} s", self.broker, failure.words, pause.as_secs_f64());
            waiting::tell(|| Failed { words: format!("{}: {}", self.broker, failure.words), pause });
            tokio::time::sleep(pause).await;
            self.paces.turn(call.pace).await;
            attempt += 1;
        }
    }

    async fn attempt(&self, call: &Call, deadline: Instant) -> Result<Reply, Failure> {
        let left = deadline.saturating_duration_since(Instant::now()).max(self.limits.read);
        let (status, headers, body) = match tokio::time::timeout(left, self.exchange(call)).await {
            Ok(answered) => answered?,
            Err(_) => return Err(Failure::unknown(format!("no whole answer within {:.0} s", left.as_secs_f64()))),
        };
        let body = self.redacted(&body);
        self.tell(|| format!("< {status}\n{}", redact::document(&body)));
        let reply = Reply { broker: self.broker, effect: call.effect, key: self.key.clone(), status, body };
        match status {
            429 if self.final_words.iter().any(|word| reply.body.contains(word)) => Ok(reply),
            429 => Err(Failure::too_often(reply.in_words(), retry_after(&headers))),
            // The server's failure, or its impatience with a slow request. What was done until
            // then is not known.
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

    fn failure(&self, error: &NoAnswer) -> Failure {
        let words = self.redacted(&error.words);
        if error.certainly_not_taken {
            return Failure::refused(format!("{} cannot be reached: {words}", self.base));
        }
        Failure::unknown(words)
    }

    fn give_up(&self, call: &Call, failure: Failure) -> BrokerError {
        let kind = match failure.kind {
            Some(kind) => kind,
            None if call.effect == Effect::Once && !failure.certainly_not_taken => BrokerErrorKind::Maybe,
            None => BrokerErrorKind::Unavailable,
        };
        let words = match failure.wait {
            Some(wait) => format!("{} (it asks to wait {} s)", failure.words, wait.as_secs()),
            None => failure.words,
        };
        self.error(kind, format!("{} {}: {words}", call.method, call.path))
    }

    /// With jitter, so that many that failed together do not come back together.
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
            // Cleaning may bring together a key that control characters held apart.
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

/// An attempt that gave no answer to work with.
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

/// A cloud's answer; the key, should it be in it, is taken out.
#[derive(Clone, Debug)]
pub struct Reply {
    broker: &'static str,
    effect: Effect,
    key: Option<Hidden>,
    /// HTTP status; below 500, and not 408; 429 only as [`Http::final_when`] says.
    pub status: u16,
    /// The body as text.
    pub body: String,
}

impl Reply {
    /// A reply as a test has it written down.
    #[cfg(test)]
    pub(crate) fn recorded(effect: Effect, status: u16, body: impl fmt::Display) -> Self {
        Self { broker: "test", effect, status, body: body.to_string(), key: None }
    }

    /// Whether the cloud says that it was done.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body read as `T`; `what` names it in the error.
    ///
    /// # Errors
    /// When it is something else. The effect of a call with [`Effect::Once`] is then unknown.
    pub fn json<T: DeserializeOwned>(&self, what: &str) -> Result<T, BrokerError> {
        serde_json::from_str(&self.body).map_err(|error| {
            let message = format!("its answer is not {what} ({error}): {}", clean(self.body.as_bytes(), 120));
            self.error(self.unclear(), message)
        })
    }

    /// The body as JSON, `None` if it is none.
    pub fn value(&self) -> Option<Value> {
        serde_json::from_str(&self.body).ok()
    }

    /// An error about this reply.
    pub fn error(&self, kind: BrokerErrorKind, message: impl Into<String>) -> BrokerError {
        BrokerError { broker: self.broker, kind, message: self.without_key(&message.into()) }
    }

    /// Once more after every change of the text: an escape may have hidden the key, or a control
    /// character within it.
    fn without_key(&self, text: &str) -> String {
        self.key.as_ref().map_or_else(|| text.to_owned(), |key| key.out_of(text))
    }

    /// An error with the cloud's own words.
    pub fn refusal(&self, kind: BrokerErrorKind) -> BrokerError {
        self.error(kind, self.in_words())
    }

    /// What an answer means that makes no sense.
    pub fn unclear(&self) -> BrokerErrorKind {
        if self.effect == Effect::Once { BrokerErrorKind::Maybe } else { BrokerErrorKind::Unavailable }
    }

    /// The cloud's own words: what it calls title, detail, error or message, else the body; with
    /// the status.
    pub fn in_words(&self) -> String {
        let words = self.value().map(|value| redact::sentences(&value)).filter(|words| !words.is_empty());
        let words = words.unwrap_or_else(|| self.body.clone());
        let words = clean(self.without_key(&words).trim().as_bytes(), LONGEST_WORDS);
        let words = self.without_key(&words);
        if words.is_empty() { format!("HTTP {}", self.status) } else { format!("HTTP {}: {words}", self.status) }
    }
}

/// `Retry-After` in seconds or as a date, else the first window of a `RateLimit` header
/// (`"default";r=0;t=5`).
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

/// How many seconds a server's clock is ahead of ours, by the date of any answer of `url`; `None`
/// when it gives none.
///
/// # Errors
/// In words, when it does not answer.
pub async fn clock_skew(url: &str) -> Result<Option<i64>, String> {
    let limits = Limits::default();
    let client = reqwest::Client::builder().connect_timeout(limits.connect).timeout(limits.read).build();
    let client = client.map_err(|error| chain(&error))?;
    let begun = SystemTime::now();
    let response = client.head(url).send().await.map_err(|error| chain(&error))?;
    Ok(skew(response.headers(), begun))
}

/// How many seconds the date of an answer is ahead of our clock, to a request made at `begun`: any
/// time since then is none.
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
