//! The configuration classes of transformers as data: defaults of absent keys, nullable keys, and
//! aliases.
//!
//! `tests/oracle.py classes` generates the data from transformers, and reports differences.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Attributes and defaults of every class, by name.
static CLASSES: LazyLock<BTreeMap<String, Class>> = LazyLock::new(|| {
    let mut classes: BTreeMap<String, Class> =
        serde_json::from_str(include_str!("classes.json")).expect("the data that ships with the program: tested");
    classes.iter_mut().for_each(|(name, class)| class.name.clone_from(name));
    classes
});

/// A configuration class.
#[derive(Debug, Deserialize)]
pub(in crate::model::arch) struct Class {
    #[serde(skip)]
    pub(in crate::model::arch) name: String,
    /// Attributes with their defaults.
    attributes: Map<String, Value>,
    /// Attributes that may be null.
    nullable: Vec<String>,
    /// `attribute_map`: pairs of names of one attribute.
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    /// `rope_parameters` of a configuration without rotation settings.
    #[serde(default, rename = "rope_parameters")]
    pub(in crate::model::arch) rope: Map<String, Value>,
}

impl Class {
    /// The class with this transformers name.
    pub(in crate::model::arch) fn of(name: &str) -> &'static Self {
        CLASSES.get(name).expect("a family names a class of the data: tested for each")
    }

    /// Attributes of all classes.
    fn base() -> &'static Self {
        Self::of("PreTrainedConfig")
    }

    /// All names of a setting, `key` first.
    pub(super) fn names<'k>(&'k self, key: &'k str) -> impl Iterator<Item = &'k str> {
        let other = move |(a, b): (&'k String, &'k String)| match key {
            _ if key == a => Some(b.as_str()),
            _ if key == b => Some(a.as_str()),
            _ => None,
        };
        std::iter::once(key).chain(self.aliases.iter().filter_map(other))
    }

    /// The attribute's default; `None` if there is no such attribute.
    pub(super) fn default_of(&self, key: &str) -> Option<&Value> {
        self.names(key).find_map(|name| self.attributes.get(name)).or_else(|| Self::base().attributes.get(key))
    }

    /// Whether the class refuses null for this attribute.
    pub(super) fn refuses_null(&self, key: &str) -> bool {
        let nullable = |class: &Self| self.names(key).any(|name| class.nullable.iter().any(|n| n == name));
        self.default_of(key).is_some() && !nullable(self) && !nullable(Self::base())
    }

    /// Names of all attributes, those of every class included.
    #[cfg(test)]
    pub(in crate::model::arch) fn attributes(&self) -> impl Iterator<Item = &str> {
        self.attributes.keys().chain(Self::base().attributes.keys()).map(String::as_str)
    }
}
