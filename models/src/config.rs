//! config.json, key by key, with errors that name the file and the key.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::folder::ModelFolder;

/// The largest size that is believed: no published model comes near, and sums and products of a few
/// of these cannot overflow.
const MAX_SIZE: u64 = 1 << 24;

/// A model's config.json.
#[derive(Debug)]
pub(crate) struct Config {
    file: PathBuf,
    values: Map<String, Value>,
}

impl Config {
    pub(crate) const FILE: &str = "config.json";
    pub(crate) const GENERATION_FILE: &str = "generation_config.json";

    pub(crate) fn read(folder: &ModelFolder) -> Result<Self> {
        let file = folder.file(Self::FILE);
        match folder.read_json(Self::FILE)? {
            Some(Value::Object(values)) => Ok(Self { file, values }),
            Some(_) => Err(folder.problem(Self::FILE, "is not a JSON object".to_string())),
            None => Err(Error::MissingFile { file, hint: "is this the folder of a Hugging Face model?".to_string() }),
        }
    }

    /// All that it holds.
    pub(crate) fn values(&self) -> &Map<String, Value> {
        &self.values
    }

    /// `model_type`, or the first of `architectures` where there is none.
    pub(crate) fn model_type(&self) -> Option<&str> {
        let architecture = || self.value(&["architectures"])?.1.get(0)?.as_str();
        self.value(&["model_type"]).and_then(|(_, value)| value.as_str()).or_else(architecture)
    }

    /// An unsupported architecture, with the ones that are.
    pub(crate) fn unsupported(&self, supported: &[&str]) -> Error {
        let found = self.model_type().unwrap_or("(no model_type)").to_string();
        Error::Architecture { file: self.file.clone(), found, supported: supported.join(", ") }
    }

    /// The value of the first of `keys` that is there and not null.
    fn value<'k>(&self, keys: &[&'k str]) -> Option<(&'k str, &Value)> {
        keys.iter().find_map(|key| self.values.get(*key).filter(|value| !value.is_null()).map(|value| (*key, value)))
    }

    /// A size above 0, under the first of `keys` that is there.
    pub(crate) fn size(&self, keys: &[&str]) -> Result<usize> {
        let Some((key, value)) = self.value(keys) else {
            return Err(self.problem(format!("`{}` is missing", keys.join("` or `"))));
        };
        match value.as_u64() {
            Some(size @ 1..=MAX_SIZE) => Ok(size as usize),
            _ => Err(self.problem(format!("`{key}` is {value}, wanted a whole number from 1 to {MAX_SIZE}"))),
        }
    }

    /// A number of attention heads, which must divide the hidden size.
    pub(crate) fn heads(&self, keys: &[&str], hidden_size: usize) -> Result<usize> {
        let heads = self.size(keys)?;
        if !hidden_size.is_multiple_of(heads) {
            return Err(self.problem(format!("hidden size {hidden_size} is not a multiple of {heads} heads")));
        }
        Ok(heads)
    }

    /// One of the texts in `choices`; the first when there is none.
    pub(crate) fn choice<'k>(&self, key: &str, choices: &[&'k str]) -> Result<&'k str> {
        let Some((_, value)) = self.value(&[key]) else { return Ok(choices[0]) };
        let found = choices.iter().find(|choice| value.as_str() == Some(choice));
        found.copied().ok_or_else(|| self.problem(format!("`{key}` is {value}, wanted one of {}", choices.join(", "))))
    }

    /// A size above 0, under the first of `keys` that is there, or the default when none is.
    pub(crate) fn size_or(&self, keys: &[&str], default: usize) -> Result<usize> {
        if self.value(keys).is_some() { self.size(keys) } else { Ok(default) }
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.value(&[key]) {
            None => Ok(default),
            Some((_, Value::Bool(flag))) => Ok(*flag),
            Some((_, value)) => Err(self.problem(format!("`{key}` is {value}, wanted true or false"))),
        }
    }

    /// A finite number above 0, in f32 too.
    pub(crate) fn positive(&self, key: &str, default: f64) -> Result<f64> {
        match self.value(&[key]) {
            None => Ok(default),
            Some((_, value)) => {
                match value.as_f64() {
                    Some(number) if number as f32 > 0.0 && (number as f32).is_finite() => Ok(number),
                    _ => Err(self
                        .problem(format!("`{key}` is {value}, wanted a number above 0 that a 32-bit float can hold"))),
                }
            }
        }
    }

    /// Token ids under `key`: one id or a list of ids; empty when there is none.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = match self.value(&[key]) {
            None => Some(Vec::new()),
            Some((_, Value::Array(values))) => values.iter().map(id).collect(),
            Some((_, value)) => id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.problem(format!("`{key}` is {}, wanted a token id or a list of them", self.values[key])))
    }

    /// An error about this file.
    pub(crate) fn problem(&self, problem: String) -> Error {
        Error::File { file: self.file.clone(), problem, hint: None }
    }

    /// The same lookups in generation_config.json, if there is one.
    pub(crate) fn read_generation(folder: &ModelFolder) -> Result<Option<Self>> {
        match folder.read_json(Self::GENERATION_FILE)? {
            None => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Self { file: folder.file(Self::GENERATION_FILE), values })),
            Some(_) => Err(folder.problem(Self::GENERATION_FILE, "is not a JSON object".to_string())),
        }
    }
}
