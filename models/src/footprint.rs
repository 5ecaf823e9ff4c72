//! The bytes that a model takes, computed from its config.json alone: by component for any precision,
//! its cache for any number of tokens, and the devices that hold both.
//!
//! The bytes are those that loading enters in the [`Ledger`](crate::Ledger), to the byte.

use candle_core::DType;
use int8_ops::CacheDtype;

use crate::attention::KvCache;
use crate::checkpoint::TensorHeaders;
use crate::config::Config;
use crate::error::Result;
use crate::folder::ModelFolder;
use crate::load::Family;
use crate::outline::{Component, LongestContext, Outline, Parameter, Parameters, Role};
use crate::precision::{Int8Options, Precision, is_skipped};
use crate::quantization_config::StoredInt8;

/// The sizes of a model.
#[derive(Debug)]
pub struct Footprint {
    architecture: &'static str,
    outline: Outline,
    /// What the checkpoint says of itself if it was saved in int8.
    stored_int8: Option<StoredInt8>,
}

impl Footprint {
    /// The sizes of the model in `folder`, of which only config.json is read.
    ///
    /// Errors as loading does when there is no config.json, or one that makes no sense.
    pub fn of(folder: &ModelFolder) -> Result<Self> {
        let config = Config::read(folder)?;
        let family = Family::of(&config)?;
        let outline = family.outline(&config)?;
        Ok(Self { architecture: family.name(), outline, stored_int8: config.stored_int8()? })
    }

    /// `bloom` or `opt`.
    pub fn architecture(&self) -> &'static str {
        self.architecture
    }

    /// The number of the model's parameters; an embedding that is the head too counts once.
    pub fn parameters(&self) -> u64 {
        let Outline { outside, block, head, num_layers, .. } = &self.outline;
        let parameters = |list: &Parameters| list.iter().map(Parameter::values).sum::<u64>();
        parameters(outside) + parameters(head) + parameters(block) * *num_layers as u64
    }

    /// The bytes of the weights as they are held in memory.
    pub fn weights(&self, precision: &Precision) -> WeightBytes {
        let mut bytes = self.outside(precision);
        match self.has_equal_blocks(precision) {
            true => bytes.add(&self.block(0, precision), self.outline.num_layers as u64),
            false => (0..self.outline.num_layers).for_each(|index| bytes.add(&self.block(index, precision), 1)),
        }
        bytes
    }

    /// Bytes of the same weights with 16 bits each, as [`Ledger::bytes_at_16_bits`] counts them.
    ///
    /// [`Ledger::bytes_at_16_bits`]: crate::Ledger::bytes_at_16_bits
    pub fn bytes_at_16_bits(&self) -> u64 {
        self.parameters() * DType::F16.size_in_bytes() as u64
    }

    /// Bytes of the keys and values of so many tokens.
    pub fn kv_cache(&self, tokens: usize, dtype: CacheDtype) -> u64 {
        let Outline { num_layers, num_heads, hidden_size, .. } = self.outline;
        let per_token = KvCache::bytes_per_token(num_layers, num_heads, hidden_size / num_heads, dtype);
        (per_token as u64).saturating_mul(tokens as u64)
    }

    /// The longest sequence that the model is for.
    pub fn longest_context(&self) -> LongestContext {
        self.outline.context
    }

    /// How many devices, with `memory` bytes each, hold the weights and the cache of so many tokens in `dtype`:
    /// blocks are kept whole, with their part of the cache, and what is outside of them is on the first
    /// device. `None` where a part is too large for any of them.
    pub fn devices(&self, precision: &Precision, tokens: usize, dtype: CacheDtype, memory: u64) -> Option<u64> {
        let cache = self.kv_cache(tokens, dtype) / self.outline.num_layers as u64;
        let mut free = memory.checked_sub(self.outside(precision).total())?;
        let mut devices = 1;
        let first_block = self.block(0, precision).total();
        for index in 0..self.outline.num_layers {
            let block =
                if self.has_equal_blocks(precision) { first_block } else { self.block(index, precision).total() };
            let needed = block.saturating_add(cache);
            if needed > free {
                devices += 1;
                free = memory;
            }
            free = free.checked_sub(needed)?;
        }
        Some(devices)
    }

    /// Checks what weight files say of their tensors against the config, as loading would: errors name
    /// the first tensor that is missing, or is of another shape or dtype than it should be.
    pub fn check(&self, headers: &TensorHeaders) -> Result<()> {
        headers.check(&self.outline)
    }

    /// The bytes of what is outside of the blocks.
    fn outside(&self, precision: &Precision) -> WeightBytes {
        let mut bytes = WeightBytes::default();
        let prefix = self.outline.prefixes[0];
        self.outline.outside.iter().for_each(|parameter| self.enter(&mut bytes, parameter, prefix, precision));
        self.outline.head.iter().for_each(|parameter| self.enter(&mut bytes, parameter, "", precision));
        bytes
    }

    /// The bytes of one block.
    fn block(&self, index: usize, precision: &Precision) -> WeightBytes {
        let mut bytes = WeightBytes::default();
        let prefix = format!("{}{}.{index}.", self.outline.prefixes[0], self.outline.blocks);
        self.outline.block.iter().for_each(|parameter| self.enter(&mut bytes, parameter, &prefix, precision));
        bytes
    }

    /// Whether every block takes the same: they differ by the modules that are skipped in them.
    fn has_equal_blocks(&self, precision: &Precision) -> bool {
        let is_stored_equal = self.stored_int8.as_ref().is_none_or(|stored| stored.skip_modules.is_empty());
        let is_equal = |options: &Int8Options| options.skip_modules.is_empty() && is_stored_equal;
        !matches!(precision, Precision::Int8(options) if !is_equal(options))
    }

    /// Enters a parameter as `Weights` loads it.
    fn enter(&self, bytes: &mut WeightBytes, parameter: &Parameter, prefix: &str, precision: &Precision) {
        let stored = self.stored_int8.as_ref();
        let is_int8 = match (precision, parameter.role) {
            (Precision::Int8(options), Role::Linear) => {
                let module = format!("{prefix}{}", parameter.module);
                !options.skips(&module) && stored.is_none_or(|stored| !is_skipped(&module, &stored.skip_modules))
            }
            (Precision::Int8(options), Role::Embedding) => {
                options.has_int8_head(stored.is_some_and(|stored| stored.has_int8_head))
            }
            _ => false,
        };
        if is_int8 {
            bytes.0[parameter.component as usize] += parameter.values();
            bytes.0[Component::Scales as usize] += (parameter.shape[0] * DType::F32.size_in_bytes()) as u64;
            return;
        }
        let dtype = if *precision == Precision::F32 { DType::F32 } else { DType::F16 };
        bytes.0[parameter.component as usize] += parameter.values() * dtype.size_in_bytes() as u64;
    }
}

/// Bytes of weights, by component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightBytes([u64; Component::ALL.len()]);

impl WeightBytes {
    /// The bytes of one component.
    pub fn of(&self, component: Component) -> u64 {
        self.0[component as usize]
    }

    /// The bytes of all components.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    fn add(&mut self, other: &Self, times: u64) {
        self.0.iter_mut().zip(other.0).for_each(|(bytes, other)| *bytes += other * times);
    }
}
