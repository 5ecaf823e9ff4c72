//! Int8 checkpoints: what is written loads to the same model, bit for bit, as quantising while loading.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use int8_models::{Int8Options, Ledger, ModelFolder, Precision, QuantizeOptions, Quantized, quantize, stored_int8};
use safetensors::{Dtype, SafeTensors};
use support::*;

/// Models of both families and every form: shards, PyTorch's format, names without a prefix, an own
/// head, projections around the blocks, f32 and bf16.
const MODELS: [&str; 11] = [
    "tiny-bloom",
    "tiny-opt-outliers",
    "random/bloom-12-heads",
    "random/bloom-bin",
    "random/bloom-residual",
    "random/galactica-form",
    "random/opt-350m-form",
    "random/opt-odd",
    "random/opt-plain-norms",
    "random/opt-sharded-bin",
    "bnb/opt/bnb_int8",
];

const PROMPT: [u32; 7] = [2, 45, 7, 99, 13, 101, 64];

/// Quantises the model in `folder` to a new folder of this name.
fn quantized(folder: &Path, name: &str, options: &QuantizeOptions) -> (PathBuf, Quantized) {
    let destination = scratch(name);
    fs::remove_dir_all(&destination).unwrap();
    let report = quantize(&ModelFolder::open(folder).unwrap(), &destination, options).unwrap();
    (destination, report)
}

fn int8_with(options: &Int8Options) -> Precision {
    Precision::Int8(options.clone())
}

/// The bits of the logits of a prompt, and the ledger.
fn loaded(folder: &Path, precision: Precision) -> (Vec<u32>, Ledger) {
    let loaded = load_folder(folder, precision);
    let logits = logits(loaded.model.as_ref(), &PROMPT).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    (logits.into_iter().map(f32::to_bits).collect(), loaded.ledger)
}

/// The bytes of each tensor, by its name below any prefix.
fn entries(ledger: &Ledger) -> BTreeMap<String, usize> {
    let prefixes = ["transformer.", "model.decoder.", "decoder."];
    let name = |name: &str| prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name).to_string();
    ledger.entries().iter().map(|entry| (name(&entry.name), entry.bytes)).collect()
}

/// Every tensor in the files of a folder: dtype and shape.
fn tensors_of(folder: &Path) -> BTreeMap<String, (Dtype, Vec<usize>)> {
    let mut tensors = BTreeMap::new();
    for file in fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()) {
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(file).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                tensors.insert(name, (view.dtype(), view.shape().to_vec()));
            }
        }
    }
    tensors
}

#[test]
fn what_is_written_loads_to_the_same_logits_and_the_same_bytes() {
    for (name, head) in MODELS.iter().flat_map(|name| [(name, false), (name, true)]) {
        let int8 = Int8Options { head, ..Int8Options::default() };
        let options = QuantizeOptions { int8: int8.clone(), ..QuantizeOptions::default() };
        let source = model(name);
        let (folder, report) = quantized(&source, &format!("{name}-{head}"), &options);
        let (wanted, wanted_ledger) = loaded(&source, int8_with(&int8));
        // Without the flag: the checkpoint itself says that its head is int8.
        let (found, ledger) = loaded(&folder, int8_with(&Int8Options::default()));
        assert!(found == wanted, "{name}, head {head}");
        assert_eq!(entries(&ledger), entries(&wanted_ledger), "{name}, head {head}");
        let int8_weights = tensors_of(&folder).values().filter(|(dtype, _)| *dtype == Dtype::I8).count();
        let int8_loaded = wanted_ledger.entries().iter().filter(|entry| entry.bytes < 2 * entry.values).count();
        assert_eq!((int8_weights, report.int8_weights), (int8_loaded, int8_loaded), "{name}, head {head}");
        assert_eq!(report.has_int8_head, head);
    }
}

#[test]
fn an_int8_checkpoint_quantised_again_is_the_same() {
    let (folder, _) = quantized(&model("tiny-bloom"), "once", &QuantizeOptions::default());
    let (again, _) = quantized(&folder, "twice", &QuantizeOptions::default());
    for file in fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name()) {
        assert!(fs::read(folder.join(&file)).unwrap() == fs::read(again.join(&file)).unwrap(), "{file:?}");
    }
}

#[test]
fn the_layout_is_that_of_bitsandbytes() {
    for (family, prefix) in [("bloom", "transformer."), ("opt", "model.decoder.")] {
        let source = fixtures().join(format!("bnb/{family}/hf_fp16"));
        let (folder, _) = quantized(&source, &format!("layout-{family}"), &QuantizeOptions::default());
        let reference = fixtures().join(format!("bnb/{family}/bnb_int8"));
        let (found, wanted) = (tensors_of(&folder), tensors_of(&reference));
        assert_eq!(found, wanted, "{family}");
        assert!(found.keys().all(|name| name.starts_with(prefix)));
        let config = |folder: &Path| -> serde_json::Value {
            serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(config(&folder)["quantization_config"], config(&reference)["quantization_config"]);
    }
}

#[test]
fn modules_to_skip_and_the_threshold_are_remembered() {
    let skip = vec!["h.1".to_string(), "dense_4h_to_h".to_string()];
    let int8 = Int8Options { threshold: None, skip_modules: skip, head: false };
    let options = QuantizeOptions { int8: int8.clone(), ..QuantizeOptions::default() };
    let (folder, report) = quantized(&model("tiny-bloom"), "skip", &options);
    assert_eq!(report.int8_weights, 16 - 4 - 3);
    let stored = stored_int8(&ModelFolder::open(&folder).unwrap()).unwrap().unwrap();
    assert_eq!(stored.threshold, None);
    let (wanted, _) = loaded(&model("tiny-bloom"), int8_with(&int8));
    assert!(loaded(&folder, int8_with(&Int8Options { threshold: None, ..Int8Options::default() })).0 == wanted);
    let config: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let skipped = config["quantization_config"]["llm_int8_skip_modules"].as_array().unwrap();
    assert_eq!(skipped.len(), 1 + 4 + 3);
    assert!(skipped.contains(&"lm_head".into()) && skipped.contains(&"transformer.h.0.mlp.dense_4h_to_h".into()));
}

#[test]
fn shards_hold_no_more_than_they_may() {
    let options = QuantizeOptions { shard_bytes: 700_000, ..QuantizeOptions::default() };
    let (folder, report) = quantized(&model("tiny-bloom"), "shards", &options);
    let (whole, _) = quantized(&model("tiny-bloom"), "one-file", &QuantizeOptions::default());
    assert!(report.shards > 3);
    assert_eq!(tensors_of(&folder), tensors_of(&whole));
    let mut over = Vec::new();
    for shard in 1..=report.shards {
        let bytes = fs::read(folder.join(format!("model-{shard:05}-of-{:05}.safetensors", report.shards))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        if tensors.iter().map(|(_, view)| view.data().len()).sum::<usize>() > options.shard_bytes {
            over.extend(tensors.names().into_iter().map(str::to_string));
        }
    }
    assert_eq!(over, ["transformer.word_embeddings.weight"], "a tensor that is larger has a file of its own");
    assert!(loaded(&folder, int8(Some(6.0))).0 == loaded(&whole, int8(Some(6.0))).0);
}

#[test]
fn codes_begin_at_cache_lines_and_floats_at_their_own_size() {
    let (folder, _) = quantized(&model("random/opt-odd"), "aligned", &QuantizeOptions::default());
    let (even, _) = quantized(&model("tiny-opt"), "aligned-even", &QuantizeOptions::default());
    for (folder, line) in [(folder, 1), (even, 64)] {
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let wanted = if view.dtype() == Dtype::I8 { line } else { view.dtype().bitsize() / 8 };
            assert!(start.is_multiple_of(wanted), "{name} begins at {start}");
        }
    }
}
