//! One run of a model in figures: ids, text, times, bytes.

use int8_models::{CacheDtype, FinishReason, Generation, Loaded, Precision};
use int8_ops::device;
use serde::Serialize;

use crate::output;

/// What `--json` writes of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub precision: &'static str,
    /// What keys and values were cached in; null when interrupted before the first.
    pub cache_dtype: Option<&'static str>,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// What a CUDA device calls itself; null for the CPU.
    pub device_name: Option<String>,
    pub prompt_ids: Vec<u32>,
    pub ids: Vec<u32>,
    pub text: String,
    pub finish_reason: &'static str,
    pub timings: Timings,
    pub memory: Memory,
}

#[derive(Debug, Serialize)]
pub struct Timings {
    pub load_seconds: f64,
    pub prompt_seconds: f64,
    pub prompt_tokens_per_second: f64,
    pub generation_seconds: f64,
    pub generation_tokens_per_second: f64,
}

#[derive(Debug, Serialize)]
pub struct Memory {
    pub weight_bytes: usize,
    pub weight_bytes_f16: usize,
    pub kv_cache_bytes: usize,
    /// Null where the system does not tell.
    pub peak_rss_bytes: Option<usize>,
    /// What the weights have taken on a CUDA device, as it counts; null on the CPU.
    pub device_bytes: Option<usize>,
    /// The most that was taken there at a time.
    pub peak_device_bytes: Option<usize>,
}

impl Report {
    pub fn new(
        model: &str,
        precision: &Precision,
        prompt_ids: &[u32],
        text: String,
        loaded: &Loaded,
        generation: &Generation,
    ) -> Self {
        let device = loaded.model.device();
        let (prompt, decode) = (generation.prompt_duration(), generation.generation_duration());
        Self {
            model: model.to_string(),
            precision: precision.name(),
            cache_dtype: generation.cache_dtype().map(CacheDtype::name),
            device: device::label(device),
            device_name: device::name(device),
            prompt_ids: prompt_ids.to_vec(),
            ids: generation.ids().to_vec(),
            text,
            finish_reason: generation.finish_reason().map_or("", FinishReason::name),
            timings: Timings {
                load_seconds: loaded.duration.as_secs_f64(),
                prompt_seconds: prompt.as_secs_f64(),
                prompt_tokens_per_second: output::rate(prompt_ids.len(), prompt),
                generation_seconds: decode.as_secs_f64(),
                // The first token comes out of the prompt's pass.
                generation_tokens_per_second: output::rate(generation.ids().len().saturating_sub(1), decode),
            },
            memory: Memory {
                weight_bytes: loaded.ledger.bytes(),
                weight_bytes_f16: loaded.ledger.bytes_at_16_bits(),
                kv_cache_bytes: generation.kv_cache_bytes(),
                peak_rss_bytes: output::peak_rss_bytes(),
                device_bytes: loaded.device_bytes,
                peak_device_bytes: device::peak_bytes(device),
            },
        }
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        let Memory { weight_bytes, weight_bytes_f16, .. } = self.memory;
        let ratio = match self.precision {
            "int8" => format!(" ({:.2}x smaller than 16-bit)", weight_bytes_f16 as f64 / weight_bytes as f64),
            _ => String::new(),
        };
        let device = if self.device == "cpu" { String::new() } else { format!(" on {}", self.device) };
        let tokens = |count: usize| if count == 1 { "1 token".to_string() } else { format!("{count} tokens") };
        let rate = |rate: f64| if rate > 0.0 { format!(", {rate:.1} tokens/s") } else { String::new() };
        format!(
            "{} weights {}{ratio}{device} · prompt {}{} · generated {}{} · {}",
            self.precision,
            output::bytes(weight_bytes),
            tokens(self.prompt_ids.len()),
            rate(self.timings.prompt_tokens_per_second),
            tokens(self.ids.len()),
            rate(self.timings.generation_tokens_per_second),
            self.finish_reason,
        )
    }
}
