//! Typed access to `config.json`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::family::Switch;
use super::{ArchError, Family};

/// `config.json` with the family that reads it.
pub(super) struct Config<'a> {
    map: &'a Map<String, Value>,
    family: &'a str,
    family_keys: Option<&'a Family>,
}

impl<'a> Config<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, family: &'a str) -> Self {
        Self { map, family, family_keys: None }
    }

    /// As `family` reads it: keys that are absent have its defaults. A null stays null.
    pub(super) fn of_family(map: &'a Map<String, Value>, family: &'a Family) -> Self {
        Self { map, family: &family.name, family_keys: Some(family) }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        let family = self.family_keys;
        let alias = || family?.aliases.get(key).and_then(|other| self.map.get(other));
        self.map.get(key).or_else(alias).or_else(|| family?.defaults.get(key))
    }

    /// The value of a key that is neither absent nor null.
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn bad(&self, key: &str, expected: &str) -> ArchError {
        let found = self.get(key).map_or("absent".to_owned(), Value::to_string);
        ArchError::BadValue { key: key.to_owned(), found, expected: expected.to_owned() }
    }

    pub(super) fn missing(&self, key: &str) -> ArchError {
        ArchError::MissingKey { key: key.to_owned(), family: self.family.to_owned() }
    }

    /// A count: a positive integer no larger than any model's, so that what is made from it fits memory.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>, ArchError> {
        let most: u64 = match key {
            "num_hidden_layers" | "first_k_dense_replace" => 10_000,
            "num_attention_heads" | "num_key_value_heads" | "head_dim" => 1 << 16,
            _ if key.contains("expert") => 1 << 20,
            _ => 1 << 30,
        };
        match self.present(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if n > 0 && n <= most => Ok(Some(n as usize)),
                _ => Err(self.bad(key, &format!("an integer from 1 to {most}"))),
            },
        }
    }

    pub(super) fn need_count(&self, key: &str) -> Result<usize, ArchError> {
        self.count(key)?.ok_or_else(|| self.missing(key))
    }

    /// A whole number that may be zero, no larger than any model's number of layers.
    pub(super) fn whole(&self, key: &str) -> Result<Option<usize>, ArchError> {
        match self.number(key)? {
            Some(n) if !(0.0..=10_000.0).contains(&n) || n.fract() != 0.0 => {
                Err(self.bad(key, "a whole number up to 10000"))
            }
            n => Ok(n.map(|n| n as usize)),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_f64().map(Some).ok_or_else(|| self.bad(key, "a number")),
        }
    }

    pub(super) fn need_number(&self, key: &str) -> Result<f64, ArchError> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    /// A positive number, `None` where the key is not named or null.
    pub(super) fn positive(&self, key: Option<&String>) -> Result<Option<f64>, ArchError> {
        let Some(key) = key else { return Ok(None) };
        match self.number(key)? {
            Some(n) if !(n > 0.0 && n.is_finite()) => Err(self.bad(key, "a positive number or null")),
            n => Ok(n),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_bool().map(Some).ok_or_else(|| self.bad(key, "true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| self.bad(key, "a string")),
        }
    }

    pub(super) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_object().map(Some).ok_or_else(|| self.bad(key, "an object or null")),
        }
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a Vec<Value>>, ArchError> {
        match self.present(key) {
            None => Ok(None),
            Some(v) => v.as_array().map(Some).ok_or_else(|| self.bad(key, "a list or null")),
        }
    }

    pub(super) fn switch(&self, switch: &Switch) -> Result<bool, ArchError> {
        match switch {
            Switch::Fixed(value) => Ok(*value),
            Switch::Key(key) => Ok(self.flag(key)?.unwrap_or(false)),
        }
    }

    /// Refuse a key that is set to something this tool does not carry.
    pub(super) fn must_be_neutral(&self, neutral: &BTreeMap<String, Value>) -> Result<(), ArchError> {
        for (key, value) in neutral {
            let same = |found: &Value| found == value || found.as_f64().is_some_and(|f| Some(f) == value.as_f64());
            if let Some(found) = self.present(key)
                && !same(found)
            {
                return Err(ArchError::Unsupported { what: format!("`{key}` {found}"), hint: None });
            }
        }
        Ok(())
    }
}
