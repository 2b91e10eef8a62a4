//! Secrets out, sentences in: what of a document people may see.

use serde_json::Value;

/// Parts of field names whose values are nobody's business.
const SECRET_NAMES: &[&str] =
    &["api_key", "apikey", "secret", "password", "passwd", "token", "authorization", "private_key", "credential"];
/// What clouds call their explanations, in the order in which they read best.
const SENTENCES: &[&str] = &["title", "code", "error", "errors", "message", "msg", "detail", "details", "suggestion"];
/// Most pieces that make up one explanation.
const MOST: usize = 8;

/// A document's text without the values of secret fields; text that is no document as it is.
pub(super) fn document(text: &str) -> String {
    serde_json::from_str::<Value>(text).map_or_else(|_| text.to_owned(), |document| value(&document))
}

/// The same of a value.
pub(super) fn value(document: &Value) -> String {
    let mut document = document.clone();
    hide(&mut document);
    serde_json::to_string_pretty(&document).unwrap_or_default()
}

fn hide(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields.iter_mut() {
                let name = name.to_lowercase();
                if SECRET_NAMES.iter().any(|secret| name.contains(secret)) && !value.is_null() {
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

/// What a refusal says in its usual fields, each once.
pub(super) fn sentences(document: &Value) -> String {
    let mut found = Vec::new();
    collect(document, &mut found);
    found.join(": ")
}

fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => {
            let text = text.trim();
            if !text.is_empty() && found.len() < MOST && !found.iter().any(|known| known.contains(text)) {
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
            "instance_api_key": "abc1", "nested": [{"JUPYTER_TOKEN": "abc2", "kept": "fine"}], "password": null, "label": "x"
        }));
        assert!(!text.contains("abc") && text.contains("fine") && text.contains("\"label\": \"x\""), "{text}");
        assert_eq!(document("not json"), "not json");
    }

    #[test]
    fn sentences_of_every_cloud() {
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
