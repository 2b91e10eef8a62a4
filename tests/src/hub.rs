//! A Hugging Face hub on the loopback interface: folders served as repositories, faults on request.
//!
//! It answers as the real one does where clients depend on it: the model API with `blobs=true`,
//! `resolve` with ranges, commit and entity-tag headers, large files behind a redirect to signed
//! addresses of another origin that expire, `X-Error-Code` on refusals.

mod repo;
mod wire;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT_RANGES, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LOCATION, RANGE,
};
use axum::http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use serde_json::Value;
use tokio::sync::oneshot;

pub use repo::Repo;
use wire::Line;
pub use wire::Wire;

/// A fault of a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// An error status, with headers and a body that looks like a page.
    Status(u16, Vec<(&'static str, String)>),
    /// The body ends after this many bytes, although more were announced.
    Truncate(usize),
    /// The body stalls after this many bytes.
    Stall(usize),
    /// The right number of bytes, with wrong content.
    Corrupt,
    /// One bit of the byte at this offset is flipped.
    FlipBit(usize),
    /// The whole file, for any range.
    IgnoreRange,
    /// A valid answer with only this many bytes of the range.
    Short(usize),
    /// This many bytes per second, without a stall.
    Slow(u64),
    /// The right number of bytes from another range, which the headers state.
    OtherPlace,
    /// An error page with status 200.
    Page,
    /// The entity tag of another version of the file.
    OtherVersion,
    /// A listing without sizes and hashes, as from some mirrors.
    BareListing,
}

/// A request as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedRequest {
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// Whether the file server received it, not the hub.
    pub cdn: bool,
}

#[derive(Default)]
struct Shared {
    repos: BTreeMap<String, Repo>,
    faults: Vec<(String, usize, Fault)>,
    seen: Vec<ReceivedRequest>,
    /// Generation of signatures; earlier ones are expired.
    generation: usize,
    /// Number of requests that a signature serves.
    uses: Option<usize>,
    used: usize,
}

#[derive(Clone)]
struct Server {
    shared: Arc<Mutex<Shared>>,
    line: Arc<Line>,
    cdn_url: String,
    cdn: bool,
}

/// A running hub; it ends when dropped.
pub struct MockHub {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    line: Arc<Line>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MockHub {
    /// Starts hub and file server on free ports, in a thread of their own.
    ///
    /// # Errors
    /// No port can be opened.
    pub fn start(repos: impl IntoIterator<Item = Repo>) -> Result<Self> {
        Self::behind(Wire::default(), repos)
    }

    /// The same behind a link.
    ///
    /// # Errors
    /// No port can be opened.
    pub fn behind(wire: Wire, repos: impl IntoIterator<Item = Repo>) -> Result<Self> {
        let repos = repos.into_iter().map(|repo| (repo.address(), repo)).collect();
        let shared = Arc::new(Mutex::new(Shared { repos, ..Shared::default() }));
        let listen = || -> Result<std::net::TcpListener> {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").context("open a port")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let (hub, cdn) = (listen()?, listen()?);
        let address = hub.local_addr()?;
        let cdn_url = format!("http://{}", cdn.local_addr()?);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let line = Line::new(wire);
        let server =
            |cdn| Server { shared: Arc::clone(&shared), line: Arc::clone(&line), cdn_url: cdn_url.clone(), cdn };
        let (hub_server, cdn_server) = (server(false), server(true));
        let thread = std::thread::spawn(move || {
            runtime.spawn(serve(hub, hub_server));
            runtime.spawn(serve(cdn, cdn_server));
            let _ = runtime.block_on(stopped);
            // Not a graceful shutdown, which would wait for a stalled answer.
            runtime.shutdown_background();
        });
        Ok(Self { address, shared, line, stop: Some(stop), thread: Some(thread) })
    }

    /// Its endpoint.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Injects a fault into the next `times` requests whose path contains `path`. Later faults
    /// wait for earlier ones.
    pub fn fail(&self, path: &str, times: usize, fault: Fault) {
        self.lock().faults.push((path.to_owned(), times, fault));
    }

    /// Lets every signed address expire after this many requests.
    pub fn expire_after(&self, uses: usize) {
        self.lock().uses = Some(uses);
    }

    /// Bytes of weight files (or of answers in their place) sent so far.
    pub fn carried(&self) -> u64 {
        self.line.carried()
    }

    /// All requests so far, in order.
    pub fn requests(&self) -> Vec<ReceivedRequest> {
        self.lock().seen.clone()
    }

    /// Requests so far whose path contains `path`.
    pub fn count(&self, path: &str) -> usize {
        self.lock().seen.iter().filter(|seen| seen.path.contains(path)).count()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MockHub {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: std::net::TcpListener, server: Server) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    let _ = axum::serve(listener, Router::new().fallback(answer).with_state(server)).await;
}

async fn answer(State(server): State<Server>, request: Request) -> Response<Body> {
    let (path, head) = (request.uri().path().to_owned(), request.method() == Method::HEAD);
    let (seen, fault) = server.note(request);
    tokio::time::sleep(server.line.latency()).await;
    if let Some(Fault::Status(status, headers)) = fault {
        return refusal(status, &headers);
    }
    let reply = if server.cdn { server.file(&path, &seen, true, fault) } else { server.hub(&path, &seen, fault) };
    let mut reply = reply.unwrap_or_else(|(status, code)| refusal(status, &[("x-error-code", code.to_owned())]));
    if head {
        *reply.body_mut() = Body::empty();
    }
    reply
}

fn take_fault(faults: &mut Vec<(String, usize, Fault)>, path: &str) -> Option<Fault> {
    let at = faults.iter().position(|(part, _, _)| path.contains(part.as_str()))?;
    faults[at].1 -= 1;
    let fault = faults[at].2.clone();
    if faults[at].1 == 0 {
        faults.remove(at);
    }
    Some(fault)
}

fn refusal(status: u16, headers: &[(&'static str, String)]) -> Response<Body> {
    let mut reply = Response::new(Body::from(PAGE));
    *reply.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
            reply.headers_mut().insert(*name, value);
        }
    }
    reply
}

/// Answers other than the requested one.
const PAGE: &[u8] = b"<html><body>error page</body></html>";

/// Status and `X-Error-Code`.
type Refused = (u16, &'static str);

impl Server {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a request and returns its fault, if any.
    fn note(&self, request: Request) -> (ReceivedRequest, Option<Fault>) {
        let text = |name: HeaderName| {
            let value = request.headers().get(name)?;
            value.to_str().ok().map(str::to_owned)
        };
        let seen = ReceivedRequest {
            method: request.method().to_string(),
            path: request.uri().to_string(),
            range: text(RANGE),
            authorization: text(AUTHORIZATION),
            cdn: self.cdn,
        };
        let mut shared = self.lock();
        shared.seen.push(seen.clone());
        let fault = take_fault(&mut shared.faults, &seen.path);
        (seen, fault)
    }

    fn repo(&self, prefix: &str, owner: &str, name: &str) -> Result<Repo, Refused> {
        // The hub does not distinguish missing from private repositories without a token.
        self.lock().repos.get(&format!("{prefix}{owner}/{name}")).cloned().ok_or((401, "RepoNotFound"))
    }

    fn hub(&self, path: &str, seen: &ReceivedRequest, fault: Option<Fault>) -> Result<Response<Body>, Refused> {
        let (prefix, rest) = kind(path);
        let parts: Vec<&str> = rest.splitn(5, '/').collect();
        match parts[..] {
            ["api", interface @ ("models" | "datasets"), owner, name, rest] => {
                let prefix = if interface == "datasets" { "datasets/" } else { "" };
                let repo = self.repo(prefix, owner, name)?;
                let revision = rest.strip_prefix("revision/").ok_or((404, ""))?;
                check_revision(&repo, revision)?;
                let bare = matches!(fault, Some(Fault::BareListing)) || !seen.path.contains("blobs=true");
                Ok(json_reply(&repo.listing(bare)))
            }
            [owner, name, "resolve", revision, file] => {
                let repo = self.repo(prefix, owner, name)?;
                check_revision(&repo, revision)?;
                let expected = repo.token.as_ref().map(|token| format!("Bearer {token}"));
                if expected.is_some() && expected != seen.authorization {
                    return Err(if seen.authorization.is_some() { (403, "GatedRepo") } else { (401, "GatedRepo") });
                }
                if !Repo::is_large(file) {
                    return self.file(path, seen, false, fault);
                }
                self.redirect(&repo, file)
            }
            _ => Err((404, "")),
        }
    }

    fn redirect(&self, repo: &Repo, file: &str) -> Result<Response<Body>, Refused> {
        let stored = repo.read(file).ok_or((404, "EntryNotFound"))?;
        let generation = self.lock().generation;
        let to = format!("{}/{}/resolve/main/{file}?signature=SIGNED-{generation}", self.cdn_url, repo.address());
        let headers = [
            (LOCATION, to),
            (HeaderName::from_static("x-linked-etag"), format!("\"{}\"", stored.sha256)),
            (HeaderName::from_static("x-linked-size"), stored.bytes.len().to_string()),
            (HeaderName::from_static("x-repo-commit"), repo.commit()),
        ];
        Ok(reply(StatusCode::FOUND, headers, Body::empty()))
    }

    /// Whether a signed address is still valid; counts its uses.
    fn check_signature(&self, path: &str) -> Result<(), Refused> {
        let mut shared = self.lock();
        if !path.ends_with(&format!("signature=SIGNED-{}", shared.generation)) {
            return Err((403, ""));
        }
        shared.used += 1;
        if shared.uses.is_some_and(|uses| shared.used >= uses) {
            (shared.used, shared.generation) = (0, shared.generation + 1);
        }
        Ok(())
    }

    fn file(
        &self,
        path: &str,
        seen: &ReceivedRequest,
        large: bool,
        fault: Option<Fault>,
    ) -> Result<Response<Body>, Refused> {
        let (prefix, rest) = kind(path);
        let parts: Vec<&str> = rest.splitn(5, '/').collect();
        let [owner, name, _, _, file] = parts[..] else { return Err((404, "")) };
        if large {
            self.check_signature(&seen.path)?;
        }
        let repo = self.repo(prefix, owner, name)?;
        let stored = repo.read(file).ok_or((404, "EntryNotFound"))?;
        let whole = match fault {
            Some(Fault::Corrupt) => stored.bytes.iter().map(|byte| byte ^ 0x55).collect(),
            Some(Fault::FlipBit(at)) => {
                let mut bytes = stored.bytes.to_vec();
                bytes[at] ^= 1;
                bytes.into()
            }
            Some(Fault::Page) => Bytes::from_static(PAGE),
            _ => stored.bytes.clone(),
        };
        let total = whole.len();
        let ignored = matches!(fault, Some(Fault::IgnoreRange | Fault::Page));
        let ranged = seen.range.as_deref().filter(|_| !ignored);
        let range = ranged.map(|range| parse_range(range, total).ok_or((416, ""))).transpose()?;
        let piece = match (&fault, range.clone().unwrap_or(0..total)) {
            (Some(Fault::Short(len)), piece) => piece.start..piece.end.min(piece.start + len),
            (Some(Fault::OtherPlace), piece) if piece.start > 0 => 0..piece.len(),
            (Some(Fault::OtherPlace), piece) => 1..piece.end,
            (_, piece) => piece,
        };
        let tag = match fault {
            Some(Fault::OtherVersion) => "another".to_owned(),
            _ => Repo::tag(file, &stored),
        };
        let mut headers = vec![
            (ETAG, format!("\"{tag}\"")),
            (ACCEPT_RANGES, "bytes".to_owned()),
            (HeaderName::from_static("x-repo-commit"), repo.commit()),
            (CONTENT_LENGTH, piece.len().to_string()),
        ];
        if range.is_some() {
            headers.push((CONTENT_RANGE, format!("bytes {}-{}/{total}", piece.start, piece.end - 1)));
        }
        let status = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        let bytes = whole.slice(piece);
        // Small files are served by the hub and are not counted.
        let line = if large { &self.line } else { &Line::new(Wire::default()) };
        let body = wire::body(line, bytes, fault.as_ref());
        Ok(reply(status, headers, body))
    }
}

/// The prefix of its kind of repository, and the rest of a path.
fn kind(path: &str) -> (&'static str, &str) {
    let path = path.trim_start_matches('/');
    path.strip_prefix("datasets/").map_or(("", path), |rest| ("datasets/", rest))
}

fn check_revision(repo: &Repo, revision: &str) -> Result<(), Refused> {
    let known = revision == "main" || revision == repo.commit();
    if known { Ok(()) } else { Err((404, "RevisionNotFound")) }
}

/// `bytes=a-b` and `bytes=a-`.
fn parse_range(text: &str, total: usize) -> Option<Range<usize>> {
    let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = if end.is_empty() { total } else { (end.parse::<usize>().ok()? + 1).min(total) };
    (start < end).then_some(start..end)
}

fn json_reply(value: &Value) -> Response<Body> {
    reply(StatusCode::OK, [(CONTENT_TYPE, "application/json".to_owned())], Body::from(value.to_string()))
}

fn reply(status: StatusCode, headers: impl IntoIterator<Item = (HeaderName, String)>, body: Body) -> Response<Body> {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    let headers = headers.into_iter().filter_map(|(name, value)| Some((name, HeaderValue::from_str(&value).ok()?)));
    reply.headers_mut().extend(headers);
    reply
}
