//! RunPod's GraphQL API: one address, and errors with status 200.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::refused;
use crate::cloud::broker::{BrokerError, BrokerErrorKind};
use crate::cloud::http::{Call, Http, Idempotency, Method};

/// RunPod's messages for missing stock, which has no code.
const NO_CAPACITY: &[&str] = &[
    "no longer any instances available",
    "no instances available",
    "not enough free gpus",
    "does not have the resources",
    "enough disk space",
];
/// Messages of a retired API.
const RETIRED: &[&str] =
    &["has been retired", "was retired", "has been sunset", "no longer supported", "has been removed"];
const NO_FUNDS: &[&str] = &["balance", "insufficient funds", "spend limit", "spending limit"];
const NO_ACCESS: &[&str] = &["unauthenticated", "unauthorized", "forbidden", "not authorized", "invalid api key"];
/// Codes of GraphQL servers for requests that were refused before execution.
const NOT_UNDERSTOOD: &[&str] = &["graphql_parse_failed", "graphql_validation_failed", "bad_user_input"];

/// A query or mutation. Values are passed as variables, so that none is parsed as part of it.
#[derive(Clone, Copy)]
pub(super) struct Operation {
    pub(super) field: &'static str,
    pub(super) query: &'static str,
    pub(super) effect: Idempotency,
}

impl Operation {
    /// The field's value; `None` if GraphQL or this field has been retired, and nothing was
    /// executed.
    pub(super) async fn ask<T: DeserializeOwned>(
        self,
        http: &Http,
        variables: Value,
    ) -> Result<Option<T>, BrokerError> {
        let body = json!({"query": self.query, "variables": variables});
        let reply = http.call(Call::new(Method::POST, "/graphql", self.effect).body(body)).await?;
        if is_retired(reply.status, reply.value().as_ref(), self.field) {
            return Ok(None);
        }
        let value = read(reply.status, reply.value(), self.field).map_err(|kind| match kind {
            Some(kind) => reply.refusal(kind),
            None => reply.error(reply.unclear(), format!("it does not say what became of it: {}", reply.in_words())),
        })?;
        serde_json::from_value(value).map_err(|error| {
            reply.error(reply.unclear(), format!("its answer is not {} ({error}): {}", self.field, reply.in_words()))
        })
    }
}

/// Whether the whole API is retired, or the field unknown. An error page of a proxy is neither.
fn is_retired(status: u16, document: Option<&Value>, field: &str) -> bool {
    let errors = document.and_then(|document| document.get("errors")).and_then(Value::as_array);
    let unknown = format!("cannot query field \"{}\"", field.to_lowercase());
    let says = |words: &str| words.contains(&unknown) || RETIRED.iter().any(|phrase| words.contains(phrase));
    let told = errors.is_some_and(|errors| errors.iter().flat_map(words_of).any(|words| says(&words)));
    status == 410
        || told
            && document.is_some_and(|document| document.pointer(&format!("/data/{field}")).is_none_or(Value::is_null))
}

/// The value of `field` in a reply, or the kind of refusal; `None` if the request may have been
/// executed.
fn read(status: u16, document: Option<Value>, field: &str) -> Result<Value, Option<BrokerErrorKind>> {
    let mut document = document.unwrap_or_default();
    let found = document.pointer_mut(&format!("/data/{field}")).map(Value::take).filter(|value| !value.is_null());
    match found {
        // Also beside errors, since the object exists.
        Some(value) if (200..300).contains(&status) => Ok(value),
        _ => Err(refusal(status, &document)),
    }
}

fn refusal(status: u16, document: &Value) -> Option<BrokerErrorKind> {
    let errors = document.get("errors").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let words: Vec<String> = errors.iter().flat_map(words_of).collect();
    let says = |phrases: &[&str]| words.iter().any(|word| phrases.iter().any(|phrase| word.contains(phrase)));
    // By the specification an answer without `data` means that nothing was executed.
    let not_executed = !errors.is_empty() && document.get("data").is_none() || says(NOT_UNDERSTOOD);
    if says(NO_CAPACITY) {
        Some(BrokerErrorKind::NoCapacity)
    } else if says(NO_ACCESS) {
        Some(BrokerErrorKind::Auth)
    } else if says(NO_FUNDS) {
        Some(BrokerErrorKind::Budget)
    } else if !(200..300).contains(&status) {
        Some(refused(status))
    } else {
        not_executed.then_some(BrokerErrorKind::Rejected)
    }
}

/// Whether RunPod, in either API, reports missing stock.
pub(super) fn says_no_capacity(words: &str) -> bool {
    let words = words.to_lowercase();
    NO_CAPACITY.iter().any(|phrase| words.contains(phrase))
}

/// Message and code of an error, in lower case.
fn words_of(error: &Value) -> impl Iterator<Item = String> {
    let texts = [error.get("message"), error.pointer("/extensions/code")];
    texts.into_iter().flatten().filter_map(Value::as_str).map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Result of a reply to the creation of a pod.
    fn of(status: u16, document: Value) -> Result<Value, Option<BrokerErrorKind>> {
        read(status, Some(document), "podFindAndDeployOnDemand")
    }

    fn error(message: &str, code: &str) -> Value {
        json!({"message": message, "path": ["podFindAndDeployOnDemand"], "extensions": {"code": code}})
    }

    #[test]
    fn refusal_messages_map_to_error_kinds() {
        let nothing = json!({"podFindAndDeployOnDemand": null});
        for (message, code, expected) in [
            (
                "There are no longer any instances available with the requested specifications. Please refresh and try again.",
                "RUNPOD",
                Some(BrokerErrorKind::NoCapacity),
            ),
            (
                "There are no instances available with the request specifications. Please try again later.",
                "RUNPOD",
                Some(BrokerErrorKind::NoCapacity),
            ),
            (
                "This machine does not have the resources to deploy your pod.",
                "RUNPOD",
                Some(BrokerErrorKind::NoCapacity),
            ),
            ("Not enough free GPUs on the host", "INTERNAL_SERVER_ERROR", Some(BrokerErrorKind::NoCapacity)),
            ("Your balance is too low to rent this pod", "RUNPOD", Some(BrokerErrorKind::Budget)),
            ("You would exceed your spend limit", "RUNPOD", Some(BrokerErrorKind::Budget)),
            ("Unauthorized request", "RUNPOD", Some(BrokerErrorKind::Auth)),
            ("Something about your key", "FORBIDDEN", Some(BrokerErrorKind::Auth)),
            ("Variable \"$input\" got invalid value", "BAD_USER_INPUT", Some(BrokerErrorKind::Rejected)),
            ("Something went wrong. Please try again later or contact support.", "INTERNAL_SERVER_ERROR", None),
            ("A sentence nobody has seen", "RUNPOD", None),
        ] {
            let answer = json!({"errors": [error(message, code)], "data": nothing});
            assert_eq!(of(200, answer), Err(expected), "{message}");
        }
    }

    #[test]
    fn retired_api_is_distinguished_from_a_refusal() {
        let field = "podFindAndDeployOnDemand";
        let unknown = json!({"errors": [error(&format!("Cannot query field \"{field}\" on type \"Mutation\"."), "X")]});
        let retired = json!({"errors": [error("The GraphQL API was retired; use REST v2.", "GONE")]});
        for (status, document, expected) in [
            (410, None, true),
            (400, Some(&unknown), true),
            (200, Some(&unknown), true),
            (404, Some(&retired), true),
            (404, None, false),
            (200, Some(&json!({"errors": [error("no instances available", "RUNPOD")], "data": {field: null}})), false),
            (200, Some(&json!({"errors": retired["errors"], "data": {field: {"id": "x"}}})), false),
        ] {
            assert_eq!(is_retired(status, document, field), expected, "{status} {document:?}");
        }
    }

    #[test]
    fn unexecuted_mutation_is_rejected_and_not_ambiguous() {
        let unknown = error("Cannot query field \"x\" on type \"Mutation\".", "OTHER");
        assert_eq!(of(200, json!({"errors": [unknown]})), Err(Some(BrokerErrorKind::Rejected)));
        assert_eq!(of(400, json!({"errors": [unknown]})), Err(Some(BrokerErrorKind::Rejected)));
        assert_eq!(of(200, json!({"errors": [unknown], "data": null})), Err(None));
        assert_eq!(of(200, json!({"errors": []})), Err(None));
        assert_eq!(of(200, json!({"data": {"podFindAndDeployOnDemand": null}})), Err(None));
        assert_eq!(of(200, json!([1, 2])), Err(None));
        assert_eq!(read(200, None, "x"), Err(None));
        assert_eq!(read(401, None, "x"), Err(Some(BrokerErrorKind::Auth)));
        assert_eq!(read(302, None, "x"), Err(Some(BrokerErrorKind::Unavailable)));
    }

    #[test]
    fn returned_pod_counts_despite_errors() {
        let pod = json!({"id": "abc"});
        let data = json!({"podFindAndDeployOnDemand": pod});
        assert_eq!(of(200, json!({"data": data})), Ok(pod.clone()));
        assert_eq!(of(200, json!({"data": data, "errors": [error("no instances available", "RUNPOD")]})), Ok(pod));
    }
}
