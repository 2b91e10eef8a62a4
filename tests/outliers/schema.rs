//! `docs/results.schema.json` describes `results.json` as the worker writes it.

use std::path::Path;

use outliers_protocol::files;
use serde_json::Value;

use crate::worker::run_fixture;

/// What of a value is not as a schema says, each with its place. Knows the words that our schema
/// uses.
fn differences(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.strip_prefix("#/$defs/").unwrap();
        return differences(root, &root["$defs"][name], value, at);
    }
    if let Some(any) = schema["anyOf"].as_array() {
        let of_each = any.iter().map(|schema| differences(root, schema, value, at));
        return of_each.min_by_key(Vec::len).unwrap();
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::Array(types) => types.iter().map(|name| name.as_str().unwrap()).collect(),
        name => vec![name.as_str().unwrap()],
    };
    let is = |name: &&str| match *name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        other => panic!("{at}: type {other}"),
    };
    if !types.iter().any(is) {
        return vec![format!("{at} is no {types:?}: {value}")];
    }
    let mut found = Vec::new();
    if schema.get("const").is_some_and(|only| only != value) {
        found.push(format!("{at} is not {}: {value}", schema["const"]));
    }
    if let Some(values) = schema["enum"].as_array()
        && !values.contains(value)
    {
        found.push(format!("{at} is none of {values:?}: {value}"));
    }
    if let (Some(least), Some(number)) = (schema["minimum"].as_f64(), value.as_f64())
        && number < least
    {
        found.push(format!("{at} is less than {least}: {value}"));
    }
    for item in value.as_array().into_iter().flatten() {
        found.extend(differences(root, &schema["items"], item, &format!("{at}[]")));
    }
    if let Some(fields) = value.as_object() {
        let required = schema["required"].as_array().unwrap().iter().map(|name| name.as_str().unwrap());
        found.extend(required.filter(|name| !fields.contains_key(*name)).map(|name| format!("{at} has no {name}")));
        for (name, field) in fields {
            match schema["properties"].get(name) {
                Some(schema) => found.extend(differences(root, schema, field, &format!("{at}/{name}"))),
                None => found.push(format!("{at}/{name} is not described")),
            }
        }
    }
    found
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn schema() -> Value {
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/results.schema.json"))
}

#[test]
fn results_match_the_schema_in_every_field() {
    let schema = schema();
    for (fixture, more) in [
        ("olmoe-f32-sharded", &["--sites", "all"][..]),
        ("llama-f32", &["--sites", "all", "--ablate", "1,3"][..]),
        ("llama-f32", &["--layers", "1"][..]),
        (
            "olmoe-f32-sharded",
            &["--measure", "quantization-error,residual-sinks,spike-life,attention-sinks", "--threshold", "2"][..],
        ),
    ] {
        let output = run_fixture(fixture, more);
        let results = read(&output.path().join(files::RESULTS));
        let found = differences(&schema, &schema, &results, "");
        assert_eq!(found, Vec::<String>::new(), "{fixture} {more:?}");
    }
}

#[test]
fn schema_violations_are_detected() {
    let schema = schema();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../controller/tests/results/mixture");
    let results = read(&folder.join(files::RESULTS));
    assert_eq!(differences(&schema, &schema, &results, ""), Vec::<String>::new());
    let wrong = |change: fn(&mut Value)| {
        let mut results = results.clone();
        change(&mut results);
        differences(&schema, &schema, &results, "")
    };
    assert_eq!(wrong(|results| results["schema"] = 2.into()), ["/schema is not 1: 2"]);
    assert_eq!(wrong(|results| results["hidden"] = "64".into()).len(), 1);
    assert_eq!(wrong(|results| results["features"][0]["sided"] = "left".into()).len(), 1);
    assert_eq!(wrong(|results| results["news"] = 1.into()), ["/news is not described"]);
    let missing = wrong(|results| results.as_object_mut().unwrap().retain(|name, _| name != "sites"));
    assert_eq!(missing, [" has no sites"]);
}
