//! `quantization_config` of config.json, as Transformers writes it for bitsandbytes: what an int8
//! checkpoint says of itself.

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::error::Result;
use crate::outline::HEAD;

const KEY: &str = "quantization_config";

/// What an int8 checkpoint says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredInt8 {
    /// The outlier threshold it was saved with; `None` for no decomposition.
    pub threshold: Option<f32>,
    /// The linear layers that it keeps in 16 bits, as in [`Int8Options`](crate::Int8Options).
    pub skip_modules: Vec<String>,
    /// Whether the embedding and the head are in int8 too, which is a form of our own.
    pub has_int8_head: bool,
}

/// The method's name where the embedding is in int8 too.
const INT8_HEAD_METHOD: &str = "llm8";

impl Config {
    /// What the checkpoint says of itself if it was saved in int8.
    pub(crate) fn stored_int8(&self) -> Result<Option<StoredInt8>> {
        let quantization = self.values().get(KEY);
        let value = |key: &str| quantization.and_then(|values| values.get(key));
        if value("load_in_8bit").and_then(Value::as_bool) != Some(true) {
            return Ok(None);
        }
        let threshold = match value("llm_int8_threshold") {
            None | Some(Value::Null) => int8_ops::OUTLIER_THRESHOLD,
            Some(value) => match value.as_f64().map(|number| number as f32) {
                Some(number) if number >= 0.0 && number.is_finite() => number,
                _ => {
                    let problem = format!("`{KEY}.llm_int8_threshold` is {value}, wanted 0 or a number above 0");
                    return Err(self.problem(problem));
                }
            },
        };
        let skipped = value("llm_int8_skip_modules").and_then(Value::as_array).into_iter().flatten();
        let skip_modules = skipped.filter_map(Value::as_str).filter(|module| *module != HEAD).map(str::to_string);
        Ok(Some(StoredInt8 {
            threshold: (threshold > 0.0).then_some(threshold),
            skip_modules: skip_modules.collect(),
            has_int8_head: value("quant_method").and_then(Value::as_str) == Some(INT8_HEAD_METHOD),
        }))
    }

    /// The whole config with what Transformers needs to know of int8 weights: the threshold, the full
    /// names of the linear layers `kept` in 16 bits, and the dtype of everything else. With an int8
    /// head, which Transformers would take for 16-bit numbers, the method has another name, so that
    /// it refuses the checkpoint.
    pub(crate) fn with_int8(
        &self,
        threshold: Option<f32>,
        kept: &[String],
        has_int8_head: bool,
        is_bf16: bool,
    ) -> Map<String, Value> {
        // Transformers leaves the head out by itself only where no module is named.
        let skip_modules = match kept {
            [] => Value::Null,
            kept => [HEAD].into_iter().chain(kept.iter().map(String::as_str)).collect(),
        };
        let quantization = json!({
            "quant_method": if has_int8_head { INT8_HEAD_METHOD } else { "bitsandbytes" },
            "load_in_8bit": true,
            "load_in_4bit": false,
            "_load_in_8bit": true,
            "_load_in_4bit": false,
            "llm_int8_threshold": f64::from(threshold.unwrap_or(0.0)),
            "llm_int8_skip_modules": skip_modules,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4",
            "bnb_4bit_use_double_quant": false,
        });
        let mut values = self.values().clone();
        let dtype_key = if values.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        values.insert(dtype_key.to_string(), if is_bf16 { "bfloat16" } else { "float16" }.into());
        values.insert(KEY.to_string(), quantization);
        values
    }
}
