//! What a user sees when something is wrong: one line, a hint where there is one, the exit code.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use fixtures::*;
use program::*;
use safetensors::Dtype;

/// A small model without a tokenizer: BLOOM, hidden 32, 2 layers, one f32 file, a separate head.
const SMALL: &str = "random/bloom-residual";

/// Checks how `generate` fails on a folder, at int8 and at f16.
fn check_model(folder: &Path, parts: &[&str]) {
    for precision in ["int8", "f16"] {
        let args = ["generate", "-q", "--precision", precision, "--prompt-ids", "5,6", "-m", folder.to_str().unwrap()];
        check_failure(&llm8(&args).output().unwrap(), 1, parts);
    }
}

#[test]
fn a_model_that_is_no_folder() {
    check_model(Path::new("no/such/model"), &["no/such/model: no such folder", "hint: give the folder"]);
    check_model(&fixtures().join("heldout.txt"), &["heldout.txt: not a folder"]);
}

#[test]
fn a_config_that_is_missing_or_not_json() {
    let folder = copy_of(SMALL, "config-missing");
    fs::remove_file(folder.join("config.json")).unwrap();
    check_model(&folder, &["config.json: no such file"]);
    fs::write(folder.join("config.json"), "{\"model_type\": ").unwrap();
    check_model(&folder, &["config.json: is not JSON"]);
    fs::write(folder.join("config.json"), "[1, 2]").unwrap();
    check_model(&folder, &["config.json: is not a JSON object"]);
}

/// A copy whose config.json has another value under `key`.
fn with_config(copy: &str, key: &str, value: serde_json::Value) -> std::path::PathBuf {
    let folder = copy_of(SMALL, copy);
    let mut config = json(Path::new(SMALL).join("config.json"));
    config[key] = value;
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn a_config_of_another_architecture() {
    let folder = with_config("llama", "model_type", "llama".into());
    check_model(&folder, &["architecture `llama` is not supported", "hint: supported architectures: bloom"]);
}

#[test]
fn a_config_whose_sizes_make_no_sense_or_contradict_the_tensors() {
    let cases = [
        ("hidden_size", 64.into(), "config.json calls for [160, 64]"),
        (
            "vocab_size",
            161.into(),
            "tensor `transformer.word_embeddings.weight`: has shape [160, 32], but config.json calls for [161, 32]",
        ),
        ("vocab_size", u64::MAX.into(), "`vocab_size` is 18446744073709551615, wanted a whole number from 1"),
        ("n_layer", 3.into(), "tensor `transformer.h.2.input_layernorm.weight`: not found"),
        ("n_layer", "two".into(), "`n_layer` is \"two\", wanted a whole number"),
        ("n_layer", serde_json::Value::Null, "`num_hidden_layers` or `n_layer` is missing"),
        ("n_head", 5.into(), "hidden size 32 is not a multiple of 5 heads"),
        ("n_head", 0.into(), "`n_head` is 0, wanted a whole number from 1"),
        ("layer_norm_epsilon", (-1).into(), "`layer_norm_epsilon` is -1, wanted a number above 0"),
        ("apply_residual_connection_post_layernorm", "yes".into(), "wanted true or false"),
        ("eos_token_id", "</s>".into(), "wanted a token id or a list of them"),
    ];
    for (index, (key, value, wanted)) in cases.into_iter().enumerate() {
        check_model(&with_config(&format!("sizes-{index}"), key, value), &[wanted]);
    }
}

#[test]
fn a_tensor_that_is_missing_or_of_the_wrong_shape_or_dtype() {
    let name = "transformer.h.1.mlp.dense_h_to_4h.weight";
    let folder = copy_of(SMALL, "tensor-missing");
    edit_tensors(&folder, |tensors| tensors.retain(|(other, _)| other != name));
    check_model(
        &folder,
        &["model.safetensors: tensor `transformer.h.1.mlp.dense_h_to_4h.weight`: not found", "hint: "],
    );
    let folder = copy_of(SMALL, "tensor-shape");
    edit_tensor(&folder, name, |tensor| tensor.shape.reverse());
    check_model(&folder, &[name, "has shape [32, 128], but config.json calls for [128, 32]"]);
    let folder = copy_of(SMALL, "tensor-dtype");
    edit_tensor(&folder, name, |tensor| tensor.dtype = Dtype::I32);
    check_model(&folder, &[name, "is I32, wanted F32, F16 or BF16"]);
    let folder = copy_of(SMALL, "tensor-int8-without-scales");
    edit_tensor(&folder, name, |tensor| {
        tensor.dtype = Dtype::I8;
        tensor.data.truncate(128 * 32);
    });
    check_model(&folder, &["tensor `transformer.h.1.mlp.dense_h_to_4h.SCB`: not found"]);
}

#[test]
fn an_int8_checkpoint_in_a_layout_for_particular_gpus() {
    let folder = copy_of("bnb/bloom/bnb_int8", "gpu-layout");
    edit_tensor(&folder, "transformer.h.0.mlp.dense_h_to_4h.weight_format", |tensor| tensor.data = vec![2]);
    check_model(
        &folder,
        &["dense_h_to_4h.weight_format`: is [2], a layout for particular GPUs", "hint: save it again"],
    );
}

#[test]
fn a_weights_file_that_is_missing_truncated_or_corrupt() {
    let folder = copy_of(SMALL, "damaged");
    let file = folder.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let damaged = "model.safetensors: damaged or incomplete safetensors file";
    for len in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..len]).unwrap();
        check_model(&folder, &[damaged]);
    }
    // A header longer than the file, or than memory.
    for len in [whole.len() as u64, u64::MAX] {
        let mut corrupt = whole.clone();
        corrupt[..8].copy_from_slice(&len.to_le_bytes());
        fs::write(&file, corrupt).unwrap();
        check_model(&folder, &[damaged]);
    }
    let mut corrupt = whole;
    corrupt[40..60].fill(b'}');
    fs::write(&file, corrupt).unwrap();
    check_model(&folder, &[damaged]);
    fs::remove_file(&file).unwrap();
    check_model(&folder, &["model.safetensors: no such file", "hint: the weights must be in"]);
}

#[test]
fn an_index_that_does_not_fit_its_shards() {
    let index = "model.safetensors.index.json";
    let folder = copy_of("random/bloom-12-heads", "shards");
    let shards = json(Path::new("random/bloom-12-heads").join(index));
    let first = shards["weight_map"].as_object().unwrap().values().next().unwrap().as_str().unwrap().to_string();
    let write = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut shards = shards.clone();
        edit(&mut shards);
        fs::write(folder.join(index), shards.to_string()).unwrap();
    };
    write(&|shards| shards["weight_map"]["extra.weight"] = first.clone().into());
    check_model(&folder, &[&first, "tensor `extra.weight`: not in the file, though", "hint: "]);
    write(&|shards| shards["weight_map"]["extra.weight"] = "../../secret.safetensors".into());
    check_model(&folder, &[index, "wanted the name of a file in this folder"]);
    write(&|shards| shards["weight_map"] = 7.into());
    check_model(&folder, &[index, "`weight_map` is missing"]);
    write(&|_| ());
    fs::remove_file(folder.join(&first)).unwrap();
    check_model(&folder, &[&format!("{first}: no such file"), "names this shard"]);
    fs::write(folder.join(index), "nonsense").unwrap();
    check_model(&folder, &[index, "is not JSON"]);
}

#[test]
fn nan_and_infinity_in_a_weight() {
    for (name, place) in [
        ("transformer.h.0.self_attention.query_key_value.weight", "value [0, 3] is"),
        ("transformer.word_embeddings.weight", "value [0, 3] is"),
        ("transformer.h.1.post_attention_layernorm.bias", "value [3] is"),
    ] {
        for bad in [f32::NAN, f32::INFINITY] {
            let folder = copy_of(SMALL, "not-finite");
            edit_tensor(&folder, name, |tensor| tensor.data[12..16].copy_from_slice(&bad.to_le_bytes()));
            check_model(&folder, &["model.safetensors", name, place, "only finite values"]);
        }
    }
}

#[test]
fn a_weight_beyond_the_range_of_f16() {
    let folder = copy_of(SMALL, "too-large");
    edit_tensor(&folder, "transformer.word_embeddings.weight", |tensor| {
        tensor.data[12..16].copy_from_slice(&1e5f32.to_le_bytes())
    });
    let parts = [
        "transformer.word_embeddings.weight",
        "value [0, 3] is 100000, too large for F16",
        "hint: load the model with --precision bf16",
    ];
    check_model(&folder, &parts);
}

#[test]
fn a_tokenizer_that_is_missing_or_does_not_parse() {
    let folder = copy_of("tiny-bloom", "tokenizer");
    let generate =
        |folder: &Path| llm8(&["generate", "-q", "-m", folder.to_str().unwrap(), "Debian"]).output().unwrap();
    fs::write(folder.join("tokenizer.json"), "{\"version\": \"1.0\"}").unwrap();
    check_failure(&generate(&folder), 1, &["tokenizer.json: is not a tokenizer"]);
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    check_failure(&generate(&folder), 1, &["tokenizer.json: no such file", "hint: "]);
}

#[test]
fn an_empty_prompt() {
    check_failure(&llm8(&["generate", ""]).output().unwrap(), 1, &["the prompt is empty"]);
    check_failure(&with_stdin(llm8(&["generate"]), b"\n"), 1, &["the prompt is empty"]);
    let missing = llm8(&["generate", "--prompt-file", "no/such/file"]).output().unwrap();
    check_failure(&missing, 1, &["no/such/file: cannot be read"]);
}

#[cfg(unix)]
#[test]
fn a_prompt_that_is_not_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let wanted = "is not UTF-8: byte 3 begins no character";
    let argument = OsString::from_vec(b"abc\xff".to_vec());
    check_failure(&llm8(&[OsString::from("generate"), argument]).output().unwrap(), 1, &["the prompt", wanted]);
    check_failure(&with_stdin(llm8(&["generate"]), b"abc\xff"), 1, &["stdin", wanted]);
    let file = scratch("prompts").join("latin1.txt");
    fs::write(&file, b"abc\xe9t\xe9").unwrap();
    let output = llm8(&["generate", "--prompt-file", file.to_str().unwrap()]).output().unwrap();
    check_failure(&output, 1, &["latin1.txt", wanted]);
}

#[test]
fn ids_outside_the_vocabulary() {
    let output = llm8(&["generate", "-q", "--prompt-ids", "5,5120"]).output().unwrap();
    check_failure(&output, 1, &["token id 5120 is outside the vocabulary of 5120"]);
}

#[test]
fn what_this_machine_or_build_does_not_have() {
    check_failure(
        &llm8(&["generate", "--device", "cuda", "x"]).output().unwrap(),
        1,
        &["no CUDA support", "--device cpu"],
    );
    let output = llm8(&["generate", "-q", "--instruction-set", "mmx", "x"]).output().unwrap();
    check_failure(&output, 1, &["instruction set `mmx` is not available here; there is", "portable"]);
}

#[test]
fn a_module_name_that_matches_nothing() {
    let output = llm8(&["generate", "-q", "--skip-module", "fc1", "x"]).output().unwrap();
    check_failure(&output, 1, &["no linear layer matches the module name `fc1`", "h.0.self_attention.query_key_value"]);
}

#[test]
fn wrong_usage_has_exit_code_2() {
    let cases: [&[&str]; 9] = [
        &["generate", "x", "--temperature", "-1"],
        &["generate", "x", "--temperature", "nan"],
        &["generate", "x", "--top-p", "0"],
        &["generate", "x", "--top-k", "0"],
        &["generate", "x", "--precision", "int4"],
        &["generate", "x", "--device", "tpu"],
        &["generate", "x", "--prompt-ids", "1"],
        &["generate", "x", "--precision", "f16", "--threshold", "5"],
        &["translate", "x"],
    ];
    for args in cases {
        let output = llm8(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).starts_with("error: "), "{}", stderr(&output));
    }
}
