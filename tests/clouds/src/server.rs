//! The server: one loopback port, one thread, one state.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::{HeaderValue, Response, StatusCode, Uri};
use futures::stream;
use outliers::cloud::broker::{ApiAccess, Broker};
use outliers::cloud::http::{Explain, Http, HttpLimits};
use outliers::secret::Secret;
use tokio::sync::oneshot;

use crate::{ApiResponse, CloudState, Dialect, Fault, How, Moment, Op, Refusal, Request};

/// The key that every fake cloud accepts.
pub const KEY: &str = "sk-fake-3f9c61d2b7a84e05";

/// Largest request body that is read.
const LARGEST_BODY: usize = 4 << 20;

/// A cloud on a loopback port. It ends when dropped.
pub struct FakeCloud {
    shared: Arc<Shared>,
    url: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    dialect: Box<dyn Dialect>,
    /// Path of the cloud's base URL, without a slash at its end.
    base: String,
    state: Mutex<CloudState>,
}

impl FakeCloud {
    /// A cloud that speaks `dialect`, with [`CloudState::default`].
    pub fn start(dialect: impl Dialect) -> Self {
        Self::boxed(Box::new(dialect))
    }

    /// The same for a dialect chosen at run time.
    pub fn boxed(dialect: Box<dyn Dialect>) -> Self {
        let base: Uri = dialect.cloud().base_url.parse().expect("a cloud's base URL is a URL");
        let base = base.path().trim_end_matches('/').to_owned();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a loopback port is free");
        listener.set_nonblocking(true).expect("a socket can be told not to block");
        let address = listener.local_addr().expect("a bound socket has an address");
        let url = format!("http://{address}{base}");
        let shared = Arc::new(Shared { dialect, base, state: Mutex::default() });
        let (stop, stopped) = oneshot::channel();
        let server = shared.clone();
        let thread = std::thread::spawn(move || run(listener, server, stopped));
        Self { shared, url, stop: Some(stop), thread: Some(thread) }
    }

    /// Base URL, in place of the real cloud's.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its dialect.
    pub fn dialect(&self) -> &dyn Dialect {
        &*self.shared.dialect
    }

    /// The cloud's state. Requests wait while it is locked, so do not hold it across an `await`.
    pub fn state(&self) -> MutexGuard<'_, CloudState> {
        self.shared.lock()
    }

    /// The real broker for this cloud, with the right key and short waits between attempts.
    pub fn broker(&self) -> Box<dyn Broker> {
        self.connect(KEY, limits(), None)
    }

    /// The same with a short timeout, for tests without an answer.
    pub fn impatient_broker(&self) -> Box<dyn Broker> {
        self.connect(KEY, HttpLimits { read: Duration::from_millis(300), ..limits() }, None)
    }

    /// The real broker with this key, these limits and this listener.
    pub fn connect(&self, key: &str, limits: HttpLimits, explain: Option<Explain>) -> Box<dyn Broker> {
        let kind = self.dialect().cloud();
        let http = Http::new(kind.name, &self.url, Some(Secret::new(key)), limits).expect("the fake's URL is one");
        let http = http.explained(explain);
        (kind.connect)(ApiAccess { http, image: kind.image.to_owned(), ssh_user: None, ssh_port: None })
    }
}

/// Limits for tests: waits take milliseconds.
pub fn limits() -> HttpLimits {
    HttpLimits {
        connect: Duration::from_secs(5),
        read: Duration::from_secs(10),
        total: Duration::from_secs(20),
        attempts: 3,
        backoff: Duration::from_millis(2),
        hurry: 1000,
    }
}

impl Drop for FakeCloud {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, CloudState> {
        // A test that panicked with the lock has already failed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, and how it is lost, if it is.
    fn answer(&self, mut request: Request) -> (ApiResponse, Option<Loss>) {
        request.op = self.dialect.operation(&request);
        let state = &mut *self.lock();
        state.requests.push(request.clone());
        state.now += state.pace;
        notify(state, state.requests.len(), Moment::Arrived);
        let Some(op) = request.op else {
            return (self.dialect.refuse(&Refusal::NotFound, Op::Get), None);
        };
        let answered = match state.take_fault(op) {
            Some(fault) => self.go_wrong(state, &request, op, &fault),
            None => (self.proper(state, &request, op), None),
        };
        notify(state, state.requests.len(), Moment::Applied);
        answered
    }

    fn proper(&self, state: &mut CloudState, request: &Request, op: Op) -> ApiResponse {
        let answered = if request.authorization.as_deref() != Some(&format!("Bearer {KEY}")) {
            Err(Refusal::Unauthorized)
        } else if op == Op::Create && !state.funds {
            Err(Refusal::Funds)
        } else {
            self.dialect.answer(state, request)
        };
        let mut answer = answered.unwrap_or_else(|refusal| self.dialect.refuse(&refusal, op));
        if matches!(op, Op::List | Op::Get) {
            state.show(&mut answer.body);
        }
        answer
    }

    fn go_wrong(
        &self,
        state: &mut CloudState,
        request: &Request,
        op: Op,
        fault: &Fault,
    ) -> (ApiResponse, Option<Loss>) {
        let done = fault.applied.then(|| self.proper(state, request, op));
        let success = |body: &str| (ApiResponse::text(200, body), None);
        match &fault.how {
            How::Refuse(refusal) => (self.dialect.refuse(refusal, op), None),
            How::Say(answer) => (answer.clone(), None),
            How::Hang => (ApiResponse::empty(200), Some(Loss::Whole)),
            How::CutBody => {
                let whole = done.unwrap_or_else(|| ApiResponse::text(200, "{\"success\": true, \"data\": []}"));
                (whole, Some(Loss::Half))
            }
            How::NotJson => success("{\"data\": [{\"id\": \"1"),
            How::OtherJson => success("{\"data\": 17, \"offers\": 17, \"instances\": 17, \"pods\": 17, \"items\": 17}"),
            How::Html => success("<!DOCTYPE html><html><body><h1>We will be right back</h1></body></html>"),
            How::Empty => success(""),
            How::EchoKey => {
                let said = request.authorization.clone().unwrap_or_default();
                (ApiResponse::text(400, &format!("cannot parse the request: Authorization: {said}")), None)
            }
        }
    }
}

fn notify(state: &CloudState, number: usize, moment: Moment) {
    if let Some(watch) = &state.watch {
        watch(number, moment);
    }
}

/// How an answer is lost.
enum Loss {
    Whole,
    Half,
}

fn run(listener: std::net::TcpListener, shared: Arc<Shared>, stopped: oneshot::Receiver<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).expect("the socket does not block");
        let server = axum::serve(listener, Router::new().fallback(serve).with_state(shared));
        tokio::select! {
            _ = server => {}
            _ = stopped => {}
        }
    });
}

async fn serve(State(shared): State<Arc<Shared>>, request: axum::extract::Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, LARGEST_BODY).await else {
        return respond(ApiResponse::empty(413), None);
    };
    let Some(path) = head.uri.path().strip_prefix(&shared.base) else {
        return respond(ApiResponse::text(404, "404 page not found"), None);
    };
    let request = Request {
        method: head.method,
        path: path.to_owned(),
        query: query(&head.uri),
        authorization: head.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()).map(str::to_owned),
        body: String::from_utf8_lossy(&body).into_owned(),
        op: None,
    };
    let (answer, loss) = shared.answer(request);
    let (number, ahead) = {
        let state = shared.lock();
        (state.requests.len(), state.clock_ahead)
    };
    let answer = answer.header("date", date(ahead));
    tokio::spawn(async move {
        // The answer is sent first.
        tokio::time::sleep(Duration::from_millis(2)).await;
        notify(&shared.lock(), number, Moment::Answered);
    });
    if matches!(loss, Some(Loss::Whole)) {
        return futures::future::pending().await;
    }
    respond(answer, loss)
}

/// The `Date` header of an answer, by a clock that is `ahead` seconds ahead.
fn date(ahead: i64) -> String {
    let (now, by) = (SystemTime::now(), Duration::from_secs(ahead.unsigned_abs()));
    httpdate::fmt_http_date(if ahead < 0 { now - by } else { now + by })
}

fn query(uri: &Uri) -> Vec<(String, String)> {
    let query = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(uri);
    query.map(|query| query.0).unwrap_or_default()
}

fn respond(answer: ApiResponse, loss: Option<Loss>) -> Response<Body> {
    let bytes = Bytes::from(answer.body);
    let length = bytes.len();
    let body = match loss {
        None => Body::from(bytes),
        Some(_) => Body::from_stream(stream::iter([Ok(bytes.slice(..length / 2)), Err("the cable is cut")])),
    };
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(answer.status).expect("a dialect knows statuses");
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    for (name, value) in answer.headers {
        response.headers_mut().insert(name, value.parse().expect("a header is text"));
    }
    response
}
