//! One row a test; serialised, it is what `--json` and `--csv` write.

use int8_models::{Loaded, Precision};
use int8_ops::cpu::Kernels;
use int8_ops::device;
use int8_ops::profile::Part;
use serde::{Deserialize, Serialize};

use super::limits::Limits;
use super::measure::{Figures, Test};
use crate::commands::model;
use crate::output;

/// What a test has found.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub model: String,
    /// Whether the weights are random ones.
    pub dummy_weights: bool,
    pub precision: String,
    pub int8_head: bool,
    /// What keys and values are cached in: `int16`, `f16` and so on.
    pub cache_dtype: String,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// What a CUDA device calls itself; null for the CPU.
    pub device_name: Option<String>,
    pub threads: usize,
    pub instruction_set: String,
    /// `prefill` or `decode`.
    pub test: String,
    pub batch: usize,
    /// 0 in `decode`, as `gen_len` and `context` are in `prefill`.
    pub prompt_len: usize,
    pub gen_len: usize,
    /// Tokens in the cache before the first that is generated.
    pub context: usize,
    pub repetitions: usize,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// `tokens/s`, of all sequences of the batch together.
    pub unit: String,
    /// What the machine's limit allows, in the same unit; null where it is not known.
    pub limit: Option<f64>,
    /// The median of what share each repetition reached of the limits measured around it.
    pub share_of_limit: Option<f64>,
    /// The same in the time of what is bounded by the limit alone: the linear layers' products, and the head's unless
    /// `int8_dot_peak` is the limit. Null on a CUDA device, as what follows.
    pub products_share_of_limit: Option<f64>,
    /// The median share of a repetition's time that these took.
    pub bounded_share: Option<f64>,
    /// The linear layers' products, from codes to outputs, with the activation functions and residuals that follow; as
    /// of those below, the median share of a repetition's time. What they leave is between the ops.
    pub products_share: Option<f64>,
    /// From the last hidden state to the logits.
    pub head_share: Option<f64>,
    /// Finding outlier columns, and turning activations into codes.
    pub quantize_share: Option<f64>,
    pub attention_share: Option<f64>,
    /// Writing keys and values to the cache.
    pub cache_share: Option<f64>,
    pub norm_share: Option<f64>,
    /// `int8_dot_peak` for a prompt that is not short, `read_bandwidth` for other tokens; on a CUDA device
    /// `int8_matmul_peak` and `copy_bandwidth`.
    pub limited_by: Option<String>,
    /// From a prompt to the logits of its first token; null in `decode`.
    pub first_token_seconds: Option<f64>,
    /// From one token to the next; null in `prefill`.
    pub token_seconds: Option<f64>,
    pub load_seconds: f64,
    /// Null where the system does not tell, as `peak_rss_bytes`.
    pub load_peak_rss_bytes: Option<usize>,
    /// While the test ran alone. Other models that are in memory count in all of these peaks.
    pub peak_rss_bytes: Option<usize>,
    /// What the weights have taken on a CUDA device, as it counts; null on the CPU, as the next.
    pub device_bytes: Option<usize>,
    /// The most that was taken there at a time while the test ran alone.
    pub peak_device_bytes: Option<usize>,
    pub weight_bytes: usize,
    /// The bytes of weights that a step reads: all but tables that are looked up.
    pub weight_bytes_per_token: usize,
    /// Two for each product of codes, those of the head aside.
    pub int8_operations_per_token: usize,
    /// Bytes of the model's weights that are read a second, where nothing else is done; null on a CUDA device.
    pub read_bandwidth: Option<f64>,
    /// Bytes that a copy within a CUDA device's memory reads and writes a second; null on the CPU.
    pub copy_bandwidth: Option<f64>,
    /// Operations a second; null where the instruction set has no dot product of codes, and on a CUDA device.
    pub int8_dot_peak: Option<f64>,
    /// Operations a second of NVIDIA's libraries with large matrices of codes; null on the CPU.
    pub int8_matmul_peak: Option<f64>,
    /// The same in f16.
    pub f16_matmul_peak: Option<f64>,
}

/// What is known of a model once it is loaded.
#[derive(Debug)]
pub struct Load {
    dummy_weights: bool,
    device: String,
    device_name: Option<String>,
    seconds: f64,
    peak_rss_bytes: Option<usize>,
    device_bytes: Option<usize>,
    weight_bytes: usize,
    weight_bytes_per_token: usize,
    int8_operations_per_token: usize,
}

impl Load {
    /// To be called before anything else takes memory.
    pub fn new(dummy_weights: bool, loaded: &Loaded) -> Self {
        Self {
            dummy_weights,
            device: device::label(loaded.model.device()),
            device_name: device::name(loaded.model.device()),
            seconds: loaded.duration.as_secs_f64(),
            peak_rss_bytes: output::peak_rss_bytes(),
            device_bytes: loaded.device_bytes,
            weight_bytes: loaded.ledger.bytes(),
            weight_bytes_per_token: loaded.ledger.bytes_per_token(),
            int8_operations_per_token: 2 * loaded.ledger.int8_products_per_token(),
        }
    }
}

impl Row {
    pub fn new(model: &str, precision: &Precision, load: &Load, figures: &Figures) -> Self {
        let limits = Limits::median(&figures.limits);
        let speed = figures.tokens_per_second();
        let seconds = figures.median_seconds();
        let batch = figures.test.batch();
        // A pass reads the weights once for all its tokens, each of which has its own products.
        let by_bytes = |limits: &Limits, tokens: usize| {
            let bytes = load.weight_bytes_per_token as f64;
            limits.bandwidth().map(|(name, bandwidth)| (name, bandwidth / bytes * tokens as f64))
        };
        let by_operations = |limits: &Limits| {
            let operations = load.int8_operations_per_token as f64;
            limits.int8_peak().filter(|_| operations > 0.0).map(|(name, peak)| (name, peak / operations))
        };
        let limit_by = |limits: &Limits| match figures.test {
            // The lower one; of floats the peak is not known.
            Test::Prefill { prompt_len, .. } => {
                by_operations(limits).map(|peak| match by_bytes(limits, batch * prompt_len) {
                    Some(read) if read.1 < peak.1 => read,
                    _ => peak,
                })
            }
            Test::Decode { .. } => by_bytes(limits, batch),
        };
        let (limited_by, limit) = limit_by(&limits).unzip();
        // The head reads its weight, but for one token of a prompt alone.
        let is_by_operations = limited_by.is_some() && limited_by == limits.int8_peak().map(|(name, _)| name);
        let bounded: &[Part] = if is_by_operations { &[Part::Products] } else { &[Part::Products, Part::Head] };
        let (test, prompt_len, gen_len, context) = match figures.test {
            Test::Prefill { prompt_len, .. } => ("prefill", prompt_len, 0, 0),
            Test::Decode { context, gen_len, .. } => ("decode", 0, gen_len, context),
        };
        let is_prefill = gen_len == 0;
        let share_of = |part| figures.share_of_time(&[part]);
        Self {
            model: model.to_string(),
            dummy_weights: load.dummy_weights,
            precision: precision.name().to_string(),
            int8_head: model::has_int8_head(precision),
            cache_dtype: figures.cache_dtype.name().to_string(),
            device: load.device.clone(),
            device_name: load.device_name.clone(),
            threads: rayon::current_num_threads(),
            instruction_set: Kernels::active().name.to_string(),
            test: test.to_string(),
            batch,
            prompt_len,
            gen_len,
            context,
            repetitions: figures.seconds.len(),
            median: speed.median,
            min: speed.min,
            max: speed.max,
            unit: "tokens/s".to_string(),
            limit,
            share_of_limit: figures.share(|limits| limit_by(limits).map(|(_, limit)| limit)),
            products_share_of_limit: figures.share_in(bounded, |limits| limit_by(limits).map(|(_, limit)| limit)),
            bounded_share: figures.share_of_time(bounded),
            products_share: share_of(Part::Products),
            head_share: share_of(Part::Head),
            quantize_share: share_of(Part::Quantize),
            attention_share: share_of(Part::Attention),
            cache_share: share_of(Part::Cache),
            norm_share: share_of(Part::Norm),
            limited_by: limited_by.map(str::to_string),
            first_token_seconds: is_prefill.then_some(seconds),
            token_seconds: (!is_prefill).then(|| seconds / gen_len as f64),
            load_seconds: load.seconds,
            load_peak_rss_bytes: load.peak_rss_bytes,
            peak_rss_bytes: figures.peak_rss_bytes,
            device_bytes: load.device_bytes,
            peak_device_bytes: figures.peak_device_bytes,
            weight_bytes: load.weight_bytes,
            weight_bytes_per_token: load.weight_bytes_per_token,
            int8_operations_per_token: load.int8_operations_per_token,
            read_bandwidth: limits.read_bandwidth,
            copy_bandwidth: limits.copy_bandwidth,
            int8_dot_peak: limits.int8_dot_peak,
            int8_matmul_peak: limits.int8_matmul_peak,
            f16_matmul_peak: limits.f16_matmul_peak,
        }
    }
}
