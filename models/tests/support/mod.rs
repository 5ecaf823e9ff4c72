//! Models, and how far their outputs are from the expected ones.
#![allow(dead_code)] // each test binary uses its own part

#[path = "../../../tests/support/fixtures.rs"]
mod fixtures;
#[path = "../../../tests/support/pytorch.rs"]
mod pytorch;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use int8_models::{
    CacheDtype, CausalLm, Int8Options, KvCache, LoadOptions, Loaded, ModelFolder, Precision, TextCodec, load,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

pub use fixtures::*;

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

pub fn load_model(name: &str, precision: Precision) -> Loaded {
    load_folder(&model(name), precision)
}

pub fn load_folder(folder: &Path, precision: Precision) -> Loaded {
    load(&ModelFolder::open(folder).unwrap(), &LoadOptions { precision, ..LoadOptions::default() }).unwrap()
}

pub fn int8(threshold: Option<f32>) -> Precision {
    Precision::Int8(Int8Options { threshold, ..Int8Options::default() })
}

pub fn text_codec(name: &str) -> TextCodec {
    TextCodec::load(&ModelFolder::open(fixtures().join(name)).unwrap()).unwrap()
}

/// Logits (tokens, vocabulary) of one prompt.
pub fn logits(model: &dyn CausalLm, ids: &[u32]) -> Tensor {
    logits_with(model, ids, KvCache::new(model.num_layers()))
}

/// Logits (tokens, vocabulary) of one prompt in f32 throughout, keys and values too.
pub fn f32_logits(model: &dyn CausalLm, ids: &[u32]) -> Tensor {
    logits_with(model, ids, f32_cache(model))
}

/// A cache that keeps keys and values as they were computed.
pub fn f32_cache(model: &dyn CausalLm) -> KvCache {
    KvCache::with_dtype(model.num_layers(), CacheDtype::F32)
}

fn logits_with(model: &dyn CausalLm, ids: &[u32], mut cache: KvCache) -> Tensor {
    let tokens = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model.forward(&tokens, &mut cache).unwrap().squeeze(0).unwrap()
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

/// Perplexity by the protocol of perplexity.json: each window of tokens is run alone; exp of the mean
/// negative log-likelihood of all tokens but each window's first. Keys and values are in `cache_dtype`, or in what
/// is best.
pub fn perplexity(model: &dyn CausalLm, windows: &[Vec<u32>], cache_dtype: Option<CacheDtype>) -> f64 {
    let (mut sum, mut count) = (0f64, 0usize);
    for window in windows {
        let cache = KvCache::with_dtype(model.num_layers(), cache_dtype);
        let logits = logits_with(model, &window[..window.len() - 1], cache);
        let log_probs = candle_nn::ops::log_softmax(&logits, 1).unwrap();
        let next = Tensor::new(&window[1..], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
        let chosen = log_probs.gather(&next, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        sum -= chosen.iter().map(|&p| f64::from(p)).sum::<f64>();
        count += chosen.len();
    }
    (sum / count as f64).exp()
}

/// A form of checkpoint, in so many shards.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    Safetensors(usize),
    Pytorch(usize),
}

/// Writes the model of a fixture in another form, its tensors' names under another prefix.
pub fn reformed(name: &str, prefix: &str, form: Form) -> PathBuf {
    let folder = scratch(&format!("{name}-{prefix}-{form:?}"));
    let bytes = fs::read(fixtures().join(name).join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let (stem, extension, shards) = match form {
        Form::Safetensors(shards) => ("model", "safetensors", shards),
        Form::Pytorch(shards) => ("pytorch_model", "bin", shards),
    };
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let file = match shards {
            1 => format!("{stem}.{extension}"),
            _ => format!("{stem}-{:05}-of-{shards:05}.{extension}", shard + 1),
        };
        let part = weights.tensors().into_iter().skip(shard).step_by(shards);
        let renamed = part.map(|(name, view)| (format!("{prefix}{}", name.trim_start_matches("model.decoder.")), view));
        let part: Vec<(String, TensorView)> = renamed.collect();
        weight_map.extend(part.iter().map(|(name, _)| (name.clone(), file.clone().into())));
        match form {
            Form::Safetensors(_) => safetensors::serialize_to_file(part, None, &folder.join(file)).unwrap(),
            Form::Pytorch(_) => write_pytorch(&folder.join(file), &part),
        }
    }
    if shards > 1 {
        let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(folder.join(format!("{stem}.{extension}.index.json")), index.to_string()).unwrap();
    }
    fs::copy(fixtures().join(name).join("config.json"), folder.join("config.json")).unwrap();
    folder
}

fn write_pytorch(file: &Path, tensors: &[(String, TensorView)]) {
    let (mut pickled, mut storages) = (Vec::new(), Vec::new());
    for (key, (name, view)) in tensors.iter().enumerate() {
        assert_eq!(view.dtype(), Dtype::F16);
        pickled.push(pytorch::Pickled::whole(name, "HalfStorage", &key.to_string(), view.shape()));
        storages.push((key.to_string(), view.data().to_vec()));
    }
    pytorch::write_archive(file, &pytorch::pickle(&pickled), &storages);
}
