//! Models with random weights, from configs alone.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Tensor};
use int8_models::{
    Footprint, Int8Options, KvCache, LoadOptions, Loaded, ModelFolder, Precision, load_dummy, published,
};
use int8_ops::{OUTLIER_THRESHOLD, outlier_columns};
use support::*;

/// Both families, and their forms: a separate head, projections, no biases, an int8 checkpoint's config.
const FIXTURES: [&str; 7] = [
    "tiny-bloom",
    "tiny-opt",
    "random/bloom-residual",
    "random/galactica-form",
    "random/opt-350m-form",
    "random/opt-odd",
    "bnb/opt/bnb_int8",
];

/// A folder with the config of a fixture and nothing else, for one test.
fn config_alone(name: &str) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let folder = scratch(&format!("{}-{}", name.replace('/', "-"), COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::copy(fixtures().join(name).join("config.json"), folder.join("config.json")).unwrap();
    folder
}

fn dummy(folder: &Path, precision: Precision) -> Loaded {
    load_dummy(&ModelFolder::open(folder).unwrap(), &LoadOptions { precision, ..LoadOptions::default() }).unwrap()
}

fn int8_with(head: bool) -> Precision {
    Precision::Int8(Int8Options { head, ..Int8Options::default() })
}

fn precisions() -> [Precision; 5] {
    [Precision::F32, Precision::F16, Precision::BF16, int8_with(false), int8_with(true)]
}

#[test]
fn a_dummy_model_takes_the_bytes_of_its_footprint_and_has_finite_logits() {
    for name in FIXTURES {
        let folder = config_alone(name);
        let footprint = Footprint::of(&ModelFolder::open(&folder).unwrap()).unwrap();
        for precision in precisions() {
            let loaded = dummy(&folder, precision.clone());
            let ledger = &loaded.ledger;
            assert_eq!(ledger.bytes() as u64, footprint.weights(&precision).total(), "{name} {precision:?}");
            assert_eq!(ledger.bytes_at_16_bits() as u64, footprint.bytes_at_16_bits(), "{name}");
            let logits = logits(loaded.model.as_ref(), &[5, 6, 7, 5]).flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let largest = logits.iter().fold(0f32, |largest, logit| largest.max(logit.abs()));
            assert!(logits.iter().all(|logit| logit.is_finite()), "{name} {precision:?}");
            assert!((0.1..1e4).contains(&largest), "{name} {precision:?}: {largest}");
        }
    }
}

#[test]
fn a_published_shape_is_made_by_its_name() {
    let folder = published("facebook/opt-125m").unwrap();
    let options = LoadOptions { precision: int8_with(true), ..LoadOptions::default() };
    let loaded = load_dummy(&folder, &options).unwrap();
    let wanted = Footprint::of(&folder).unwrap().weights(&options.precision).total();
    assert_eq!(loaded.ledger.bytes() as u64, wanted);
    assert_eq!(loaded.eos, [2]);
}

#[test]
fn a_few_columns_of_every_norm_hold_outliers() {
    for name in ["tiny-bloom", "tiny-opt", "random/opt-odd"] {
        let loaded = dummy(&config_alone(name), int8_with(false));
        let model = loaded.model.as_ref();
        let tokens: Vec<u32> = (10..26).collect();
        let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let normed = model.hidden_states(&tokens, &mut KvCache::new(model.num_layers()), || false).unwrap().unwrap();
        let columns = &outlier_columns(&normed, OUTLIER_THRESHOLD).unwrap()[0];
        assert!((1..=6).contains(&columns.len()), "{name}: {columns:?}");
        // The products see them too: it makes a difference to multiply them in int8.
        let whole = dummy(&config_alone(name), int8(None));
        assert!(rms_error(&logits(model, &[5, 6, 7]), &logits(whole.model.as_ref(), &[5, 6, 7])) > 0.0, "{name}");
    }
}

#[test]
fn weights_are_the_same_at_every_run_and_with_any_number_of_threads() {
    for precision in [Precision::F16, int8_with(true)] {
        let folder = config_alone("tiny-opt");
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let alone = one_thread.install(|| logits(dummy(&folder, precision.clone()).model.as_ref(), &[5, 6, 7]));
        let together = logits(dummy(&folder, precision).model.as_ref(), &[5, 6, 7]);
        assert_eq!(relative_error(&alone, &together), 0.0);
    }
}

#[test]
fn reading_the_weights_reads_every_matrix_of_a_step() {
    for name in FIXTURES {
        for precision in precisions() {
            let loaded = dummy(&config_alone(name), precision.clone());
            let is_vector = |name: &str| name.ends_with(".bias") || name.contains("norm") || name.contains("ln_f");
            let matrices = loaded.ledger.entries().iter().filter(|entry| !is_vector(&entry.name));
            // Tables that are looked up are left out, and the scales of codes, which are no part of the matrix.
            let read = matrices.filter(|entry| entry.bytes_per_token == entry.bytes).map(|entry| {
                let is_int8 = entry.bytes < 2 * entry.values;
                if is_int8 { entry.values } else { entry.bytes }
            });
            let read: usize = read.sum();
            assert!(read > loaded.ledger.bytes_per_token() / 2, "{name} {precision:?}");
            assert_eq!(loaded.model.read_weights().unwrap(), read, "{name} {precision:?}");
        }
    }
}

#[test]
fn a_step_reads_all_but_tables_that_are_looked_up() {
    // A separate head: the embedding is only looked up.
    let bloom = dummy(&config_alone("random/bloom-residual"), int8_with(false)).ledger;
    let entry = |name: &str| bloom.entries().iter().find(|entry| entry.name == name).unwrap();
    let (embedding, head) = (entry("transformer.word_embeddings.weight"), entry("lm_head.weight"));
    assert_eq!(embedding.bytes_per_token, 32 * 2);
    assert_eq!(head.bytes_per_token, head.bytes);
    assert_eq!(bloom.bytes_per_token(), bloom.bytes() - embedding.bytes + embedding.bytes_per_token);
    // 12 hidden * hidden products a block, of which there are two.
    assert_eq!(bloom.int8_products_per_token(), 2 * 12 * 32 * 32);

    let opt = dummy(&config_alone("tiny-opt"), Precision::F16).ledger;
    let positions = opt.entries().iter().find(|entry| entry.name.ends_with("embed_positions.weight")).unwrap();
    assert_eq!(opt.bytes_per_token(), opt.bytes() - positions.bytes + positions.bytes_per_token);
    assert!(positions.bytes_per_token < positions.bytes);
    assert_eq!(opt.int8_products_per_token(), 0);
}

#[test]
fn configs_that_call_for_more_than_there_is() {
    let folder = scratch("immense");
    let mut config = json("random/bloom-residual/config.json");
    config["vocab_size"] = (1 << 24).into();
    config["hidden_size"] = (1 << 24).into();
    config["n_layer"] = (1 << 24).into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let error = load_dummy(&ModelFolder::open(&folder).unwrap(), &LoadOptions::default()).err().unwrap();
    assert!(error.to_string().contains("parameters, wanted"), "{error}");
}
