//! HTTP answers without a server.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use outliers::cloud::http::header::{HeaderMap, HeaderValue, RETRY_AFTER};
use outliers::cloud::http::{Call, HttpTransport, NoResponse, RawResponse};

/// The remaining answers. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Responses(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl Responses {
    /// Says `script` from now on, whatever was left: answers that each begin with a line `===
    /// <status> <Retry-After>`, of which the last part may be missing, and hold a body.
    pub fn say(&self, script: &[u8]) {
        let mut responses: VecDeque<Vec<u8>> = VecDeque::new();
        for line in script.split_inclusive(|b| *b == b'\n') {
            match responses.back_mut() {
                Some(answer) if !line.starts_with(MARK) => answer.extend_from_slice(line),
                _ => responses.push_back(line.to_vec()),
            }
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = responses;
    }

    /// The next answer; after the last the connection breaks.
    fn next(&self) -> Result<RawResponse, NoResponse> {
        let answer = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let broke = || NoResponse { certainly_not_taken: false, words: "the connection broke".to_owned() };
        let answer = answer.ok_or_else(broke)?;
        let end = answer.iter().position(|b| *b == b'\n').unwrap_or(answer.len());
        let (head, body) = answer.split_at(end);
        let head = String::from_utf8_lossy(head.strip_prefix(MARK).unwrap_or(head)).into_owned();
        let (status, wait) = head.split_once(' ').unwrap_or((&head, ""));
        let mut headers = HeaderMap::new();
        if let (false, Ok(wait)) = (wait.is_empty(), HeaderValue::from_str(wait)) {
            headers.insert(RETRY_AFTER, wait);
        }
        let status = status.parse().ok().filter(|status| (100..1000).contains(status)).unwrap_or(200);
        let body = body.get(1..).unwrap_or_default().to_vec();
        Ok(RawResponse { status, headers, body, clock_skew: None })
    }
}

#[async_trait]
impl HttpTransport for Responses {
    async fn exchange(&self, _: &str, _: &Call) -> Result<RawResponse, NoResponse> {
        self.next()
    }
}

const MARK: &[u8] = b"=== ";
