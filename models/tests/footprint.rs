//! What is computed from a config, against what loading counts.

mod support;

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use int8_models::{
    CacheDtype, Component, Footprint, Int8Options, KvCache, LongestContext, ModelFolder, Precision, ReadSeek, Result,
    TensorHeaders, WeightFiles, published, published_names,
};
use support::*;

/// One of every form: trained and random ones, int8 checkpoints, a separate head, projections, no
/// biases, norms without weights, safetensors and `.bin`, sharded and not.
const FIXTURES: [&str; 16] = [
    "tiny-bloom",
    "tiny-opt",
    "tiny-bloom-outliers",
    "tiny-opt-outliers",
    "random/bloom-12-heads",
    "random/bloom-bin",
    "random/bloom-residual",
    "random/galactica-form",
    "random/opt-350m-form",
    "random/opt-odd",
    "random/opt-plain-norms",
    "random/opt-sharded-bin",
    "bnb/bloom/bnb_int8",
    "bnb/bloom/hf_fp16",
    "bnb/opt/bnb_int8",
    "bnb/opt/hf_fp16",
];

fn int8_with(head: bool, skip_modules: &[&str]) -> Precision {
    let skip_modules = skip_modules.iter().map(|name| name.to_string()).collect();
    Precision::Int8(Int8Options { head, skip_modules, ..Int8Options::default() })
}

fn footprint(folder: &Path) -> Footprint {
    Footprint::of(&ModelFolder::open(folder).unwrap()).unwrap()
}

fn published_footprint(name: &str) -> Footprint {
    Footprint::of(&published(name).unwrap()).unwrap()
}

#[test]
fn a_loaded_model_takes_the_bytes_of_its_footprint_in_every_precision() {
    for name in FIXTURES {
        let folder = model(name);
        let footprint = footprint(&folder);
        let (block, layer) = match footprint.architecture() {
            "bloom" => ("h.1", "mlp.dense_h_to_4h"),
            _ => ("layers.1", "fc1"),
        };
        let precisions = [
            Precision::F32,
            Precision::F16,
            Precision::BF16,
            int8_with(false, &[]),
            int8_with(true, &[]),
            int8_with(true, &["lm_head", block]),
            int8_with(false, &[layer]),
        ];
        for precision in precisions {
            let ledger = load_folder(&folder, precision.clone()).ledger;
            let weights = footprint.weights(&precision);
            assert_eq!(weights.total(), ledger.bytes() as u64, "{name} {precision:?}");
            assert_eq!(footprint.bytes_at_16_bits(), ledger.bytes_at_16_bits() as u64, "{name}");
        }
    }
}

#[test]
fn components_hold_what_their_names_say() {
    let weights = published_footprint("facebook/opt-350m").weights(&int8_with(true, &[]));
    let (hidden, width, vocab, layers, ffn) = (1024, 512, 50_272, 24, 4096);
    // Codes take a byte, positions two; there are two projections between embedding and blocks.
    assert_eq!(weights.of(Component::Embedding), vocab * width + 2 * 2050 * hidden + 2 * width * hidden);
    assert_eq!(weights.of(Component::Attention), layers * 4 * hidden * hidden);
    assert_eq!(weights.of(Component::Mlp), layers * 2 * hidden * ffn);
    // Two norms and six biases a block, and no norm after the last one.
    let vectors = layers * (2 * 2 * hidden + 4 * hidden + ffn + hidden);
    assert_eq!(weights.of(Component::NormsAndBiases), 2 * vectors);
    assert_eq!(weights.of(Component::Scales), 4 * (vocab + width + hidden + layers * (5 * hidden + ffn)));
}

#[test]
fn published_models_have_the_published_number_of_parameters() {
    let counts = [
        ("bigscience/bloom-560m", 559_214_592),
        ("bigscience/bloom-1b1", 1_065_314_304),
        ("bigscience/bloom-1b7", 1_722_408_960),
        ("bigscience/bloom-3b", 3_002_557_440),
        ("bigscience/bloom-7b1", 7_069_016_064),
        ("bigscience/bloom", 176_247_271_424),
        ("bigscience/bloomz-7b1-mt", 7_069_016_064),
        ("bigscience/bloomz-mt", 176_247_271_424),
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("facebook/opt-2.7b", 2_651_596_800),
        ("facebook/opt-6.7b", 6_658_473_984),
        ("facebook/opt-13b", 12_853_473_280),
        ("facebook/opt-30b", 29_974_540_288),
        ("facebook/opt-66b", 65_719_701_504),
        ("facebook/opt-iml-max-1.3b", 1_315_758_080),
    ];
    for (name, parameters) in counts {
        assert_eq!(published_footprint(name).parameters(), parameters, "{name}");
    }
    // Every other one can be read, too, and is for 2,048 tokens.
    for name in published_names() {
        assert_eq!(published_footprint(name).longest_context().tokens(), 2048, "{name}");
    }
    assert!(published("bigscience/bloom-2b5").is_none());
}

#[test]
fn published_models_have_the_published_footprints() {
    // GB at f16, int8, and int8 with an int8 head where that is known.
    let figures = [
        ("bigscience/bloom-560m", "1.12", "0.82", None),
        ("bigscience/bloomz-7b1", "14.14", "8.10", Some("7.08")),
        ("bigscience/bloom", "352.5", "179.9", None),
        ("facebook/opt-6.7b", "13.32", "6.88", None),
        ("facebook/opt-30b", "59.95", "30.37", None),
    ];
    for (name, f16, int8, int8_head) in figures {
        let footprint = published_footprint(name);
        let check = |precision: &Precision, wanted: &str| {
            let decimals = wanted.split_once('.').unwrap().1.len();
            let weights = footprint.weights(precision);
            let found = weights.total() as f64 / 1e9;
            assert_eq!(format!("{found:.decimals$}"), wanted, "{name} {precision:?}");
        };
        check(&Precision::F16, f16);
        check(&int8_with(false, &[]), int8);
        int8_head.inspect(|wanted| check(&int8_with(true, &[]), wanted));
    }
    let bloomz = published_footprint("bigscience/bloomz-7b1");
    let ratio = bloomz.bytes_at_16_bits() as f64 / bloomz.weights(&int8_with(false, &[])).total() as f64;
    assert_eq!(format!("{ratio:.2}"), "1.74");
}

#[test]
fn the_cache_takes_what_attention_keeps() {
    let bloom = published_footprint("bigscience/bloom-7b1");
    assert_eq!(
        bloom.kv_cache(1000, CacheDtype::F16),
        1000 * KvCache::bytes_per_token(30, 32, 128, CacheDtype::F16) as u64
    );
    assert_eq!(bloom.longest_context(), LongestContext::Trained(2048));
    let opt = published_footprint("facebook/opt-350m");
    assert_eq!(opt.kv_cache(10, CacheDtype::F32), 2 * opt.kv_cache(10, CacheDtype::F16));
    assert_eq!(opt.kv_cache(10, CacheDtype::F16), 10 * KvCache::bytes_per_token(24, 16, 64, CacheDtype::F16) as u64);
    assert_eq!(opt.longest_context(), LongestContext::Positions(2048));
    // A config that says what the model was trained on.
    assert_eq!(footprint(&model("tiny-bloom")).longest_context(), LongestContext::Trained(256));
}

#[test]
fn devices_hold_whole_blocks() {
    let footprint = published_footprint("facebook/opt-125m");
    let all = footprint.weights(&Precision::F16).total() + footprint.kv_cache(2048, CacheDtype::F16);
    let devices = |memory| footprint.devices(&Precision::F16, 2048, CacheDtype::F16, memory);
    assert_eq!(devices(all), Some(1));
    assert_eq!(devices(all - 1), Some(2));
    let block = (all - footprint.weights(&Precision::F16).of(Component::Embedding)) / 12;
    // Less than a block, or than the embedding, is of no use however many there are.
    assert_eq!(devices(block - 10_000), None);
    // The embedding on the first, the twelve blocks by threes.
    assert_eq!(devices(footprint.weights(&Precision::F16).of(Component::Embedding) + 10_000), Some(1 + 4));
}

/// A folder that counts the bytes that are read of its files.
struct Counted {
    folder: PathBuf,
    bytes: Rc<Cell<u64>>,
}

struct CountedFile {
    file: File,
    bytes: Rc<Cell<u64>>,
}

impl Read for CountedFile {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.bytes.set(self.bytes.get() + read as u64);
        Ok(read)
    }
}

impl Seek for CountedFile {
    fn seek(&mut self, position: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(position)
    }
}

impl WeightFiles for Counted {
    fn path(&self, name: &str) -> PathBuf {
        Path::new("far-away").join(name)
    }

    fn open(&self, name: &str) -> Result<Option<Box<dyn ReadSeek + '_>>> {
        let file = File::open(self.folder.join(name)).ok();
        Ok(file.map(|file| Box::new(CountedFile { file, bytes: self.bytes.clone() }) as Box<dyn ReadSeek>))
    }
}

#[test]
fn headers_are_read_from_anywhere_and_nothing_else_is() {
    for form in [Form::Safetensors(1), Form::Safetensors(3), Form::Pytorch(1), Form::Pytorch(2)] {
        let folder = reformed("tiny-opt", "decoder.", form);
        let (Form::Safetensors(shards) | Form::Pytorch(shards)) = form;
        let source = Counted { folder: folder.clone(), bytes: Rc::default() };
        let headers = TensorHeaders::read(&source).unwrap().unwrap();
        footprint(&folder).check(&headers).unwrap();
        assert_eq!(headers.files().len(), shards, "{form:?}");
        assert!(headers.files().iter().all(|file| file.starts_with("far-away")), "{form:?}");
        let bytes = headers.bytes_by_dtype();
        assert_eq!(bytes.keys().collect::<Vec<_>>(), ["F16"], "{form:?}");
        assert_eq!(bytes["F16"], footprint(&folder).bytes_at_16_bits(), "{form:?}");
        assert!(!headers.is_int8());
        let read = source.bytes.get();
        assert!(read < bytes["F16"] / 50, "{form:?}: {read} bytes read");
    }
}

#[test]
fn headers_of_every_fixture_agree_with_its_config() {
    for name in FIXTURES {
        let folder = ModelFolder::open(model(name)).unwrap();
        let headers = TensorHeaders::read(&folder).unwrap().unwrap();
        Footprint::of(&folder).unwrap().check(&headers).unwrap();
        assert_eq!(headers.is_int8(), name.ends_with("bnb_int8"), "{name}");
    }
}
