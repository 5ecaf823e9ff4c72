//! BLOOM in float against Transformers: logits, hidden states, greedy continuations.

mod support;

use candle_core::{Device, Tensor};
use int8_models::{CausalLm, GenerateOptions, KvCache, Precision, generate};
use support::*;

const TOLERANCE: f32 = 1e-4;

#[test]
fn logits_equal_the_reference_at_every_prompt() {
    for name in ["tiny-bloom", "tiny-bloom-outliers"] {
        let model = load_model(name, Precision::F32).model;
        let golden = tensors(format!("golden/{name}/golden.safetensors"));
        for prompt in json(format!("golden/{name}/golden.json"))["prompts"].as_array().unwrap() {
            let label = prompt["name"].as_str().unwrap();
            let mut found = logits(model.as_ref(), &ids(&prompt["ids"]));
            if let Some(at) = golden.get(&format!("logits_at.{label}")) {
                found = found.index_select(at, 0).unwrap();
            }
            let error = relative_error(&found, &golden[&format!("logits.{label}")]);
            assert!(error <= TOLERANCE, "{name}, prompt {label}: {error}");
        }
    }
}

#[test]
fn hidden_states_equal_the_reference_after_every_block() {
    for name in ["tiny-bloom", "tiny-bloom-outliers"] {
        let model = load_model(name, Precision::F32).model;
        let golden = tensors(format!("golden/{name}/golden.safetensors"));
        check_hidden_states(model.as_ref(), &golden["ids.en"], &golden);
    }
}

/// Compares the input of block 0, the output of every block, and what goes into the head.
fn check_hidden_states(model: &dyn CausalLm, ids: &Tensor, golden: &std::collections::HashMap<String, Tensor>) {
    let ids = ids.to_dtype(candle_core::DType::U32).unwrap().unsqueeze(0).unwrap();
    let mut cache = KvCache::new(model.num_layers());
    let bias = model.attention_bias(ids.dim(1).unwrap(), 0).unwrap();
    let mut hidden = model.embed(&ids, 0).unwrap();
    let check = |label: String, hidden: &Tensor| {
        let error = relative_error(&hidden.squeeze(0).unwrap(), &golden[&label]);
        assert!(error <= TOLERANCE, "{label}: {error}");
    };
    check("hidden.0".to_string(), &hidden);
    for index in 0..model.num_layers() {
        hidden = model.block(index, &hidden, &bias, &mut cache).unwrap();
        check(format!("hidden.{}", index + 1), &hidden);
    }
    check("hidden.final".to_string(), &model.final_norm(&hidden).unwrap());
}

fn greedy(model: &dyn CausalLm, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
    generate(model, prompt, &options).unwrap().map(Result::unwrap).collect()
}

#[test]
fn greedy_continuations_equal_the_reference_token_by_token() {
    for name in ["tiny-bloom", "tiny-bloom-outliers"] {
        let model = load_model(name, Precision::F32).model;
        for prompt in json(format!("golden/{name}/golden.json"))["prompts"].as_array().unwrap() {
            let wanted = ids(&prompt["greedy_ids"]);
            let found = greedy(model.as_ref(), &ids(&prompt["ids"]), wanted.len());
            assert_eq!(found, wanted, "{name}, prompt {}", prompt["name"]);
        }
    }
}

#[test]
fn the_cache_changes_nothing() {
    let prompt = ids(&json("golden/tiny-bloom/golden.json")["prompts"][4]["ids"]);
    for precision in [Precision::F32, Precision::F16, int8(None)] {
        let name = precision.name();
        let model = load_model("tiny-bloom", precision).model;
        let whole = logits(model.as_ref(), &prompt);
        let mut cache = KvCache::new(model.num_layers());
        for (position, id) in prompt.iter().enumerate() {
            let token = Tensor::new(&[[*id]], &Device::Cpu).unwrap();
            let step = model.forward(&token, &mut cache).unwrap().flatten_all().unwrap();
            let error = relative_error(&step, &whole.get(position).unwrap());
            assert!(error <= 1e-5, "{name}, position {position}: {error}");
        }
    }
}

#[test]
fn shards_and_the_prefix_of_names_change_nothing() {
    let prompt = ids(&json("golden/tiny-bloom/golden.json")["prompts"][0]["ids"]);
    let wanted = logits(load_model("tiny-bloom", Precision::F32).model.as_ref(), &prompt);
    for (prefix, shards) in [("", 3), ("transformer.", 1), ("transformer.", 2)] {
        let folder = reshard("tiny-bloom", prefix, shards);
        let found = logits(load_folder(&folder, Precision::F32).model.as_ref(), &prompt);
        assert_eq!(found.to_vec2::<f32>().unwrap(), wanted.to_vec2::<f32>().unwrap(), "{prefix:?}, {shards} shards");
    }
}

#[test]
fn other_head_counts_residuals_heads_and_dtypes_equal_the_reference() {
    for name in ["bloom-12-heads", "bloom-residual"] {
        let folder = format!("random/{name}");
        let model = load_model(&folder, Precision::F32).model;
        let golden = tensors(format!("{folder}/expected.safetensors"));
        let input_ids = golden["input_ids"].to_dtype(candle_core::DType::U32).unwrap();
        let found = model.forward(&input_ids, &mut KvCache::new(model.num_layers())).unwrap();
        let error = relative_error(&found, &golden["logits"]);
        assert!(error <= TOLERANCE, "{name}: {error}");
        check_hidden_states(model.as_ref(), &input_ids.get(0).unwrap(), &golden);
    }
}

#[test]
fn what_shares_a_batch_with_a_prompt_does_not_change_its_result() {
    // `code` and `mixed` are told apart by their outlier columns, too.
    let prompts = json("golden/tiny-bloom-outliers/golden.json")["prompts"].clone();
    let rows: Vec<Vec<u32>> = [4, 6].map(|prompt| ids(&prompts[prompt]["ids"])[..14].to_vec()).to_vec();
    for precision in [int8(Some(6.0)), Precision::F16] {
        let name = precision.name();
        let model = load_model("tiny-bloom-outliers", precision).model;
        let batch = Tensor::new(rows.clone(), &Device::Cpu).unwrap();
        let together = model.forward(&batch, &mut KvCache::new(model.num_layers())).unwrap();
        for (row, prompt) in rows.iter().enumerate() {
            let alone = logits(model.as_ref(), prompt).to_vec2::<f32>().unwrap();
            assert_eq!(together.get(row).unwrap().to_vec2::<f32>().unwrap(), alone, "{name}, row {row}");
        }
    }
}
