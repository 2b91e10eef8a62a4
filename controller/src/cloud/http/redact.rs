//! Removes secrets from documents, and extracts messages for people.

use std::fmt;

use serde_json::Value;

use crate::secret::Secret;

/// A key in every form in which a server may repeat it.
#[derive(Clone)]
pub(super) struct Hidden(Vec<String>);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Hidden {
    pub(super) fn new(key: &Secret) -> Self {
        let plain = key.expose();
        let in_json = Value::from(plain).to_string();
        let in_json = in_json.trim_matches('"');
        let mut forms =
            vec![plain.to_owned(), in_json.to_owned(), in_json.replace('/', "\\/"), percent(plain, |digits| digits)];
        forms.push(percent(plain, |digits| digits.to_lowercase()));
        forms.retain(|form| !form.is_empty());
        Self(forms)
    }

    /// Replaces the key with `***`.
    pub(super) fn out_of(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, form| text.replace(form, "***"))
    }
}

/// Percent-encoded: all but what an address may have anywhere.
pub(crate) fn percent(text: &str, digits: impl Fn(String) -> String) -> String {
    let encode = |b: u8| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
        _ => digits(format!("%{b:02X}")),
    };
    text.bytes().map(encode).collect()
}

/// An address without its user name and password.
pub(crate) fn address(url: &str) -> String {
    let Some((before, after)) = url.rsplit_once('@') else { return url.to_owned() };
    let scheme = before.split_once("://").map_or(String::new(), |(scheme, _)| format!("{scheme}://"));
    format!("{scheme}***@{after}")
}

/// Parts of the names of fields with secret values.
const SECRET_NAMES: &[&str] = &[
    "api_key",
    "apikey",
    "secret",
    "password",
    "passwd",
    "token",
    "authorization",
    "private_key",
    "credential",
    "jupyter",
];
/// Fields with explanations, in the order of reading.
const SENTENCES: &[&str] = &["title", "code", "error", "errors", "message", "msg", "detail", "details", "suggestion"];
/// Maximum parts of one explanation.
const MAX_PARTS: usize = 8;

/// A JSON text without the values of secret fields; other text is unchanged.
pub(super) fn document(text: &str) -> String {
    serde_json::from_str::<Value>(text).map_or_else(|_| text.to_owned(), |document| value(&document))
}

/// A JSON value without the values of secret fields.
pub(super) fn value(document: &Value) -> String {
    let mut document = document.clone();
    hide(&mut document);
    serde_json::to_string_pretty(&document).unwrap_or_default()
}

fn hide(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            // Some documents contain `{"key": "HF_TOKEN", "value": "hf_.."}`.
            let named = fields.get("key").or_else(|| fields.get("name")).and_then(Value::as_str).is_some_and(is_secret);
            for (name, value) in fields.iter_mut() {
                if (is_secret(name) || named && name == "value") && !value.is_null() {
                    *value = Value::String("***".to_owned());
                } else {
                    hide(value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(hide),
        _ => {}
    }
}

fn is_secret(name: &str) -> bool {
    let name = name.to_lowercase();
    SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

/// The messages in a refusal's usual fields, each once.
pub(super) fn sentences(document: &Value) -> String {
    let mut found = Vec::new();
    collect(document, &mut found);
    found.join(": ")
}

fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => {
            let text = text.trim();
            if !text.is_empty() && found.len() < MAX_PARTS && !found.iter().any(|known| known.contains(text)) {
                found.push(text.to_owned());
            }
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, found)),
        Value::Object(fields) => {
            for name in SENTENCES {
                if let Some(value) = fields.get(*name) {
                    collect(value, found);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_hidden_at_any_depth() {
        let text = value(&json!({
            "instance_api_key": "abc1", "nested": [{"JUPYTER_TOKEN": "abc2", "kept": "fine"}], "password": null, "label": "x",
            "env": [{"key": "HF_TOKEN", "value": "abc3"}, {"key": "PUBLIC_KEY", "value": "fine"}],
        }));
        assert!(!text.contains("abc") && text.contains("fine") && text.contains("\"label\": \"x\""), "{text}");
        assert_eq!(document("not json"), "not json");
    }

    #[test]
    fn keys_are_redacted_in_every_encoding() {
        let hidden = Hidden::new(&Secret::new("s/k+\"1\u{e4}"));
        for text in ["s/k+\"1\u{e4}", r#"s/k+\"1ä"#, r#"s\/k+\"1ä"#, "s%2Fk%2B%221%C3%A4", "s%2fk%2b%221%c3%a4"] {
            assert_eq!(hidden.out_of(&format!("<{text}> and <{text}>")), "<***> and <***>", "{text}");
        }
        assert_eq!(Hidden::new(&Secret::new("")).out_of("all"), "all");
        assert_eq!(format!("{hidden:?}"), "***");
    }

    #[test]
    fn passwords_in_urls_are_redacted() {
        for (url, shown) in [
            ("https://api.example/v1", "https://api.example/v1"),
            ("https://me:geheim@api.example/v1", "https://***@api.example/v1"),
            ("https://me:ge@he/im@api.example", "https://***@api.example"),
            ("me:geheim@api.example", "***@api.example"),
        ] {
            assert_eq!(address(url), shown);
        }
    }

    #[test]
    fn error_messages_of_every_cloud_are_extracted() {
        for (document, expected) in [
            (json!({"title": "Bad Request", "status": 400, "detail": "no instances"}), "Bad Request: no instances"),
            (json!({"success": false, "error": "invalid_args", "msg": "no_such_ask"}), "invalid_args: no_such_ask"),
            (
                json!({"error": {"code": "global/quota", "message": "Too many", "suggestion": "Ask"}}),
                "global/quota: Too many: Ask",
            ),
            (json!({"detail": [{"loc": ["body"], "msg": "field required", "type": "x"}]}), "field required"),
            (json!({"errors": [{"message": "Something"}], "data": null}), "Something"),
            (json!({"data": 1}), ""),
        ] {
            assert_eq!(sentences(&document), expected);
        }
    }
}
