//! The part of OpenAPI that validates requests: paths, query parameters and schemas of bodies.
//!
//! Stricter than the standard in one place: a field that a schema does not name is wrong, unless
//! the schema allows additional ones. Patterns and formats of strings are not checked.

use std::collections::BTreeSet;

use outliers_clouds::Request;
use serde_json::{Map, Value};

/// A deviation of a request from its API description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Complaint {
    /// Place: a JSON pointer into the body, `?name` in the query, empty for the whole request.
    pub(crate) at: String,
    /// What is wrong.
    pub(crate) what: String,
}

/// A described API.
pub(crate) struct OpenApi(Value);

impl OpenApi {
    /// Reads JSON or YAML.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let yaml: serde_norway::Value = serde_norway::from_str(text).map_err(|error| error.to_string())?;
        Ok(Self(json_of(yaml)))
    }

    /// Deviations of the request, for an API whose paths begin with `base`.
    pub(crate) fn complaints(&self, request: &Request, base: &str) -> Vec<Complaint> {
        let path = format!("{base}{}", request.path);
        let method = request.method.as_str().to_lowercase();
        let Some((item, operation)) = self.operation(&path, &method) else {
            return vec![complaint("", "there is no such operation")];
        };
        let mut found = self.query(request, &[item, operation]);
        let body = self.resolved(&operation["requestBody"]);
        let schema = &body["content"]["application/json"]["schema"];
        match (request.body.as_str(), schema) {
            ("", _) if body["required"] == true => found.push(complaint("", "it needs a body")),
            ("", _) => {}
            // An empty object constrains nothing.
            ("{}", Value::Null) => {}
            (_, Value::Null) => found.push(complaint("", "it takes no body")),
            (text, schema) => match serde_json::from_str(text) {
                Ok(value) => self.judge(&value, schema, "", &mut found),
                Err(error) => found.push(complaint("", &format!("its body is no JSON: {error}"))),
            },
        }
        found
    }

    /// The best matching path, and its operation. A trailing slash is ignored: descriptions leave
    /// it out.
    fn operation(&self, path: &str, method: &str) -> Option<(&Value, &Value)> {
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let fits = |template: &str| {
            let template: Vec<&str> = template.trim_matches('/').split('/').collect();
            let same = |(told, part): (&&str, &&str)| told.starts_with('{') || told == part;
            (template.len() == parts.len() && template.iter().zip(&parts).all(same))
                .then(|| template.iter().filter(|told| told.starts_with('{')).count())
        };
        let paths = self.0["paths"].as_object()?.iter();
        let with_method = paths.filter(|(_, item)| item.get(method).is_some());
        let (_, item) =
            with_method.filter_map(|(template, item)| Some((fits(template)?, item))).min_by_key(|fit| fit.0)?;
        Some((item, &item[method]))
    }

    fn query(&self, request: &Request, places: &[&Value]) -> Vec<Complaint> {
        let lists = places.iter().filter_map(|place| place["parameters"].as_array()).flatten();
        let described: Vec<&Value> =
            lists.map(|parameter| self.resolved(parameter)).filter(|parameter| parameter["in"] == "query").collect();
        let unknown =
            request.query.iter().filter(|(name, _)| !described.iter().any(|told| told["name"] == name.as_str()));
        let unknown = unknown.map(|(name, _)| complaint(&format!("?{name}"), "there is no such parameter"));
        let missing = described.iter().filter(|told| told["required"] == true);
        let missing = missing.filter_map(|told| told["name"].as_str()).filter(|name| request.parameter(name).is_none());
        unknown.chain(missing.map(|name| complaint(&format!("?{name}"), "it is required"))).collect()
    }

    fn judge(&self, value: &Value, schema: &Value, at: &str, found: &mut Vec<Complaint>) {
        let schema = self.resolved(schema);
        if value.is_null() && schema["nullable"] == true {
            return;
        }
        let mut wrong = |what: String| found.push(complaint(at, &what));
        if !type_fits(value, &schema["type"]) {
            return wrong(format!("{value} is no {}", schema["type"]));
        }
        if schema["enum"].as_array().is_some_and(|allowed| !allowed.contains(value)) {
            wrong(format!("{value} is none of {}", schema["enum"]));
        }
        if schema.get("const").is_some_and(|only| only != value) {
            wrong(format!("{value} is not {}", schema["const"]));
        }
        bounds(value, schema).into_iter().for_each(wrong);
        for words in ["anyOf", "oneOf"] {
            if let Some(choices) = schema[words].as_array() {
                self.one_of(value, choices, at, found);
            }
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.judge_open(value, part, at, found);
        }
        match value {
            Value::Array(items) if schema["items"].is_object() => {
                for (index, item) in items.iter().enumerate() {
                    self.judge(item, &schema["items"], &format!("{at}/{index}"), found);
                }
            }
            Value::Object(fields) => self.fields(fields, schema, at, found),
            _ => {}
        }
    }

    /// The same for a part of a schema, which does not have the field names of the other parts.
    fn judge_open(&self, value: &Value, part: &Value, at: &str, found: &mut Vec<Complaint>) {
        let mut part = self.resolved(part).clone();
        if let Some(part) = part.as_object_mut() {
            part.insert("additionalProperties".to_owned(), Value::Bool(true));
        }
        self.judge(value, &part, at, found);
    }

    fn one_of(&self, value: &Value, choices: &[Value], at: &str, found: &mut Vec<Complaint>) {
        let judged = choices.iter().map(|choice| {
            let mut found = Vec::new();
            self.judge(value, choice, at, &mut found);
            found
        });
        // The alternative with the fewest deviations is reported.
        if let Some(fewest) = judged.min_by_key(Vec::len) {
            found.extend(fewest);
        }
    }

    fn fields(&self, fields: &Map<String, Value>, schema: &Value, at: &str, found: &mut Vec<Complaint>) {
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(name) {
                found.push(complaint(&format!("{at}/{name}"), "it is required"));
            }
        }
        let mut known = BTreeSet::new();
        self.names(schema, &mut known);
        let others = &schema["additionalProperties"];
        for (name, value) in fields {
            let at = format!("{at}/{name}");
            match schema["properties"].get(name) {
                Some(schema) => self.judge(value, schema, &at, found),
                None if known.contains(name) || others == &Value::Bool(true) => {}
                None if others.is_object() => self.judge(value, others, &at, found),
                // A schema without fields does not constrain fields.
                None if known.is_empty() && others.is_null() => {}
                None => found.push(complaint(&at, "there is no such field")),
            }
        }
    }

    /// Fields that the schema or a part of it names.
    fn names<'a>(&'a self, schema: &'a Value, known: &mut BTreeSet<&'a String>) {
        let schema = self.resolved(schema);
        known.extend(schema["properties"].as_object().into_iter().flat_map(Map::keys));
        for words in ["allOf", "anyOf", "oneOf"] {
            schema[words].as_array().into_iter().flatten().for_each(|part| self.names(part, known));
        }
    }

    /// Resolves a reference.
    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let mut schema = schema;
        while let Some(reference) = schema["$ref"].as_str() {
            let target = reference.strip_prefix('#').and_then(|pointer| self.0.pointer(pointer));
            schema = target.unwrap_or_else(|| panic!("`{reference}` leads nowhere"));
        }
        schema
    }
}

fn complaint(at: &str, what: &str) -> Complaint {
    Complaint { at: at.to_owned(), what: what.to_owned() }
}

fn type_fits(value: &Value, told: &Value) -> bool {
    let fits = |name: &str| match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("`{other}` is no type"),
    };
    match told {
        Value::String(name) => fits(name),
        Value::Array(names) => names.iter().filter_map(Value::as_str).any(fits),
        _ => true,
    }
}

fn bounds(value: &Value, schema: &Value) -> Vec<String> {
    let length = |value: &Value| match value {
        Value::String(text) => Some((text.chars().count(), "minLength", "maxLength")),
        Value::Array(items) => Some((items.len(), "minItems", "maxItems")),
        _ => None,
    };
    let (size, least, most) = match (value.as_f64(), length(value)) {
        (Some(number), _) => (number, "minimum", "maximum"),
        (None, Some((length, least, most))) => (length as f64, least, most),
        (None, None) => return Vec::new(),
    };
    let below = schema[least].as_f64().filter(|bound| size < *bound);
    let above = schema[most].as_f64().filter(|bound| size > *bound);
    let said = |word: &str, bound: f64| format!("{value} is against {word} {bound}");
    below.map(|bound| said(least, bound)).into_iter().chain(above.map(|bound| said(most, bound))).collect()
}

/// YAML as JSON: its keys may be numbers there (`200:`).
fn json_of(yaml: serde_norway::Value) -> Value {
    use serde_norway::Value as Yaml;
    let name = |key: Yaml| match key {
        Yaml::String(name) => name,
        other => serde_json::to_value(other).map(|key| key.to_string()).unwrap_or_default(),
    };
    match yaml {
        Yaml::Mapping(fields) => fields.into_iter().map(|(key, value)| (name(key), json_of(value))).collect(),
        Yaml::Sequence(items) => items.into_iter().map(json_of).collect(),
        Yaml::Tagged(tagged) => json_of(tagged.value),
        scalar => serde_json::to_value(scalar).unwrap_or_default(),
    }
}

mod tests {
    use outliers::cloud::http::Method;

    use super::*;

    const API: &str = "
paths:
  /v1/things/{id}:
    put:
      parameters: [{name: force, in: query, required: true}, {name: note, in: query}]
      requestBody: {required: true, content: {application/json: {schema: {$ref: '#/components/schemas/Thing'}}}}
      responses: {200: {description: done}}
  /v1/things/all:
    put: {}
components:
  schemas:
    Thing:
      type: object
      required: [name]
      properties:
        name: {type: string, maxLength: 3}
        kind: {type: string, enum: [a, b]}
        count: {type: integer, minimum: 1}
        either: {anyOf: [{type: string}, {type: 'null'}]}
        both: {allOf: [{type: object, properties: {x: {type: number}}, required: [x]}, {properties: {y: {type: string}}}]}
        map: {type: object, additionalProperties: {type: string}}
        list: {type: array, items: {type: boolean}, maxItems: 2}
";

    fn complaints(path: &str, body: &str) -> Vec<String> {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let query = query.split('&').filter_map(|pair| pair.split_once('='));
        let request = Request {
            method: Method::PUT,
            path: path.to_owned(),
            query: query.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            authorization: None,
            body: body.to_owned(),
            op: None,
        };
        let found = OpenApi::parse(API).expect("it is YAML").complaints(&request, "/v1");
        found.into_iter().map(|complaint| format!("{} {}", complaint.at, complaint.what)).collect()
    }

    #[test]
    fn what_is_right() {
        for body in [
            r#"{"name": "abc", "kind": "a", "count": 1, "either": null, "list": [true]}"#,
            r#"{"name": "abc", "both": {"x": 1.5, "y": "z"}, "map": {"any": "text"}}"#,
        ] {
            assert_eq!(complaints("/things/7/?force=1", body), Vec::<String>::new());
        }
        assert_eq!(complaints("/things/all", ""), Vec::<String>::new());
    }

    #[test]
    fn what_is_wrong() {
        for (path, body, said) in [
            ("/nothing", "", " there is no such operation"),
            ("/things/7", r#"{"name": "a"}"#, "?force it is required"),
            ("/things/7?force=1&x=1", r#"{"name": "a"}"#, "?x there is no such parameter"),
            ("/things/7?force=1", "", " it needs a body"),
            ("/things/7?force=1", "{}", "/name it is required"),
            ("/things/7?force=1", r#"{"name": "abcd"}"#, "/name \"abcd\" is against maxLength 3"),
            ("/things/7?force=1", r#"{"name": 7}"#, "/name 7 is no \"string\""),
            ("/things/7?force=1", r#"{"name": "a", "kind": "c"}"#, "/kind \"c\" is none of [\"a\",\"b\"]"),
            ("/things/7?force=1", r#"{"name": "a", "count": 0}"#, "/count 0 is against minimum 1"),
            ("/things/7?force=1", r#"{"name": "a", "count": 1.5}"#, "/count 1.5 is no \"integer\""),
            ("/things/7?force=1", r#"{"name": "a", "either": 7}"#, "/either 7 is no \"string\""),
            ("/things/7?force=1", r#"{"name": "a", "both": {}}"#, "/both/x it is required"),
            ("/things/7?force=1", r#"{"name": "a", "both": {"x": 1, "z": 1}}"#, "/both/z there is no such field"),
            ("/things/7?force=1", r#"{"name": "a", "map": {"k": 1}}"#, "/map/k 1 is no \"string\""),
            ("/things/7?force=1", r#"{"name": "a", "list": [1]}"#, "/list/0 1 is no \"boolean\""),
            ("/things/7?force=1", r#"{"name": "a", "more": 1}"#, "/more there is no such field"),
            ("/things/all", r#"{"name": "a"}"#, " it takes no body"),
        ] {
            assert_eq!(complaints(path, body), [said], "{path} {body}");
        }
    }
}
