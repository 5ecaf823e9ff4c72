//! How much memory loading takes at its peak, as the kernel counts it (`VmHWM`), for a model of a real
//! size with random weights: `make nightly`.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;
#[path = "support/pytorch.rs"]
mod pytorch;

use std::fs;
use std::path::{Path, PathBuf};

use fixtures::*;
use program::*;
use pytorch::Pickled;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

// The shape of opt-1.3b.
const VOCAB: usize = 50_272;
const HIDDEN: usize = 2048;
const LAYERS: usize = 24;
const FFN: usize = 8192;
const POSITIONS: usize = 2048;

/// What loading may take beside the model and its largest tensor.
const ALLOWANCE: u64 = 200_000_000;

#[cfg(target_os = "linux")]
#[test]
#[ignore = "writes 2.6 GB four times and loads it: cargo test --workspace --test peak_memory -- --ignored --nocapture"]
fn loading_takes_the_model_one_tensor_and_200_mb_at_most() {
    let tensors = random_opt();
    let largest = tensors.iter().map(|(_, tensor)| tensor.data.len()).max().unwrap() as u64;
    let source: u64 = tensors.iter().map(|(_, tensor)| tensor.data.len() as u64).sum();
    println!("source {} MB, largest tensor {} MB, in MB:", source / 1_000_000, largest / 1_000_000);
    println!("{:<24} {:>7} {:>7} {:>7}  load seconds", "", "int8", "bound", "peak");
    let check = |label: &str, folder: &Path| {
        // The first of the runs finds the file in the page cache, where writing left it.
        let reports: Vec<Value> = (0..3).map(|_| load(folder)).collect();
        let mut seconds: Vec<f64> =
            reports.iter().map(|report| report["timings"]["load_seconds"].as_f64().unwrap()).collect();
        seconds.sort_by(f64::total_cmp);
        let peak = reports.iter().map(|report| report["memory"]["peak_rss_bytes"].as_u64().unwrap()).max().unwrap();
        let int8 = reports[0]["memory"]["weight_bytes"].as_u64().unwrap();
        let bound = int8 + largest + ALLOWANCE;
        let mb = [int8, bound, peak].map(|bytes| bytes / 1_000_000);
        println!("{label:<24} {:>7} {:>7} {:>7}  {seconds:.2?}", mb[0], mb[1], mb[2]);
        assert!(peak <= bound, "{label}: {peak} at the peak, {bound} allowed");
        seconds[1]
    };
    let mut quantised_here = 0.0;
    for (form, shards) in [("safetensors", 3), ("bin", 1), ("bin", 3), ("safetensors", 1)] {
        let folder = empty("source");
        write(&folder, form, shards, &tensors);
        quantised_here = check(&format!("{form}, {shards} file(s)"), &folder);
    }
    for head in [false, true] {
        let destination = empty("int8");
        let paths = [scratch("source"), destination.clone()].map(|path| path.display().to_string());
        let mut args = vec!["quantize", "-q", "--json", "-m", &paths[0], "-o", &paths[1]];
        args.extend(head.then_some("--int8-head"));
        let report = json_of(&args);
        let peak = report["peak_rss_bytes"].as_u64().unwrap();
        println!("quantize: {} MB at the peak, {:.2} s", peak / 1_000_000, report["seconds"].as_f64().unwrap());
        assert!(peak <= largest + ALLOWANCE, "quantize: {peak} at the peak");
        let label = if head { "int8 checkpoint and head" } else { "int8 checkpoint" };
        let seconds = check(label, &destination);
        println!("{label}: loads {:.1} times as fast as quantising", quantised_here / seconds);
    }
    fs::remove_dir_all(scratch("source")).unwrap();
    fs::remove_dir_all(scratch("int8")).unwrap();
}

/// Loads the model and generates one token.
fn load(folder: &Path) -> Value {
    json_of(&["generate", "-q", "--json", "-n", "1", "--prompt-ids", "2,45,7", "-m", folder.to_str().unwrap()])
}

/// A folder of that name with nothing in it.
fn empty(name: &str) -> PathBuf {
    let folder = scratch(name);
    fs::remove_dir_all(&folder).unwrap();
    scratch(name)
}

/// The tensors of an OPT of that shape in F16: values from -0.05 to 0.05.
fn random_opt() -> Vec<(String, Stored)> {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // A sign, an exponent of 2^-8 to 2^-5, and a mantissa.
        let bits = (state >> 40) as u16;
        (bits & 0x83ff) | (7 + (bits >> 10 & 3)) << 10
    };
    // Tensors are cut out of one pool, each at another place: as many fresh values would take minutes.
    let pool: Vec<u8> = (0..8_000_003).flat_map(|_| random().to_le_bytes()).collect();
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let bytes = 2 * shape.iter().product::<usize>();
        let start = tensors.len() * 1_000_002 % pool.len();
        let mut data = pool[start..].to_vec();
        while data.len() < bytes {
            data.extend_from_slice(&pool);
        }
        data.truncate(bytes);
        data.shrink_to_fit();
        tensors.push((format!("model.decoder.{name}"), Stored { dtype: Dtype::F16, shape, data }));
    };
    add("embed_tokens.weight".to_string(), vec![VOCAB, HIDDEN]);
    add("embed_positions.weight".to_string(), vec![POSITIONS + 2, HIDDEN]);
    let mut layer = |name: String, outputs: usize, inputs: usize| {
        add(format!("{name}.weight"), if inputs == 0 { vec![outputs] } else { vec![outputs, inputs] });
        add(format!("{name}.bias"), vec![outputs]);
    };
    for index in 0..LAYERS {
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            layer(format!("layers.{index}.self_attn.{name}"), HIDDEN, HIDDEN);
        }
        layer(format!("layers.{index}.fc1"), FFN, HIDDEN);
        layer(format!("layers.{index}.fc2"), HIDDEN, FFN);
        for name in ["self_attn_layer_norm", "final_layer_norm"] {
            layer(format!("layers.{index}.{name}"), HIDDEN, 0);
        }
    }
    layer("final_layer_norm".to_string(), HIDDEN, 0);
    tensors
}

/// Writes the model in a form, its tensors dealt out to so many files.
fn write(folder: &Path, form: &str, shards: usize, tensors: &[(String, Stored)]) {
    let config = json!({
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "ffn_dim": FFN,
        "max_position_embeddings": POSITIONS, "do_layer_norm_before": true, "torch_dtype": "float16",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let stem = if form == "bin" { "pytorch_model" } else { "model" };
    let mut weight_map = serde_json::Map::new();
    for shard in 0..shards {
        let file = match shards {
            1 => format!("{stem}.{form}"),
            _ => format!("{stem}-{:05}-of-{shards:05}.{form}", shard + 1),
        };
        let part: Vec<_> = tensors.iter().skip(shard).step_by(shards).collect();
        weight_map.extend(part.iter().map(|(name, _)| (name.clone(), file.clone().into())));
        let file = folder.join(file);
        if form == "bin" {
            let pickled = part.iter().map(|(name, tensor)| Pickled::whole(name, "HalfStorage", name, &tensor.shape));
            let pickle = pytorch::pickle(&pickled.collect::<Vec<_>>());
            let storages: Vec<_> = part.iter().map(|(name, tensor)| (name.clone(), tensor.data.clone())).collect();
            pytorch::write_archive(&file, &pickle, &storages);
        } else {
            let views = part.iter().map(|(name, tensor)| {
                (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
            });
            safetensors::serialize_to_file(views, None, &file).unwrap();
        }
    }
    if shards > 1 {
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(folder.join(format!("{stem}.{form}.index.json")), index.to_string()).unwrap();
    }
}
