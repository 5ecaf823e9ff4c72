//! All figures of `llm8 footprint`; serialised, it is what `--json` writes.

use std::collections::BTreeMap;

use int8_models::{
    CacheDtype, Component, Footprint, Int8Options, LongestContext, Precision, TensorHeaders, WeightBytes,
};
use serde::Serialize;

use crate::machine;

/// Bytes beside weights and cache: activations, attention scores, and what the program or a GPU's
/// driver takes for itself.
const OVERHEAD: u64 = 500_000_000;

/// The tokens that the cache is counted for, unless asked otherwise.
const CONTEXT: usize = 2048;

/// One value for each precision.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct ByPrecision<T> {
    pub f32: T,
    /// bf16 takes the same.
    pub f16: T,
    pub int8: T,
    pub int8_head: T,
}

/// What the precisions are called.
pub const PRECISIONS: [&str; 4] = ["f32", "f16, bf16", "int8", "int8 + head"];

impl<T> ByPrecision<T> {
    fn each(value: impl Fn(&Precision) -> T) -> Self {
        let int8 = |head| Precision::Int8(Int8Options { head, ..Int8Options::default() });
        Self {
            f32: value(&Precision::F32),
            f16: value(&Precision::F16),
            int8: value(&int8(false)),
            int8_head: value(&int8(true)),
        }
    }

    /// In the order of [`PRECISIONS`].
    pub fn each_ref(&self) -> [&T; 4] {
        [&self.f32, &self.f16, &self.int8, &self.int8_head]
    }
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub architecture: &'static str,
    pub parameters: u64,
    pub precisions: ByPrecision<Weights>,
    /// 16 bits a parameter against int8.
    pub ratio_f16_int8: f64,
    /// What the cache is counted in; GPUs hold it in f16 where this is of integers.
    pub cache_dtype: &'static str,
    pub kv_cache_bytes_per_1000_tokens: u64,
    pub longest_context: Context,
    /// Whether the model cannot go beyond its longest context.
    pub longest_context_is_a_limit: bool,
    /// What the cache is counted for below.
    pub context: Context,
    pub overhead_bytes: u64,
    /// Weights, the cache of `context`, and overhead.
    pub needed_bytes: ByPrecision<u64>,
    /// Null where the system does not tell.
    pub machine: Option<Machine>,
    /// The first CUDA device of this machine; null where there is none, or in a build without CUDA.
    pub device: Option<LocalDevice>,
    pub gpus: Vec<Gpu>,
    /// Null where the weights are not here, or not all of them.
    pub disk: Option<Disk>,
}

/// The weights in one precision.
#[derive(Debug, Serialize)]
pub struct Weights {
    pub total_bytes: u64,
    pub components: BTreeMap<&'static str, u64>,
}

impl From<WeightBytes> for Weights {
    fn from(bytes: WeightBytes) -> Self {
        let components = Component::ALL.map(|component| (component.key(), bytes.of(component)));
        Self { total_bytes: bytes.total(), components: components.into() }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Context {
    pub tokens: usize,
    pub kv_cache_bytes: u64,
}

/// This machine's main memory.
#[derive(Debug, Serialize)]
pub struct Machine {
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// Whether what is needed is available.
    pub holds: ByPrecision<bool>,
}

/// A CUDA device of this machine.
#[derive(Debug, Serialize)]
pub struct LocalDevice {
    /// What it calls itself.
    pub name: String,
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// Whether what is needed is free.
    pub holds: ByPrecision<bool>,
}

/// A kind of GPU.
#[derive(Debug, Serialize)]
pub struct Gpu {
    pub name: &'static str,
    pub memory_bytes: u64,
    /// How many of them hold the model; null where a single block is too large for one.
    pub needed: ByPrecision<Option<u64>>,
}

/// The weight files.
#[derive(Debug, Serialize)]
pub struct Disk {
    pub files: Vec<String>,
    pub tensors: usize,
    pub bytes: u64,
    /// Of the tensors in each dtype.
    pub bytes_by_dtype: BTreeMap<String, u64>,
    pub is_int8: bool,
}

impl Report {
    /// With the cache of `context` tokens, or of as many as is usual, in `dtype`.
    pub fn new(
        model: String,
        footprint: &Footprint,
        headers: Option<&TensorHeaders>,
        context: Option<u32>,
        dtype: CacheDtype,
    ) -> Self {
        let longest = footprint.longest_context();
        let tokens = context.map_or(CONTEXT.min(longest.tokens()), |tokens| tokens as usize);
        let cache = |tokens| Context { tokens, kv_cache_bytes: footprint.kv_cache(tokens, dtype) };
        let context = cache(tokens);
        let needed_with = |dtype| {
            let besides = footprint.kv_cache(tokens, dtype) + OVERHEAD;
            move |precision: &Precision| footprint.weights(precision).total() + besides
        };
        let needed = needed_with(dtype);
        let on_gpus = if dtype.is_integer() { CacheDtype::F16 } else { dtype };
        let needed_on_gpu = needed_with(on_gpus);
        let on = |memory: u64| {
            move |precision: &Precision| footprint.devices(precision, tokens, on_gpus, memory.checked_sub(OVERHEAD)?)
        };
        let int8_bytes = footprint.weights(&Precision::default()).total();
        Self {
            model,
            architecture: footprint.architecture(),
            parameters: footprint.parameters(),
            precisions: ByPrecision::each(|precision| footprint.weights(precision).into()),
            ratio_f16_int8: footprint.bytes_at_16_bits() as f64 / int8_bytes as f64,
            cache_dtype: dtype.name(),
            kv_cache_bytes_per_1000_tokens: footprint.kv_cache(1000, dtype),
            longest_context: cache(longest.tokens()),
            longest_context_is_a_limit: matches!(longest, LongestContext::Positions(_)),
            context,
            overhead_bytes: OVERHEAD,
            needed_bytes: ByPrecision::each(&needed),
            machine: machine::memory().map(|memory| Machine {
                total_bytes: memory.total,
                available_bytes: memory.available,
                holds: ByPrecision::each(|precision| needed(precision) <= memory.available),
            }),
            device: machine::local_device().map(|(name, memory)| LocalDevice {
                name,
                total_bytes: memory.total as u64,
                free_bytes: memory.free as u64,
                holds: ByPrecision::each(|precision| needed_on_gpu(precision) <= memory.free as u64),
            }),
            gpus: machine::GPUS
                .iter()
                .map(|gpu| Gpu {
                    name: gpu.name,
                    memory_bytes: gpu.bytes(),
                    needed: ByPrecision::each(on(gpu.bytes())),
                })
                .collect(),
            disk: headers.map(|headers| {
                let bytes_by_dtype = headers.bytes_by_dtype();
                Disk {
                    files: headers.files().iter().map(|file| file.display().to_string()).collect(),
                    tensors: headers.len(),
                    bytes: bytes_by_dtype.values().sum(),
                    bytes_by_dtype,
                    is_int8: headers.is_int8(),
                }
            }),
        }
    }

    /// How many times smaller than with 16 bits a parameter each precision is, in words; none for f32,
    /// which is larger.
    pub fn ratios(&self) -> [String; 4] {
        let sixteen_bits = self.ratio_f16_int8 * self.precisions.int8.total_bytes as f64;
        let ratio = |weights: &Weights| format!("{:.2}x", sixteen_bits / weights.total_bytes as f64);
        let ByPrecision { f16, int8, int8_head, .. } = &self.precisions;
        [String::new(), ratio(f16), ratio(int8), ratio(int8_head)]
    }
}
