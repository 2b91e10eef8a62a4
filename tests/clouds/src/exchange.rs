//! Requests and answers as a dialect sees them.

use outliers::cloud::http::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Op, Refusal};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Request {
    /// HTTP method.
    pub method: Method,
    /// The path under the cloud's base URL, not decoded: `/instances/17`.
    pub path: String,
    /// Parameters of the query in their order, decoded.
    pub query: Vec<(String, String)>,
    /// The header `Authorization`.
    pub authorization: Option<String>,
    /// The body as text; empty when there is none.
    pub body: String,
    /// The request's kind; `None`: the API has no such call.
    pub op: Option<Op>,
}

impl Request {
    /// Method and path segments, to match on: `("GET", ["instances", id])`. A trailing slash is an
    /// empty last segment.
    pub fn route(&self) -> (&str, Vec<&str>) {
        (self.method.as_str(), self.path.trim_start_matches('/').split('/').collect())
    }

    /// The first parameter of the query with this name.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] if it is not JSON.
    pub fn json(&self) -> Result<Value, Refusal> {
        self.read()
    }

    /// The body as `T`, which should refuse the unknown fields that the real cloud refuses.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] with the cause.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        serde_json::from_str(&self.body).map_err(|error| Refusal::Invalid(error.to_string()))
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiResponse {
    /// HTTP status.
    pub status: u16,
    /// Headers other than the length.
    pub headers: Vec<(&'static str, String)>,
    /// The body as text.
    pub body: String,
}

impl ApiResponse {
    /// A JSON document.
    pub fn json(status: u16, body: &Value) -> Self {
        Self { status, headers: vec![("content-type", "application/json".to_owned())], body: body.to_string() }
    }

    /// Plain text.
    pub fn text(status: u16, body: &str) -> Self {
        Self { status, headers: vec![("content-type", "text/plain".to_owned())], body: body.to_owned() }
    }

    /// A status without a body.
    pub fn empty(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: String::new() }
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    /// With `Retry-After`, if the refusal names seconds.
    #[must_use]
    pub fn retry_after(self, seconds: Option<u64>) -> Self {
        match seconds {
            Some(seconds) => self.header("retry-after", seconds),
            None => self,
        }
    }
}
