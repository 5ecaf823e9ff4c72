//! Which files of a repository a model is made of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::config::Config;
use crate::error::Result;
use crate::folder::ModelFolder;
use crate::text;

/// How a model's weights are stored: safetensors or PyTorch's own format, in one file or in shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightForm {
    /// One file of this name.
    Single(&'static str),
    /// The shards that the index of this name lists.
    Sharded(&'static str),
}

impl WeightForm {
    /// The names that weights are published under, the preferred first.
    pub const NAMES: [Self; 4] = [
        Self::Single("model.safetensors"),
        Self::Sharded("model.safetensors.index.json"),
        Self::Single("pytorch_model.bin"),
        Self::Sharded("pytorch_model.bin.index.json"),
    ];

    /// What a folder that has none of them lacks.
    pub const WANTED: &str = "weights (model.safetensors or pytorch_model.bin, or an index and its shards)";

    /// The weights to read where several are published: never two forms of the same weights.
    pub fn choose(has: impl Fn(&str) -> bool) -> Option<Self> {
        Self::NAMES.into_iter().find(|files| has(files.name()))
    }

    /// The name of the file, or of the index.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single(name) | Self::Sharded(name) => name,
        }
    }

    /// The names of the files that hold the weights, each once; an index must be in `folder`.
    pub fn weight_files(self, folder: &ModelFolder) -> Result<Vec<String>> {
        let Self::Sharded(index) = self else { return Ok(vec![self.name().to_string()]) };
        let json = folder.read_json(index)?.unwrap_or_default();
        let shards = weight_map(&json).map_err(|problem| folder.problem(index, problem))?;
        let shards: BTreeSet<&str> = shards.into_values().collect();
        Ok(shards.into_iter().map(str::to_string).collect())
    }
}

/// The shard of every tensor, as an index lists them; an error is a sentence about the index.
pub(crate) fn weight_map(index: &Value) -> Result<BTreeMap<&str, &str>, String> {
    let Some(weight_map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err("`weight_map` is missing, wanted an object of tensor names".to_string());
    };
    if weight_map.is_empty() {
        return Err("`weight_map` names no tensor".to_string());
    }
    let shard_of = |(name, shard)| match Value::as_str(shard) {
        Some(shard) if Path::new(shard).file_name().is_some_and(|file| file == shard) => Ok((name, shard)),
        _ => Err(format!("tensor `{name}` is in {shard}, wanted the name of a file in this folder")),
    };
    weight_map.iter().map(|(name, shard)| shard_of((name.as_str(), shard))).collect()
}

/// The files beside the weights that are read, of those that `has` says are there: config,
/// generation config, tokenizer.
pub fn small_files(has: impl Fn(&str) -> bool) -> Vec<&'static str> {
    let tokenizer: &[&str] = if has(text::TOKENIZER) { &[text::TOKENIZER] } else { &[text::VOCABULARY, text::MERGES] };
    let always = [Config::FILE, Config::GENERATION_FILE, text::TOKENIZER_CONFIG, text::SPECIAL_TOKENS];
    always.iter().chain(tokenizer).copied().filter(|file| has(file)).collect()
}
