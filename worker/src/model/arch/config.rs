//! Reads `config.json` with the semantics of transformers: absent keys have the default of the
//! family's configuration class, null has the class's meaning, and every key that changes the
//! computation is either read or refused by name.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use outliers_protocol::{CONFIG_RULES, ConfigReading, FailureKind};
use serde_json::{Map, Value};

pub(super) mod class;
pub(super) mod rope;
pub(super) mod unused;

use super::{Nvfp4Layout, Quantisation};
use crate::error::{Result, WorkerError};
use class::Class;
use unused::Unused;

/// More layers than any model has. Limits what a damaged or hostile configuration can allocate.
const MAX_LAYERS: usize = 4096;
const NUMBER_LIMIT: u64 = 1 << 31;
/// Settings of single layers, an attribute of every class of transformers.
pub(super) const PER_LAYER: &str = "per_layer_config";

/// A `config.json`, or its text model's part. It records which keys are read.
pub struct Config<'a> {
    values: &'a Map<String, Value>,
    class: &'static Class,
    /// `text_config.` if the settings are nested.
    prefix: &'static str,
    /// Keys that were read.
    read: RefCell<BTreeSet<String>>,
    /// Absent keys that were read, with the class's defaults.
    assumed: RefCell<BTreeMap<String, Value>>,
    /// Keys that neither the class nor this program has.
    unknown: RefCell<BTreeSet<String>>,
}

impl<'a> Config<'a> {
    pub(super) fn new(values: &'a Map<String, Value>, class: &'static Class, prefix: &'static str) -> Self {
        let (read, assumed, unknown) = Default::default();
        Self { values, class, prefix, read, assumed, unknown }
    }

    /// Full name of a key from the top of the file.
    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The value of a key in the file, null included, without a default.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.values.get(key)
    }

    /// Whether the file has the key, null or not.
    pub fn has(&self, key: &str) -> bool {
        self.raw(key).is_some()
    }

    /// The value of a key that is an object.
    ///
    /// # Errors
    /// The key is missing or not an object.
    pub(super) fn object(&self, key: &str) -> Result<&'a Map<String, Value>> {
        let value = self.raw(key).unwrap_or(&Value::Null);
        value.as_object().ok_or_else(|| ill_typed(&self.name(key), "an object", value))
    }

    /// Whether the class has this attribute.
    pub fn knows(&self, key: &str) -> bool {
        self.class.default_of(key).is_some()
    }

    /// Records that a default is used for an absent key.
    pub(super) fn assume(&self, key: &str, default: &Value) {
        self.assumed.borrow_mut().insert(self.name(key), default.clone());
    }

    /// The value of a setting under any of its names; `None` for null, and for an absent key
    /// without a default.
    fn get(&self, key: &str) -> Result<Option<&'a Value>> {
        self.read.borrow_mut().insert(key.to_owned());
        let mut found = self.class.names(key).filter_map(|name| Some((name, self.values.get(name)?)));
        let first = found.next();
        if let (Some((one, a)), Some((other, b))) = (first, found.next())
            && a != b
        {
            let message = format!("config.json says {one} = {a} and {other} = {b}, which are one setting");
            return Err(WorkerError::checkpoint(message).hint("remove the one that is wrong"));
        }
        match first {
            Some((name, Value::Null)) if self.class.refuses_null(name) || !self.knows(name) => Err(self.null(name)),
            Some((_, value)) => Ok(Some(value).filter(|value| !value.is_null())),
            None => {
                let default = self.class.default_of(key).filter(|default| !default.is_null());
                default.inspect(|default| self.assume(key, default));
                Ok(default)
            }
        }
    }

    /// The error for a null that the class refuses.
    fn null(&self, key: &str) -> WorkerError {
        let message = format!("config.json: {:?} is null, which {} does not take", self.name(key), self.class.name);
        WorkerError::checkpoint(message).hint("remove the key, so that its default counts, or give it a value")
    }

    /// The value, or an error if it is missing.
    fn required<T>(&self, key: &str, wanted: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| ill_typed(&self.name(key), wanted, &Value::Null))
    }

    /// The number of layers.
    pub fn layers(&self) -> Result<usize> {
        self.layers_under("num_hidden_layers")
    }

    /// The number of layers under another key.
    pub fn layers_under(&self, key: &str) -> Result<usize> {
        let layers = self.count(key)?;
        if layers <= MAX_LAYERS {
            Ok(layers)
        } else {
            Err(ill_typed(&self.name(key), "a plausible number of layers", &layers.into()))
        }
    }

    /// A list read from `key`, which must have one entry per layer.
    pub fn one_per_layer<T>(&self, key: &str, list: Vec<T>) -> Result<Vec<T>> {
        let layers = self.layers()?;
        let found = Value::from(format!("{} entries", list.len()));
        let wanted = format!("a list of {layers} entries, one for each of num_hidden_layers");
        if list.len() == layers { Ok(list) } else { Err(ill_typed(&self.name(key), &wanted, &found)) }
    }

    /// A non-negative whole number.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.required(key, "a whole number", self.count_opt(key)?)
    }

    /// A non-negative whole number, or null.
    pub fn count_opt(&self, key: &str) -> Result<Option<usize>> {
        let number = |value: &Value| {
            let number = value.as_u64().filter(|number| *number < NUMBER_LIMIT);
            number.map(|number| number as usize).ok_or_else(|| ill_typed(&self.name(key), "a whole number", value))
        };
        self.get(key)?.map(number).transpose()
    }

    /// A whole number. If it is null, or absent without a default, the class derives it as
    /// `derived`.
    pub fn count_or(&self, key: &str, derived: usize) -> Result<usize> {
        let count = self.count_opt(key)?;
        if count.is_none() {
            self.assume(key, &derived.into());
        }
        Ok(count.unwrap_or(derived))
    }

    /// A positive whole number.
    pub fn divisor(&self, key: &str) -> Result<usize> {
        match self.count(key)? {
            0 => Err(ill_typed(&self.name(key), "a positive whole number", &0.into())),
            number => Ok(number),
        }
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.required(key, "a number", self.number_opt(key)?)
    }

    /// A number, or null.
    pub fn number_opt(&self, key: &str) -> Result<Option<f64>> {
        let number = |value: &Value| value.as_f64().ok_or_else(|| ill_typed(&self.name(key), "a number", value));
        self.get(key)?.map(number).transpose()
    }

    /// A boolean. Whole numbers count as in Python (`attn_temperature_tuning: 4`), and so does
    /// null if the class accepts it.
    pub fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key)? {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => match value.as_i64() {
                Some(number) => Ok(number != 0),
                None => Err(ill_typed(&self.name(key), "true or false", value)),
            },
        }
    }

    /// A list of whole numbers; null, or absent without a default, is `None`.
    pub fn counts_opt(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        let wrong = || ill_typed(&self.name(key), "a list of whole numbers", value);
        let number = |value: &Value| value.as_u64().filter(|n| *n < NUMBER_LIMIT).map(|n| n as usize);
        let numbers: Option<Vec<usize>> = value.as_array().ok_or_else(wrong)?.iter().map(number).collect();
        numbers.ok_or_else(wrong).map(Some)
    }

    /// A string.
    pub fn word(&self, key: &str) -> Result<&'a str> {
        let value = self.required(key, "a word", self.get(key)?)?;
        value.as_str().ok_or_else(|| ill_typed(&self.name(key), "a word", value))
    }

    /// A list with one string per layer; `None` if absent or null.
    pub fn words_opt(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        let words: Option<Vec<&str>> = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        let words = words.ok_or_else(|| ill_typed(&self.name(key), "a list of words", value))?;
        self.one_per_layer(key, words).map(Some)
    }

    /// `layer_types` in the names of transformers 5; `None` if the class derives them.
    pub fn layer_types(&self) -> Result<Option<Vec<&'a str>>> {
        let renamed = |kind: &'a str| match kind {
            "attention" => "full_attention",
            "mamba" => "linear_attention",
            kind => kind,
        };
        Ok(self.words_opt("layer_types")?.map(|kinds| kinds.into_iter().map(renamed).collect()))
    }

    /// Refuses a boolean other than `wanted`. Keys that the class does not have may be null.
    pub fn expect_flag(&self, key: &str, wanted: bool) -> Result<()> {
        if !self.knows(key) && self.raw(key).is_none_or(Value::is_null) {
            return Ok(());
        }
        if self.flag(key)? == wanted { Ok(()) } else { Err(unsupported(format!("{key} {}", !wanted))) }
    }

    /// Refuses a value outside `wanted`. Keys that the class does not have may be absent or null.
    pub fn expect(&self, key: &str, wanted: &[Value]) -> Result<()> {
        if !self.knows(key) && self.raw(key).is_none_or(Value::is_null) {
            return Ok(());
        }
        match self.get(key)? {
            Some(found) if !wanted.contains(found) => {
                let known: Vec<String> = wanted.iter().map(Value::to_string).collect();
                Err(unsupported(format!("{} {found} (known for this family: {})", self.name(key), known.join(", "))))
            }
            _ => Ok(()),
        }
    }

    /// Refuses an activation other than SiLU.
    pub fn expect_silu(&self) -> Result<()> {
        self.expect("hidden_act", &["silu".into(), "swish".into()])
    }

    /// Checks all keys that the family did not read, and returns the defaults and unknown keys.
    ///
    /// # Errors
    /// An attribute of the class that is neither read nor without effect, and not at its default;
    /// a null that the class refuses.
    pub(super) fn finish(&self, family: &[Unused]) -> Result<ConfigReading> {
        let read = self.read.borrow();
        let is_read = |key: &str| self.class.names(key).any(|name| read.contains(name));
        let mut unknown = self.unknown.borrow().clone();
        for (key, value) in self.values.iter().filter(|(key, _)| !is_read(key)) {
            let default = self.class.default_of(key);
            if key == PER_LAYER && value.as_object().is_some_and(|layers| !layers.is_empty()) {
                return Err(unsupported(format!("{}: settings of single layers", self.name(key))));
            }
            if value.is_null() && self.class.refuses_null(key) {
                return Err(self.null(key));
            }
            if unused::reason(key, family).is_some() || default == Some(value) {
                continue;
            }
            if default.is_some() {
                return Err(unsupported(format!("{} {value} (it is not read for this family)", self.name(key))));
            }
            unknown.insert(self.name(key));
        }
        let null = |key: &&String| self.values.get(key.as_str()).is_some_and(Value::is_null) && self.knows(key);
        Ok(ConfigReading {
            rules: CONFIG_RULES,
            class: self.class.name.clone(),
            defaults: self.assumed.borrow().clone(),
            nulls: read.iter().filter(null).map(|key| self.name(key)).collect(),
            unknown: unknown.into_iter().collect(),
        })
    }

    /// The quantised storage by `quantization_config`.
    pub(super) fn quantisation(&self) -> Result<Option<Quantisation>> {
        let key = "quantization_config";
        let Some(value) = self.raw(key).filter(|value| !value.is_null()) else { return Ok(None) };
        let values = value.as_object().ok_or_else(|| ill_typed(key, "an object", value))?;
        let method = values.get("quant_method").and_then(Value::as_str).unwrap_or("?");
        match method {
            "mxfp4" => Ok(Some(Quantisation::Mxfp4)),
            "fp8" => fp8_blocks(values).map(Some),
            "compressed-tensors" => compressed_tensors(values).map(Some),
            "modelopt" => match values.get("quant_algo") {
                Some(Value::String(algorithm)) if algorithm == "NVFP4" => {
                    Ok(Some(Quantisation::Nvfp4(Nvfp4Layout::ModelOpt)))
                }
                other => Err(unsupported(format!("{key}.quant_algo {} (known: NVFP4)", shown(other)))),
            },
            _ => {
                let known = "compressed-tensors, fp8, modelopt, mxfp4";
                Err(unsupported(format!("{key} with quant_method {method:?} (known: {known})")))
            }
        }
    }
}

/// Tiles of `FineGrainedFP8Config`; default 128 x 128.
fn fp8_blocks(values: &Map<String, Value>) -> Result<Quantisation> {
    let refuse = |key: &str, value: &Value, known: &str| {
        Err(unsupported(format!("quantization_config.{key} {value} (known: {known})")))
    };
    for (key, known) in [("fmt", &["e4m3", "float8_e4m3fn"][..]), ("expert_dtype", &["fp8"][..])] {
        match values.get(key) {
            Some(value) if !value.as_str().is_some_and(|value| known.contains(&value)) => {
                return refuse(key, value, &known.join(", "));
            }
            _ => {}
        }
    }
    let Some(block) = values.get("weight_block_size") else { return Ok(Quantisation::Fp8Blocks { block: [128, 128] }) };
    let side = |value: &Value| value.as_u64().filter(|side| (1..NUMBER_LIMIT).contains(side)).map(|side| side as usize);
    let sides: Option<Vec<usize>> = block.as_array().and_then(|list| list.iter().map(side).collect());
    match sides.as_deref() {
        Some(&[rows, columns]) => Ok(Quantisation::Fp8Blocks { block: [rows, columns] }),
        _ => refuse("weight_block_size", block, "two positive numbers"),
    }
}

/// Formats of compressed-tensors. All groups of layers must have the same one.
fn compressed_tensors(values: &Map<String, Value>) -> Result<Quantisation> {
    const KEY: &str = "quantization_config";
    // Rotations of inputs, which the stored weights presuppose.
    const TRANSFORMS: &str = "transform_config";
    if values.get(TRANSFORMS).and_then(Value::as_object).is_some_and(|transforms| !transforms.is_empty()) {
        return Err(unsupported(format!("{KEY}.{TRANSFORMS}: transforms of inputs")));
    }
    let format = values.get("format").and_then(Value::as_str).unwrap_or("?");
    let wanted: Vec<(&str, Value)> = match format {
        "pack-quantized" => vec![
            ("num_bits", 4.into()),
            ("type", "int".into()),
            ("symmetric", true.into()),
            ("strategy", "group".into()),
            ("actorder", Value::Null),
        ],
        "nvfp4-pack-quantized" => {
            vec![("num_bits", 4.into()), ("type", "float".into()), ("strategy", "tensor_group".into())]
        }
        _ => {
            let known = "nvfp4-pack-quantized, pack-quantized";
            return Err(unsupported(format!("{KEY}.format {format:?} (known: {known})")));
        }
    };
    let groups = values.get("config_groups").and_then(Value::as_object);
    let weights = groups.into_iter().flatten().map(|(name, group)| (name, &group["weights"]));
    let mut size = None;
    for (name, weights) in weights {
        let name = format!("{KEY}.config_groups.{name}.weights");
        for (key, wanted) in &wanted {
            if weights[*key] != *wanted {
                return Err(unsupported(format!("{name}.{key} {} (known: {wanted})", weights[*key])));
            }
        }
        let found = &weights["group_size"];
        let group = found.as_u64().filter(|group| (1..NUMBER_LIMIT).contains(group) && group.is_multiple_of(8));
        let group = group.ok_or_else(|| ill_typed(&format!("{name}.group_size"), "a multiple of 8", found))?;
        if *size.get_or_insert(group) != group {
            return Err(unsupported(format!("{KEY}.config_groups with groups of {group} beside others")));
        }
    }
    match (format, size) {
        (_, None) => Err(ill_typed(&format!("{KEY}.config_groups"), "groups of layers", &Value::Null)),
        ("pack-quantized", Some(group)) => Ok(Quantisation::Int4 { group: group as usize }),
        (_, Some(16)) => Ok(Quantisation::Nvfp4(Nvfp4Layout::CompressedTensors)),
        (_, Some(group)) => Err(unsupported(format!("{KEY}: NVFP4 in groups of {group} (known: 16)"))),
    }
}

/// A value of the file as text for a message.
fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".to_owned(), |value| value.to_string().chars().take(60).collect())
}

/// The error for a key of a wrong type.
pub(super) fn ill_typed(key: &str, wanted: &str, found: &Value) -> WorkerError {
    let found = if found.is_null() { "nothing".to_owned() } else { found.to_string().chars().take(60).collect() };
    WorkerError::new(FailureKind::Checkpoint, format!("config.json: {key:?} should be {wanted}, found {found}"))
}

/// The error for an unsupported setting.
pub(super) fn unsupported(what: String) -> WorkerError {
    WorkerError::new(FailureKind::Unsupported, format!("config.json asks for {what}, which is not supported"))
}

#[cfg(test)]
mod tests;
