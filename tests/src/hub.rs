//! A Hugging Face hub on the loopback interface: folders served as repositories, faults on request.
//!
//! It answers as the real one does where clients depend on it: the model API with `blobs=true`, `resolve` with ranges,
//! commit and entity-tag headers, large files behind a redirect to another origin, `X-Error-Code` on refusals.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{
    ACCEPT_RANGES, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LOCATION, RANGE,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use futures::StreamExt;
use futures::stream;
use serde_json::{Value, json};
use sha1::Digest as _;
use tokio::sync::oneshot;

/// A repository to serve.
#[derive(Clone, Debug)]
pub struct Repo {
    id: String,
    folder: PathBuf,
    token: Option<String>,
}

impl Repo {
    /// Serves the files of `folder` as `id` (`owner/name`), on the branch `main`.
    pub fn new(id: &str, folder: &Path) -> Self {
        Self { id: id.to_owned(), folder: folder.to_owned(), token: None }
    }

    /// Gated: files only with this token.
    #[must_use]
    pub fn gated(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// The commit that `main` is.
    pub fn commit(&self) -> String {
        hex(&sha1::Sha1::digest(self.id.as_bytes()))
    }

    fn read(&self, file: &str) -> Option<Vec<u8>> {
        fs::read(self.folder.join(file)).ok()
    }

    /// As on the real hub: weights are stored apart from git, the rest is in it.
    fn is_large(file: &str) -> bool {
        file.ends_with(".safetensors") || file.ends_with(".bin")
    }
}

/// What goes wrong with a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// An error status, with headers and a body that looks like a page.
    Status(u16, Vec<(&'static str, String)>),
    /// The body ends after so many bytes although more were announced.
    Truncate(usize),
    /// The body falls silent after so many bytes.
    Stall(usize),
    /// The right number of wrong bytes.
    Corrupt,
    /// The whole file, whatever range was asked for.
    IgnoreRange,
    /// A listing without sizes and hashes, as some mirrors give.
    BareListing,
}

/// A request as it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The `Range` header.
    pub range: Option<String>,
    /// The `Authorization` header.
    pub authorization: Option<String>,
    /// It came to the file server, not to the hub itself.
    pub cdn: bool,
}

#[derive(Default)]
struct Shared {
    repos: BTreeMap<String, Repo>,
    faults: Vec<(String, usize, Fault)>,
    seen: Vec<Seen>,
}

#[derive(Clone)]
struct Server {
    shared: Arc<Mutex<Shared>>,
    cdn_url: String,
    cdn: bool,
}

/// A running hub; it ends when dropped.
pub struct MockHub {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MockHub {
    /// Starts hub and file server on free ports, in a thread of their own.
    ///
    /// # Errors
    /// When no port can be opened.
    pub fn start(repos: impl IntoIterator<Item = Repo>) -> Result<Self> {
        let repos = repos.into_iter().map(|repo| (repo.id.clone(), repo)).collect();
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
        let server = |cdn| Server { shared: Arc::clone(&shared), cdn_url: cdn_url.clone(), cdn };
        let (hub_server, cdn_server) = (server(false), server(true));
        let thread = std::thread::spawn(move || {
            runtime.spawn(serve(hub, hub_server));
            runtime.spawn(serve(cdn, cdn_server));
            let _ = runtime.block_on(stopped);
            // Not a graceful end: a stalled answer would keep it waiting.
            runtime.shutdown_background();
        });
        Ok(Self { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// The endpoint.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Lets the next `times` requests whose path contains `path` go wrong. Later faults wait for earlier ones.
    pub fn fail(&self, path: &str, times: usize, fault: Fault) {
        self.lock().faults.push((path.to_owned(), times, fault));
    }

    /// All requests so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
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
    let text = |name: HeaderName| {
        let value = request.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().to_string(),
        range: text(RANGE),
        authorization: text(AUTHORIZATION),
        cdn: server.cdn,
    };
    let fault = {
        let mut shared = server.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.seen.push(seen.clone());
        take_fault(&mut shared.faults, &seen.path)
    };
    if let Some(Fault::Status(status, headers)) = fault {
        return refusal(status, &headers);
    }
    let path = request.uri().path().to_owned();
    let reply = if server.cdn { server.file(&path, &seen, true, fault) } else { server.hub(&path, &seen, fault) };
    let mut reply = reply.unwrap_or_else(|(status, code)| refusal(status, &[("x-error-code", code.to_owned())]));
    if request.method() == Method::HEAD {
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
    let mut reply = Response::new(Body::from("<html><body>error page</body></html>"));
    *reply.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
            reply.headers_mut().insert(*name, value);
        }
    }
    reply
}

/// Status and `X-Error-Code`.
type Refused = (u16, &'static str);

impl Server {
    fn repo(&self, owner: &str, name: &str) -> Result<Repo, Refused> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        // The hub does not tell strangers what does not exist from what is private.
        shared.repos.get(&format!("{owner}/{name}")).cloned().ok_or((401, "RepoNotFound"))
    }

    fn hub(&self, path: &str, seen: &Seen, fault: Option<Fault>) -> Result<Response<Body>, Refused> {
        let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
        match parts[..] {
            ["api", "models", owner, name, rest] => {
                let repo = self.repo(owner, name)?;
                let revision = rest.strip_prefix("revision/").ok_or((404, ""))?;
                check_revision(&repo, revision)?;
                let bare = matches!(fault, Some(Fault::BareListing)) || !seen.path.contains("blobs=true");
                Ok(json_reply(&listing(&repo, bare)))
            }
            [owner, name, "resolve", revision, file] => {
                let repo = self.repo(owner, name)?;
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
        let bytes = repo.read(file).ok_or((404, "EntryNotFound"))?;
        let to = format!("{}/{}/resolve/main/{file}?signature=SIGNED", self.cdn_url, repo.id);
        let tag = sha256(&bytes);
        let headers = [
            (LOCATION, to),
            (HeaderName::from_static("x-linked-etag"), format!("\"{tag}\"")),
            (HeaderName::from_static("x-linked-size"), bytes.len().to_string()),
            (HeaderName::from_static("x-repo-commit"), repo.commit()),
        ];
        Ok(reply(StatusCode::FOUND, headers, Body::empty()))
    }

    fn file(&self, path: &str, seen: &Seen, large: bool, fault: Option<Fault>) -> Result<Response<Body>, Refused> {
        let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
        let [owner, name, _, _, file] = parts[..] else { return Err((404, "")) };
        if large && !seen.path.ends_with("signature=SIGNED") {
            return Err((403, ""));
        }
        let repo = self.repo(owner, name)?;
        let mut bytes = repo.read(file).ok_or((404, "EntryNotFound"))?;
        let tag = if large { sha256(&bytes) } else { git_sha1(&bytes) };
        if matches!(fault, Some(Fault::Corrupt)) {
            bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
        }
        let ranged = if matches!(fault, Some(Fault::IgnoreRange)) { None } else { seen.range.as_deref() };
        let total = bytes.len();
        let range = ranged.map(|range| parse_range(range, total).ok_or((416, ""))).transpose()?;
        let piece = range.clone().unwrap_or(0..total);
        let body = bytes[piece.clone()].to_vec();
        let mut headers = HeaderMap::new();
        let mut set = |name: HeaderName, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        };
        set(ETAG, format!("\"{tag}\""));
        set(ACCEPT_RANGES, "bytes".to_owned());
        set(HeaderName::from_static("x-repo-commit"), repo.commit());
        set(CONTENT_LENGTH, body.len().to_string());
        if range.is_some() {
            set(CONTENT_RANGE, format!("bytes {}-{}/{total}", piece.start, piece.end - 1));
        }
        let mut reply = Response::new(faulty_body(body, fault));
        *reply.status_mut() = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
        *reply.headers_mut() = headers;
        Ok(reply)
    }
}

fn check_revision(repo: &Repo, revision: &str) -> Result<(), Refused> {
    let known = revision == "main" || revision == repo.commit();
    if known { Ok(()) } else { Err((404, "RevisionNotFound")) }
}

fn faulty_body(bytes: Vec<u8>, fault: Option<Fault>) -> Body {
    let part = |length: usize| Bytes::copy_from_slice(&bytes[..length.min(bytes.len())]);
    match fault {
        Some(Fault::Truncate(after)) => {
            let broken = stream::once(async {
                // A moment for the bytes before it to leave.
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(stream::iter([Ok(part(after))]).chain(broken))
        }
        Some(Fault::Stall(after)) => {
            let silence = stream::pending::<Result<Bytes, std::io::Error>>();
            Body::from_stream(stream::iter([Ok(part(after))]).chain(silence))
        }
        _ => Body::from(bytes),
    }
}

/// `bytes=a-b` and `bytes=a-`.
fn parse_range(text: &str, total: usize) -> Option<Range<usize>> {
    let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = if end.is_empty() { total } else { (end.parse::<usize>().ok()? + 1).min(total) };
    (start < end).then_some(start..end)
}

fn listing(repo: &Repo, bare: bool) -> Value {
    let mut names: Vec<String> = fs::read_dir(&repo.folder)
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort();
    let file = |name: String| {
        if bare {
            return json!({"rfilename": name});
        }
        let bytes = repo.read(&name).unwrap_or_default();
        let mut entry = json!({"rfilename": name, "size": bytes.len(), "blobId": git_sha1(&bytes)});
        if Repo::is_large(&name) {
            // The blob is only the pointer file: its hash is not the content's.
            entry["blobId"] = json!(git_sha1(b"pointer"));
            entry["lfs"] = json!({"sha256": sha256(&bytes), "size": bytes.len(), "pointerSize": 135});
        }
        entry
    };
    json!({"id": repo.id, "modelId": repo.id, "sha": repo.commit(), "private": false,
           "siblings": names.into_iter().map(file).collect::<Vec<_>>()})
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

fn sha256(bytes: &[u8]) -> String {
    hex(&sha2::Digest::finalize(sha2::Digest::chain_update(sha2::Sha256::default(), bytes)))
}

fn git_sha1(bytes: &[u8]) -> String {
    let hasher = sha1::Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes);
    hex(&hasher.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
