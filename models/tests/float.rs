//! Models in float against Transformers: logits, hidden states, greedy continuations, in every form of
//! checkpoint.

mod support;

use candle_core::{Device, Tensor};
use int8_models::{CausalLm, FinishReason, GenerateOptions, KvCache, Precision, generate};
use support::*;

const TOLERANCE: f32 = 1e-4;

const MODELS: [&str; 4] = ["tiny-bloom", "tiny-bloom-outliers", "tiny-opt", "tiny-opt-outliers"];

#[test]
fn logits_equal_the_reference_at_every_prompt() {
    for name in MODELS {
        let model = load_model(name, Precision::F32).model;
        let golden = tensors(format!("golden/{name}/golden.safetensors"));
        for prompt in json(format!("golden/{name}/golden.json"))["prompts"].as_array().unwrap() {
            let label = prompt["name"].as_str().unwrap();
            let mut found = f32_logits(model.as_ref(), &ids(&prompt["ids"]));
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
    for name in MODELS {
        let model = load_model(name, Precision::F32).model;
        let golden = tensors(format!("golden/{name}/golden.safetensors"));
        check_hidden_states(model.as_ref(), &golden["ids.en"], &golden);
    }
}

/// Compares the input of block 0, the output of every block, and what goes into the head.
fn check_hidden_states(model: &dyn CausalLm, ids: &Tensor, golden: &std::collections::HashMap<String, Tensor>) {
    let ids = ids.to_dtype(candle_core::DType::U32).unwrap().unsqueeze(0).unwrap();
    let mut cache = f32_cache(model);
    let mut hidden = model.embed(&ids, 0).unwrap();
    let check = |label: String, hidden: &Tensor| {
        let error = relative_error(&hidden.squeeze(0).unwrap(), &golden[&label]);
        assert!(error <= TOLERANCE, "{label}: {error}");
    };
    check("hidden.0".to_string(), &hidden);
    for index in 0..model.num_layers() {
        hidden = model.block(index, &hidden, &mut cache).unwrap();
        check(format!("hidden.{}", index + 1), &hidden);
    }
    check("hidden.final".to_string(), &model.final_norm(&hidden).unwrap());
}

/// f16 keys and values have 11 bits of their own.
#[test]
fn a_cache_in_16_bits_moves_logits_by_no_more_than_its_rounding() {
    for name in MODELS {
        let model = load_model(name, Precision::F32).model;
        let prompt = ids(&json(format!("golden/{name}/golden.json"))["prompts"][4]["ids"]);
        let error = relative_error(&logits(model.as_ref(), &prompt), &f32_logits(model.as_ref(), &prompt));
        println!("{name}: {error}");
        assert!(error > 0.0 && error <= 1e-3, "{name}: {error}");
    }
}

fn greedy(model: &dyn CausalLm, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
    generate(model, prompt, &options).unwrap().map(Result::unwrap).collect()
}

#[test]
fn greedy_continuations_equal_the_reference_token_by_token() {
    for name in MODELS {
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
    for name in ["tiny-bloom", "tiny-opt"] {
        let prompt = ids(&json(format!("golden/{name}/golden.json"))["prompts"][4]["ids"]);
        for precision in [Precision::F32, Precision::F16, int8(None)] {
            let label = format!("{name} at {}", precision.name());
            let model = load_model(name, precision).model;
            let whole = logits(model.as_ref(), &prompt);
            let mut cache = KvCache::new(model.num_layers());
            for (position, id) in prompt.iter().enumerate() {
                let token = Tensor::new(&[[*id]], &Device::Cpu).unwrap();
                let step = model.forward(&token, &mut cache).unwrap().flatten_all().unwrap();
                let error = relative_error(&step, &whole.get(position).unwrap());
                assert!(error <= 1e-5, "{label}, position {position}: {error}");
            }
        }
    }
}

#[test]
fn the_form_of_the_checkpoint_changes_nothing() {
    let forms = [
        ("tiny-bloom", "", Form::Safetensors(3)),
        ("tiny-bloom", "transformer.", Form::Safetensors(1)),
        ("tiny-bloom", "transformer.", Form::Safetensors(2)),
        ("tiny-bloom", "transformer.", Form::Pytorch(1)),
        ("tiny-bloom", "", Form::Pytorch(2)),
        ("tiny-opt", "model.decoder.", Form::Safetensors(2)),
        ("tiny-opt", "decoder.", Form::Safetensors(1)),
        ("tiny-opt", "model.decoder.", Form::Pytorch(1)),
        ("tiny-opt", "model.decoder.", Form::Pytorch(2)),
        ("tiny-opt", "decoder.", Form::Pytorch(1)),
        ("tiny-opt", "decoder.", Form::Pytorch(3)),
    ];
    for (name, prefix, form) in forms {
        let golden = json(format!("golden/{name}/golden.json"));
        let prompt = &golden["prompts"][0];
        let wanted = logits(load_model(name, Precision::F32).model.as_ref(), &ids(&prompt["ids"]));
        let model = load_folder(&reformed(name, prefix, form), Precision::F32).model;
        let found = logits(model.as_ref(), &ids(&prompt["ids"]));
        assert_eq!(found.to_vec2::<f32>().unwrap(), wanted.to_vec2::<f32>().unwrap(), "{name}, {prefix:?}, {form:?}");
        assert_eq!(greedy(model.as_ref(), &ids(&prompt["ids"]), 32), ids(&prompt["greedy_ids"]));
    }
}

#[test]
fn safetensors_are_preferred_where_both_forms_are_there() {
    let folder = reformed("tiny-bloom", "", Form::Safetensors(2));
    std::fs::write(folder.join("pytorch_model.bin"), "not a checkpoint").unwrap();
    load_folder(&folder, Precision::F32);
}

/// Checkpoints with random weights: 12 heads in bf16, the other residual with a head of its own,
/// odd sizes, norms after the residual with projections, no biases, no norm weights, every kind of
/// PyTorch file as torch itself wrote it.
#[test]
fn every_variant_of_the_architectures_equals_the_reference() {
    let variants = [
        "bloom-12-heads",
        "bloom-residual",
        "bloom-bin",
        "opt-350m-form",
        "galactica-form",
        "opt-plain-norms",
        "opt-odd",
        "opt-sharded-bin",
    ];
    for name in variants {
        let folder = format!("random/{name}");
        let model = load_model(&folder, Precision::F32).model;
        let golden = tensors(format!("{folder}/expected.safetensors"));
        let input_ids = golden["input_ids"].to_dtype(candle_core::DType::U32).unwrap();
        let found = model.forward(&input_ids, &mut f32_cache(model.as_ref())).unwrap();
        let error = relative_error(&found, &golden["logits"]);
        assert!(error <= TOLERANCE, "{name}: {error}");
        check_hidden_states(model.as_ref(), &input_ids.get(0).unwrap(), &golden);
        // Int8 stays near, whatever the form: its own error, not a misread weight.
        let model = load_model(&folder, int8(Some(6.0))).model;
        let found = model.forward(&input_ids, &mut KvCache::new(model.num_layers())).unwrap();
        let zeros = golden["logits"].zeros_like().unwrap();
        let error = rms_error(&found, &golden["logits"]) / rms_error(&golden["logits"], &zeros);
        println!("{name} at int8: {error}");
        assert!(error <= 0.03, "{name} at int8: {error}");
    }
}

#[test]
fn generation_ends_where_the_positions_do() {
    let model = load_model("random/opt-odd", Precision::F32).model;
    assert_eq!(model.max_positions(), Some(20));
    let prompt: Vec<u32> = (5..23).collect();
    let options = GenerateOptions { max_new_tokens: 50, ..GenerateOptions::default() };
    let mut generation = generate(model.as_ref(), &prompt, &options).unwrap();
    // 18 tokens leave two positions; what the last position gives needs none of its own.
    assert_eq!(generation.by_ref().map(Result::unwrap).count(), 3);
    assert_eq!(generation.finish_reason(), Some(FinishReason::Length));
    let too_long: Vec<u32> = (5..26).collect();
    let error = generate(model.as_ref(), &too_long, &options).err().unwrap().to_string();
    assert_eq!(error, "the prompt has 21 tokens, but the model has only 20 positions");
    let tokens = Tensor::new(vec![too_long], &Device::Cpu).unwrap();
    assert!(model.forward(&tokens, &mut KvCache::new(model.num_layers())).is_err());
}

#[test]
fn what_shares_a_batch_with_a_prompt_does_not_change_its_result() {
    for name in ["tiny-bloom-outliers", "tiny-opt-outliers"] {
        let prompts = json(format!("golden/{name}/golden.json"))["prompts"].clone();
        let rows: Vec<Vec<u32>> = [4, 6].map(|prompt| ids(&prompts[prompt]["ids"])[..14].to_vec()).to_vec();
        for precision in [int8(Some(6.0)), Precision::F16] {
            let label = format!("{name} at {}", precision.name());
            let model = load_model(name, precision).model;
            let batch = Tensor::new(rows.clone(), &Device::Cpu).unwrap();
            let together = model.forward(&batch, &mut KvCache::new(model.num_layers())).unwrap();
            for (row, prompt) in rows.iter().enumerate() {
                let alone = logits(model.as_ref(), prompt).to_vec2::<f32>().unwrap();
                assert_eq!(together.get(row).unwrap().to_vec2::<f32>().unwrap(), alone, "{label}, row {row}");
            }
        }
    }
}
