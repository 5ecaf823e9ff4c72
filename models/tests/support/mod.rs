//! The fixtures, and what the tests make of them.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use int8_models::{CausalLm, Int8Options, KvCache, LoadOptions, Loaded, ModelFolder, Precision, TextCodec, load};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

pub fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(fixtures().join(path)).unwrap()).unwrap()
}

/// The float and integer tensors of a file of expected outputs.
pub fn tensors(path: impl AsRef<Path>) -> HashMap<String, Tensor> {
    let bytes = fs::read(fixtures().join(path)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let is_known = |view: &TensorView| view.dtype() != Dtype::I8;
    file.tensors().into_iter().filter(|(_, view)| is_known(view)).map(|(name, view)| (name, tensor(&view))).collect()
}

fn tensor(view: &TensorView) -> Tensor {
    let dtype = view.dtype().try_into().unwrap();
    Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu).unwrap()
}

/// A tensor of int8 codes.
pub fn codes(path: impl AsRef<Path>, name: &str) -> Vec<i8> {
    let bytes = fs::read(fixtures().join(path)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensor(name).unwrap().data().iter().map(|&code| code as i8).collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The folder of a model: a fixture, or an outlier twin put together from its overlay.
pub fn model(name: &str) -> PathBuf {
    let folder = fixtures().join(name);
    if folder.join("overlay.safetensors").exists() { outlier_twin(name) } else { folder }
}

pub fn load_model(name: &str, precision: Precision) -> Loaded {
    load_folder(&model(name), precision)
}

pub fn load_folder(folder: &Path, precision: Precision) -> Loaded {
    load(&ModelFolder::open(folder).unwrap(), &LoadOptions { precision, progress: None }).unwrap()
}

pub fn int8(threshold: Option<f32>) -> Precision {
    Precision::Int8(Int8Options { threshold, ..Int8Options::default() })
}

pub fn text_codec(name: &str) -> TextCodec {
    TextCodec::load(&ModelFolder::open(fixtures().join(name)).unwrap()).unwrap()
}

/// Logits (tokens, vocabulary) of one prompt.
pub fn logits(model: &dyn CausalLm, ids: &[u32]) -> Tensor {
    let tokens = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&tokens, &mut KvCache::new(model.num_layers())).unwrap().squeeze(0).unwrap()
}

/// The largest difference, as a share of the largest magnitude that is wanted.
pub fn relative_error(found: &Tensor, wanted: &Tensor) -> f32 {
    assert_eq!(found.dims(), wanted.dims());
    let max = |tensor: Tensor| tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let wanted = wanted.to_dtype(DType::F32).unwrap();
    max((found.to_dtype(DType::F32).unwrap() - &wanted).unwrap()) / max(wanted)
}

/// Root of the mean squared difference.
pub fn rms_error(found: &Tensor, wanted: &Tensor) -> f32 {
    let difference = (found.to_dtype(DType::F32).unwrap() - wanted.to_dtype(DType::F32).unwrap()).unwrap();
    difference.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
}

/// Perplexity on heldout.txt by the protocol of perplexity.json: windows of `window` tokens that do
/// not overlap, each run alone; exp of the mean negative log-likelihood.
pub fn perplexity(model: &dyn CausalLm, ids: &[u32], window: usize) -> f64 {
    let (mut sum, mut count) = (0f64, 0usize);
    for window in ids.chunks_exact(window) {
        let logits = logits(model, &window[..window.len() - 1]);
        let log_probs = candle_nn::ops::log_softmax(&logits, 1).unwrap();
        let next = Tensor::new(&window[1..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let chosen = log_probs.gather(&next, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        sum -= chosen.iter().map(|&p| f64::from(p)).sum::<f64>();
        count += chosen.len();
    }
    (sum / count as f64).exp()
}

/// A folder for what a test binary makes.
pub fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME")).join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// The twin of a model with outlier features: its parent with the overlay's tensors and columns.
fn outlier_twin(name: &str) -> PathBuf {
    static WRITING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = WRITING.lock().unwrap();
    let folder = scratch(name);
    let parent = name.strip_suffix("-outliers").unwrap();
    let weights = fs::read(fixtures().join(parent).join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let overlay = fs::read(fixtures().join(name).join("overlay.safetensors")).unwrap();
    let overlay = SafeTensors::deserialize(&overlay).unwrap();
    let columns = tensor(&overlay.tensor("columns").unwrap()).to_vec1::<i64>().unwrap();
    let merged = weights.tensors().into_iter().map(|(name, parent)| {
        let mut data = parent.data().to_vec();
        if let Ok(part) = overlay.tensor(&name) {
            if part.shape() == parent.shape() {
                data.copy_from_slice(part.data());
            } else {
                let width = parent.shape()[1];
                for (index, value) in part.data().chunks(2).enumerate() {
                    let (row, column) = (index / columns.len(), columns[index % columns.len()] as usize);
                    data[(row * width + column) * 2..][..2].copy_from_slice(value);
                }
            }
        }
        (name, Stored { dtype: parent.dtype(), shape: parent.shape().to_vec(), data })
    });
    safetensors::serialize_to_file(merged.collect::<Vec<_>>(), None, &folder.join("model.safetensors")).unwrap();
    for file in ["config.json", "generation_config.json"] {
        fs::copy(fixtures().join(name).join(file), folder.join(file)).unwrap();
    }
    folder
}

/// A tensor to write.
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl safetensors::View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data).into()
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Writes a copy of a fixture whose tensors' names begin with `prefix`, in as many shards.
pub fn reshard(name: &str, prefix: &str, shards: usize) -> PathBuf {
    let folder = scratch(&format!("{name}-{prefix}{shards}"));
    let weights = fs::read(fixtures().join(name).join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let file = |shard: usize| match shards {
        1 => "model.safetensors".to_string(),
        _ => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
    };
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let part: Vec<_> = weights.tensors().into_iter().skip(shard).step_by(shards).collect();
        let part: Vec<_> = part.into_iter().map(|(name, view)| (format!("{prefix}{name}"), view)).collect();
        weight_map.extend(part.iter().map(|(name, _)| (name.clone(), file(shard).into())));
        safetensors::serialize_to_file(part, None, &folder.join(file(shard))).unwrap();
    }
    if shards > 1 {
        let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
    fs::copy(fixtures().join(name).join("config.json"), folder.join("config.json")).unwrap();
    folder
}
