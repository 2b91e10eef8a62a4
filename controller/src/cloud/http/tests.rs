//! Tests the client against a scripted server.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;

use super::*;

const KEY: &str = "sk-test-4b1d";

/// Reaction of the server to a request.
#[derive(Clone, Debug)]
enum Act {
    /// Sends this and keeps the connection.
    Say(String),
    /// Sends this and closes.
    SayAndClose(String),
    /// Closes without an answer.
    Close,
    /// Sends nothing until the client closes.
    Hang,
}

/// A server on a loopback port with a script: one act per request, the last one repeated.
struct Server {
    url: String,
    hangs: bool,
    seen: Arc<Mutex<Vec<String>>>,
    connections: Arc<Mutex<usize>>,
}

impl Server {
    fn start(script: &[Act]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/api", listener.local_addr().unwrap());
        let (seen, connections) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<Mutex<usize>>::default());
        let acts = script.to_vec();
        let (requests, opened) = (seen.clone(), connections.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                *opened.lock().unwrap() += 1;
                let (acts, requests) = (acts.clone(), requests.clone());
                std::thread::spawn(move || converse(stream.unwrap(), &acts, &requests));
            }
        });
        Self { url, hangs: matches!(script[0], Act::Hang), seen, connections }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }

    fn client(&self) -> Http {
        // Only tests of timeouts use short ones, since the machine may be busy.
        let read = if self.hangs { Duration::from_millis(300) } else { limits().read };
        self.client_with(HttpLimits { read, ..limits() })
    }

    fn client_with(&self, limits: HttpLimits) -> Http {
        Http::new("cloud", &self.url, Some(Secret::new(KEY)), limits).unwrap()
    }
}

fn converse(mut stream: TcpStream, script: &[Act], seen: &Mutex<Vec<String>>) {
    while let Some(request) = read_request(&mut stream) {
        let act = {
            let mut seen = seen.lock().unwrap();
            seen.push(request);
            script[(seen.len() - 1).min(script.len() - 1)].clone()
        };
        match act {
            Act::Say(text) => stream.write_all(text.as_bytes()).unwrap(),
            Act::SayAndClose(text) => {
                let _ = stream.write_all(text.as_bytes());
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
            Act::Close => return,
            Act::Hang => {
                let _ = stream.read(&mut [0]);
                return;
            }
        }
    }
}

/// Reads one request, head and body; `None` if the client has closed.
fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(head + &String::from_utf8(body).unwrap())
}

fn say(status: &str, headers: &str, body: &str) -> Act {
    Act::Say(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len()))
}

fn ok() -> Act {
    say("200 OK", "", "{\"data\": 1}")
}

fn cut() -> Act {
    Act::SayAndClose("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"data\": ".to_owned())
}

fn limits() -> HttpLimits {
    HttpLimits {
        read: Duration::from_secs(5),
        total: Duration::from_secs(10),
        attempts: 3,
        hurry: 500,
        ..HttpLimits::default()
    }
}

fn once() -> Call {
    Call::new(Method::POST, "/things", Idempotency::Once).body(json!({"a": 1}))
}

fn idempotent() -> Call {
    Call::new(Method::DELETE, "/things/1", Idempotency::Idempotent)
}

async fn kind(server: &Server, call: Call) -> BrokerErrorKind {
    server.client().call(call).await.expect_err("the server fails").kind
}

#[tokio::test]
async fn requests_have_path_query_authorization_and_json_body() {
    let server = Server::start(&[ok()]);
    let reply = server.client().call(once().query("q", "a b&c")).await.unwrap();
    assert!(reply.is_success());
    assert_eq!(reply.json::<Value>("a thing").unwrap(), json!({"data": 1}));
    let seen = server.seen().remove(0);
    assert!(seen.starts_with("post /api/things?q=a+b%26c http/1.1\r\n"), "{seen}");
    assert!(seen.contains(&format!("authorization: bearer {KEY}\r\n")), "{seen}");
    assert!(seen.contains("content-type: application/json\r\n") && seen.ends_with("{\"a\":1}"), "{seen}");
}

#[tokio::test]
async fn ambiguous_non_idempotent_call_is_not_retried() {
    let broken = ["500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"];
    let mut acts: Vec<Act> = broken.iter().map(|status| say(status, "", "")).collect();
    acts.extend([say("503 Service Unavailable", "retry-after: 0\r\n", ""), say("408 Request Timeout", "", "")]);
    acts.extend([Act::Close, Act::Hang, cut()]);
    for act in acts {
        let server = Server::start(std::slice::from_ref(&act));
        assert_eq!(kind(&server, once()).await, BrokerErrorKind::Maybe, "{act:?}");
        assert_eq!(server.seen().len(), 1, "{act:?}");
    }
}

#[tokio::test]
async fn idempotent_calls_are_retried() {
    for act in
        [say("500 Internal Server Error", "", ""), say("408 Request Timeout", "", ""), Act::Close, cut(), Act::Hang]
    {
        for call in [Call::get("/things"), idempotent()] {
            let server = Server::start(&[act.clone(), act.clone(), ok()]);
            assert!(server.client().call(call.clone()).await.unwrap().is_success(), "{act:?}");
            assert_eq!(server.seen().len(), 3, "{act:?}");

            let server = Server::start(std::slice::from_ref(&act));
            assert_eq!(kind(&server, call).await, BrokerErrorKind::Unavailable, "{act:?}");
            assert_eq!(server.seen().len(), 3, "no more often than the limit says: {act:?}");
        }
    }
}

#[tokio::test]
async fn rate_limited_call_is_known_not_executed() {
    let too_often = say("429 Too Many Requests", "", "Too Many Requests");
    let server = Server::start(&[too_often.clone(), ok()]);
    assert!(server.client().call(once()).await.unwrap().is_success());
    assert_eq!(server.seen().len(), 2);

    let server = Server::start(std::slice::from_ref(&too_often));
    assert_eq!(kind(&server, once()).await, BrokerErrorKind::RateLimited);
    assert_eq!(server.seen().len(), 3);

    let server = Server::start(&[too_often, say("500 Internal Server Error", "", "")]);
    assert_eq!(kind(&server, once()).await, BrokerErrorKind::Maybe, "the last one counts");
    assert_eq!(server.seen().len(), 2);
}

#[tokio::test]
async fn refused_connection_means_nothing_happened() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let base = format!("http://127.0.0.1:{port}");
    let http = Http::new("cloud", &base, Some(Secret::new(KEY)), limits()).unwrap();
    let heard = Arc::new(Mutex::new(0));
    let counter = heard.clone();
    let explain: Explain =
        Arc::new(move |words: &str| *counter.lock().unwrap() += usize::from(words.starts_with("> ")));
    let error = http.explained(Some(explain)).call(once()).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Unavailable);
    assert!(error.message.contains("cannot be reached"), "{error}");
    assert_eq!(*heard.lock().unwrap(), 3, "so it is tried again");
}

#[tokio::test]
async fn http_errors_are_mapped_to_kinds() {
    for status in ["400 Bad Request", "401 Unauthorized", "404 Not Found", "422 Unprocessable Content"] {
        let server = Server::start(&[say(status, "", "{\"error\": {\"message\": \"no \\u001b[31mway\"}}")]);
        let reply = server.client().call(once()).await.unwrap();
        assert!(!reply.is_success());
        let error = reply.refusal(BrokerErrorKind::Rejected);
        assert_eq!(error.to_string(), format!("cloud: HTTP {}: no way", &status[..3]));
        assert_eq!(server.seen().len(), 1);
    }
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let elsewhere = Server::start(&[ok()]);
    let location = format!("location: {}/elsewhere\r\n", elsewhere.url);
    let server = Server::start(&[say("307 Temporary Redirect", &location, "")]);
    let reply = server.client().call(once()).await.unwrap();
    assert_eq!(reply.status, 307);
    assert_eq!(elsewhere.seen(), Vec::<String>::new());
}

#[tokio::test]
async fn retry_after_is_respected() {
    // A date has whole seconds: two from now may be slightly more than one.
    let date = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(2));
    let headers: [&dyn Fn() -> String; 3] =
        [&|| "retry-after: 1\r\n".to_owned(), &|| format!("retry-after: {}\r\n", date()), &|| {
            "ratelimit: \"default\";r=0;t=1\r\n".to_owned()
        }];
    for header in headers {
        let begun = Instant::now();
        let server = Server::start(&[say("429 Too Many Requests", &header(), ""), ok()]);
        assert!(server.client().call(once()).await.unwrap().is_success());
        assert!(begun.elapsed() >= Duration::from_millis(900), "{}: {:?}", header(), begun.elapsed());
    }
}

#[tokio::test]
async fn excessive_retry_after_is_an_error() {
    for header in ["retry-after: 3600\r\n", "retry-after: 18446744073709551615\r\n"] {
        let server = Server::start(&[say("429 Too Many Requests", header, "slow down")]);
        let begun = Instant::now();
        let error = server.client().call(once()).await.unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert_eq!(error.kind, BrokerErrorKind::RateLimited);
        assert!(error.message.contains("slow down") && error.message.contains("asks to wait"), "{error}");
        assert_eq!(server.seen().len(), 1);
    }
}

#[test]
fn retry_after_headers_are_parsed() {
    let headers =
        |name: &'static str, value: &str| HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
    for (name, value, seconds) in [
        ("retry-after", "7", Some(7)),
        ("retry-after", " 0 ", Some(0)),
        ("retry-after", "Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
        ("retry-after", "soon", None),
        ("retry-after", "-1", None),
        ("ratelimit", "\"default\";r=0;t=5", Some(5)),
        ("ratelimit", "limit=100", None),
        ("x-other", "5", None),
    ] {
        assert_eq!(retry_after(&headers(name, value)), seconds.map(Duration::from_secs), "{name}: {value}");
    }
}

#[tokio::test]
async fn calls_keep_the_rate_limit() {
    let server = Server::start(&[ok()]);
    let http = server.client().paced(None, Duration::from_secs(50)).clone();
    let begun = Instant::now();
    let calls = (0..4).map(|_| http.call(Call::get("/things")));
    assert!(futures::future::join_all(calls).await.iter().all(Result::is_ok));
    assert!(begun.elapsed() >= Duration::from_millis(300), "three times 50 s, hurried: {:?}", begun.elapsed());
}

#[tokio::test]
async fn rate_limit_wait_does_not_count_towards_the_timeout() {
    let server = Server::start(&[ok()]);
    let limits = HttpLimits { total: Duration::from_millis(300), ..limits() };
    let http = server.client_with(limits).paced(Some("launch"), Duration::from_secs(100));
    let calls = (0..4).map(|_| http.call(once().at_pace("launch")));
    let replies = futures::future::join_all(calls).await;
    assert!(replies.iter().all(Result::is_ok), "the last waits 600 ms: {replies:?}");
    assert_eq!(server.seen().len(), 4);
}

#[tokio::test]
async fn non_idempotent_calls_use_a_fresh_connection() {
    let server = Server::start(&[ok()]);
    let http = server.client();
    for _ in 0..3 {
        http.call(Call::get("/things")).await.unwrap();
    }
    assert_eq!(*server.connections.lock().unwrap(), 1, "readings share one");
    for _ in 0..3 {
        http.call(once()).await.unwrap();
    }
    assert_eq!(*server.connections.lock().unwrap(), 4);
}

#[tokio::test]
async fn api_key_is_never_printed() {
    let echo = |status: &str| {
        say(status, "", &format!("{{\"error\": \"bad header: Bearer {}\"}}", KEY.replace('4', "\\u0034")))
    };
    let plain = say("400 Bad Request", "", &format!("who is {KEY}?"));
    let broken = say("500 Internal Server Error", "", &format!("while serving {KEY}"));
    let heard = Arc::new(Mutex::new(String::new()));
    for act in [echo("400 Bad Request"), echo("429 Too Many Requests"), plain, broken, Act::Close] {
        let server = Server::start(&[act]);
        let listener = heard.clone();
        let explain: Explain = Arc::new(move |words: &str| listener.lock().unwrap().push_str(words));
        let http = server.client().explained(Some(explain));
        let said = match http.call(once().body(json!({"api_key": "other-secret"}))).await {
            Ok(reply) => format!("{} {reply:?} {}", reply.in_words(), reply.body),
            Err(error) => format!("{error} {error:?}"),
        };
        assert!(!said.contains(KEY), "{said}");
        assert!(!format!("{http:?}").contains(KEY));
    }
    let heard = heard.lock().unwrap();
    assert!(heard.contains("> POST ") && heard.contains("Bearer ***") && heard.contains("< 400"), "{heard}");
    assert!(!heard.contains(KEY) && !heard.contains("other-secret"), "{heard}");
}

/// Found by a fuzzer.
#[test]
fn sanitising_does_not_reassemble_a_key_in_errors() {
    for between in ["\u{1}", "\u{1b}[0m", "\u{202e}"] {
        let body = format!("no such key: {}", KEY.replacen('-', &format!("-{between}"), 1));
        let key = Some(Hidden::new(&Secret::new(KEY)));
        let reply = Response { key, ..Response::recorded(Idempotency::Read, 401, body) };
        let errors = [
            reply.refusal(BrokerErrorKind::Auth),
            reply.json::<Value>("a list").unwrap_err(),
            reply.error(BrokerErrorKind::Maybe, clean(reply.body.as_bytes(), 120)),
        ];
        for error in errors {
            assert!(error.message.contains("***") && !error.message.contains(KEY), "{error}");
        }
    }
}

#[tokio::test]
async fn sanitising_does_not_reassemble_a_key_in_explain_output() {
    for between in ["\u{1}", "\u{1b}[0m", "\u{202e}"] {
        let body = format!("no such key: {}\u{1b}[31m", KEY.replacen('-', &format!("-{between}"), 1));
        let server = Server::start(&[say("400 Bad Request", "", &body)]);
        let heard = Arc::new(Mutex::new(String::new()));
        let listener = heard.clone();
        let explain: Explain = Arc::new(move |words: &str| listener.lock().unwrap().push_str(words));
        server.client().explained(Some(explain)).call(once()).await.unwrap();
        let heard = heard.lock().unwrap();
        assert!(heard.contains("no such key: ***") && !heard.contains('\u{1b}'), "{heard:?}");
    }
}

#[tokio::test]
async fn endless_reply_is_cut() {
    let long = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(LARGEST_REPLY + 1));
    let server = Server::start(&[Act::SayAndClose(long)]);
    let patient = server.client_with(HttpLimits { read: Duration::from_secs(10), attempts: 1, ..limits() });
    let error = patient.call(once()).await.unwrap_err();
    assert_eq!(error.kind, BrokerErrorKind::Maybe);
    assert!(error.message.contains("more than 32 MiB"), "{error}");
}

#[test]
fn only_https_or_loopback_urls_are_accepted() {
    let new = |base: &str, key: Option<&str>| {
        Http::new("cloud", base, key.map(Secret::new), limits()).map(|_| ()).map_err(|error| error.kind)
    };
    assert_eq!(new("https://cloud.example/api/", Some(KEY)), Ok(()));
    assert_eq!(new("http://127.0.0.1:1", Some(KEY)), Ok(()));
    assert_eq!(new("http://[::1]:1", Some(KEY)), Ok(()));
    assert_eq!(new("http://cloud.example", None), Ok(()));
    for base in ["http://cloud.example", "ftp://cloud.example", "cloud.example", "", "file:///etc/passwd"] {
        assert_eq!(new(base, Some(KEY)), Err(BrokerErrorKind::Rejected), "{base}");
    }
    assert_eq!(new("https://cloud.example", Some("a\nb")), Err(BrokerErrorKind::Auth));
    for user in ["me:geheim", "me:ge/heim", "geheim"] {
        let base = &format!("https://{user}@cloud.example");
        let error = Http::new("cloud", base, Some(Secret::new(KEY)), limits()).err().unwrap();
        assert_eq!(error.kind, BrokerErrorKind::Rejected);
        assert!(!error.message.contains("heim") && error.message.contains("cloud.example"), "{error}");
    }
}

#[test]
fn malformed_reply_to_a_create_call_is_ambiguous() {
    let reply = |effect| Response { broker: "cloud", effect, key: None, status: 200, body: "<html>".to_owned() };
    let kind = |effect| reply(effect).json::<Value>("a thing").unwrap_err().kind;
    assert_eq!(kind(Idempotency::Once), BrokerErrorKind::Maybe);
    assert_eq!(kind(Idempotency::Read), BrokerErrorKind::Unavailable);
    assert_eq!(kind(Idempotency::Idempotent), BrokerErrorKind::Unavailable);
}
