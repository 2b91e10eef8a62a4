//! Reads rotation settings as transformers' `RotaryEmbeddingConfigMixin` does
//! (`modeling_rope_utils.py`).

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{Config, ill_typed, unsupported};
use crate::error::Result;
use crate::model::rope::{Pairing, RopeScaling, RopeSpec};

/// Keys that some kind of rotation reads.
const KNOWN: [&str; 16] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "attention_factor",
    // Assigns pairs to three positions, which are equal for text.
    "mrope_section",
    "mrope_interleaved",
];
/// The key of the rotating share of a head.
const PARTIAL: &str = "partial_rotary_factor";

/// The rotation settings: `rope_scaling`, transformers 5's `rope_parameters`, or the class's
/// default.
pub(in crate::model::arch) struct RopeSettings<'a> {
    key: &'static str,
    values: Cow<'a, Map<String, Value>>,
    /// Whether they are those of one kind of layers.
    of_kind: bool,
}

impl RopeSettings<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.key)
    }

    /// A number; `None` if null or absent.
    pub(in crate::model::arch) fn number_opt(&self, key: &str) -> Result<Option<f64>> {
        let number = |value: &Value| value.as_f64().ok_or_else(|| ill_typed(&self.name(key), "a number", value));
        self.values.get(key).filter(|value| !value.is_null()).map(number).transpose()
    }

    /// A required number.
    pub(in crate::model::arch) fn number(&self, key: &str) -> Result<f64> {
        self.number_opt(key)?.ok_or_else(|| ill_typed(&self.name(key), "a number", &Value::Null))
    }

    /// A number; `None` if absent, null or 0, as Python's truth value.
    pub(in crate::model::arch) fn nonzero(&self, key: &str) -> Result<Option<f64>> {
        Ok(self.number_opt(key)?.filter(|number| *number != 0.0))
    }

    /// `rope_type`, or `type` in older files.
    pub(in crate::model::arch) fn kind(&self) -> Result<&str> {
        let Some((key, value)) = ["rope_type", "type"].iter().find_map(|key| Some((key, self.values.get(*key)?)))
        else {
            return Ok("default");
        };
        value.as_str().ok_or_else(|| ill_typed(&self.name(key), "a word", value))
    }

    /// The truth value of a switch that is true by default. transformers does not read it from the
    /// settings of one kind of layers.
    fn truncates(&self) -> Result<bool> {
        match self.values.get("truncate") {
            None | Some(Value::Bool(true)) => Ok(true),
            Some(_) if self.of_kind => Err(unsupported(format!("{} other than true", self.name("truncate")))),
            Some(Value::Null) => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| ill_typed(&self.name("truncate"), "true or false", value)),
        }
    }
}

/// A kind of layers, if each kind has a separate rotation.
pub(in crate::model::arch) struct RopeKind {
    /// Its name in `layer_types`.
    pub(in crate::model::arch) kind: &'static str,
    /// The key of its settings.
    pub(in crate::model::arch) key: &'static str,
    /// The key of the frequency base in older files, if the class reads those.
    pub(in crate::model::arch) theta: Option<&'static str>,
    /// Whether `rope_scaling` of older files applies to it.
    pub(in crate::model::arch) is_scaled: bool,
}

impl<'a> Config<'a> {
    /// Rotary embedding of heads of width `head_dim` in layers of one kind.
    ///
    /// # Errors
    /// As [`rope`](Self::rope).
    pub(in crate::model::arch) fn rope_of_kind(&self, of: &RopeKind, head_dim: usize) -> Result<RopeSpec> {
        let object = |key: &str| match self.raw(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_object().map(Some).ok_or_else(|| ill_typed(&self.name(key), "an object", value)),
        };
        let class = self.class.rope.get(of.kind).and_then(Value::as_object);
        let all = object("rope_parameters")?;
        if let Some((key, _)) = all.into_iter().flatten().find(|(_, value)| !value.is_object() && !value.is_null()) {
            return Err(unsupported(format!("rope_parameters.{key} beside rotations for each kind of layer")));
        }
        let told = all.and_then(|all| all.get(of.kind)).and_then(Value::as_object);
        let mut values = told.or(class).cloned().unwrap_or_default();
        let scaling = object("rope_scaling")?.filter(|_| of.is_scaled);
        values.extend(scaling.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        let has_theta = [told, scaling].into_iter().flatten().any(|own| own.contains_key("rope_theta"));
        let settings = RopeSettings { key: of.key, values: Cow::Owned(values), of_kind: true };
        let old = of.theta.and_then(|key| Some((key, self.raw(key)?))).filter(|_| !has_theta);
        let theta = match old {
            Some((key, value)) => value.as_f64().ok_or_else(|| ill_typed(&self.name(key), "a number", value))?,
            None => {
                let default = of.theta.and(class).and_then(|class| class.get("rope_theta")?.as_f64());
                let theta = settings.number_opt("rope_theta")?.or(default);
                theta.ok_or_else(|| ill_typed(&settings.name("rope_theta"), "a number", &Value::Null))?
            }
        };
        self.look_at(&settings)?;
        let part = settings.number_opt(PARTIAL)?.unwrap_or(1.0);
        let scaling = match settings.kind()? {
            "proportional" if settings.number_opt("factor")?.is_none_or(|factor| factor == 1.0) => {
                RopeScaling::Proportional { part }
            }
            _ if part != 1.0 => return Err(unsupported(format!("{}.{PARTIAL} {part}", of.key))),
            _ => self.rope_scaling(&settings)?,
        };
        Ok(RopeSpec { theta, dims: head_dim, pairing: Pairing::Halves, scaling })
    }

    /// The rotation settings. `rope_scaling` has priority over `rope_parameters` unless it is
    /// empty.
    pub(in crate::model::arch) fn rope_settings(&self) -> Result<RopeSettings<'a>> {
        let object = |key: &'static str| match self.raw(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(values)) => {
                Ok(Some(RopeSettings { key, values: Cow::Borrowed(values), of_kind: false }))
            }
            Some(other) => Err(ill_typed(key, "an object", other)),
        };
        let (scaling, parameters) = (object("rope_scaling")?, object("rope_parameters")?);
        if let Some(settings) = scaling.filter(|settings| !settings.values.is_empty()).or(parameters) {
            self.look_at(&settings)?;
            return Ok(settings);
        }
        let mut values = self.class.rope.clone();
        // These two are read from the configuration even if the rest is the class's default.
        values.retain(|key, _| key != "rope_theta" && key != PARTIAL);
        Ok(RopeSettings { key: "rope_parameters", values: Cow::Owned(values), of_kind: false })
    }

    fn look_at(&self, settings: &RopeSettings<'_>) -> Result<()> {
        if let Some((key, _)) = settings.values.iter().find(|(_, value)| value.is_object()) {
            return Err(unsupported(format!("{}: a rotation for one kind of layer", settings.name(key))));
        }
        let unknown = settings.values.keys().filter(|key| !KNOWN.contains(&key.as_str()));
        self.unknown.borrow_mut().extend(unknown.map(|key| settings.name(key)));
        Ok(())
    }

    /// Rotary embedding of heads of width `head_dim`, pairing halves.
    ///
    /// # Errors
    /// A setting is missing or of a wrong type (the message names it); an unknown kind of
    /// rotation.
    pub fn rope(&self, head_dim: usize) -> Result<RopeSpec> {
        self.rope_of_part(head_dim, self.class.rope.get(PARTIAL).and_then(Value::as_f64))
    }

    /// As [`rope`](Self::rope), if `part` of a head rotates by default; `None`: the whole head,
    /// always.
    ///
    /// # Errors
    /// As [`rope`](Self::rope).
    pub fn rope_of_part(&self, head_dim: usize, part: Option<f64>) -> Result<RopeSpec> {
        let settings = self.rope_settings()?;
        let dims = (head_dim as f64 * self.rotated_part(&settings, part)?) as usize;
        let scaling = self.rope_scaling(&settings)?;
        Ok(RopeSpec { theta: self.rope_theta(&settings)?, dims, pairing: Pairing::Halves, scaling })
    }

    fn rope_scaling(&self, settings: &RopeSettings<'_>) -> Result<RopeScaling> {
        Ok(match settings.kind()? {
            "default" => RopeScaling::None,
            // It extrapolates only beyond `max_position_embeddings`, which no sequence exceeds.
            "dynamic" => settings.number("factor").map(|_| RopeScaling::None)?,
            "linear" => RopeScaling::Linear { factor: settings.number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: settings.number("factor")?,
                low_freq_factor: settings.number("low_freq_factor")?,
                high_freq_factor: settings.number("high_freq_factor")?,
                original_positions: self.original_positions(settings)?,
            },
            "yarn" => self.yarn(settings)?,
            other => {
                let known = "default, dynamic, linear, llama3, yarn";
                return Err(unsupported(format!("rope type {other:?} in {} (known: {known})", settings.key)));
            }
        })
    }

    fn yarn(&self, settings: &RopeSettings<'_>) -> Result<RopeScaling> {
        let original_positions = self.original_positions(settings)?;
        let factor = match settings.values.get("factor") {
            Some(Value::Null) => self.count("max_position_embeddings")? as f64 / original_positions,
            _ => settings.number("factor")?,
        };
        // The factor is from the paper's section 3.4. DeepSeek's two keys cancel it, since its
        // softmax includes it.
        let by_paper = match (settings.nonzero("mscale")?, settings.nonzero("mscale_all_dim")?) {
            (Some(own), Some(all)) => yarn_magnitude(factor, own) / yarn_magnitude(factor, all),
            _ => yarn_magnitude(factor, 1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_positions,
            beta_fast: settings.nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: settings.nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: settings.truncates()?,
            attention_factor: settings.number_opt("attention_factor")?.unwrap_or(by_paper),
        })
    }

    fn rope_theta(&self, settings: &RopeSettings<'_>) -> Result<f64> {
        if settings.values.contains_key("rope_theta") {
            return settings.number("rope_theta");
        }
        match self.raw("rope_theta") {
            Some(value) => value.as_f64().ok_or_else(|| ill_typed(&self.name("rope_theta"), "a number", value)),
            None => {
                let default = &self.class.rope["rope_theta"];
                self.assume("rope_theta", default);
                Ok(default.as_f64().expect("a number in the data: tested"))
            }
        }
    }

    fn rotated_part(&self, settings: &RopeSettings<'_>, default: Option<f64>) -> Result<f64> {
        let part = if settings.values.contains_key(PARTIAL) {
            settings.number(PARTIAL)?
        } else {
            match (self.raw(PARTIAL), default) {
                (Some(Value::Null), _) | (None, None) => 1.0,
                (Some(value), _) => value.as_f64().ok_or_else(|| ill_typed(&self.name(PARTIAL), "a number", value))?,
                (None, Some(part)) => {
                    self.assume(PARTIAL, &part.into());
                    part
                }
            }
        };
        if default.is_none() && part != 1.0 {
            return Err(unsupported(format!("{PARTIAL} {part} ({} rotates whole heads)", self.class.name)));
        }
        Ok(part)
    }

    /// Positions of the pre-training: of the configuration, which does not count for one kind of
    /// layers, of the rotation's settings, else all positions.
    fn original_positions(&self, settings: &RopeSettings<'_>) -> Result<f64> {
        const KEY: &str = "original_max_position_embeddings";
        let of_all = if settings.of_kind { None } else { self.raw(KEY) };
        match of_all {
            Some(value) => value.as_f64().ok_or_else(|| ill_typed(&self.name(KEY), "a number", value)),
            None if settings.values.contains_key(KEY) => settings.number(KEY),
            None => Ok(self.count("max_position_embeddings")? as f64),
        }
    }
}

/// YaRN's factor of queries and keys: `0.1 * mscale * ln(factor) + 1`.
pub(in crate::model::arch) fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
