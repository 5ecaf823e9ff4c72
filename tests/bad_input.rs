//! What a user sees when something is wrong: one line, a hint where there is one, the exit code.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;
#[path = "support/pytorch.rs"]
mod pytorch;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use fixtures::*;
use program::*;
use pytorch::{Pickled, pickle, write_archive};
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
    check_model(&folder, &["config.json: no such file", "hint: is this the folder of a Hugging Face model?"]);
    // The tokenizer, which is missing too, is not blamed.
    let output = llm8(&["generate", "-q", "-m", folder.to_str().unwrap(), "Debian"]).output().unwrap();
    check_failure(&output, 1, &["config.json: no such file"]);
    fs::write(folder.join("config.json"), "{\"model_type\": ").unwrap();
    check_model(&folder, &["config.json: is not JSON"]);
    fs::write(folder.join("config.json"), "[1, 2]").unwrap();
    check_model(&folder, &["config.json: is not a JSON object"]);
}

/// A copy whose config.json has another value under `key`.
fn with_config(copy: &str, key: &str, value: serde_json::Value) -> PathBuf {
    let folder = copy_of(SMALL, copy);
    let mut config = json(Path::new(SMALL).join("config.json"));
    config[key] = value;
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn files_that_are_no_plain_files() {
    let folder = copy_of(SMALL, "not-plain");
    let not_plain = |name: &str| {
        fs::remove_file(folder.join(name)).unwrap();
        fs::create_dir(folder.join(name)).unwrap();
        check_model(&folder, &[name, "is not a plain file"]);
        fs::remove_dir(folder.join(name)).unwrap();
        fs::copy(fixtures().join(SMALL).join(name), folder.join(name)).unwrap();
    };
    not_plain("config.json");
    not_plain("model.safetensors");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    fs::write(folder.join("model.safetensors"), pointer).unwrap();
    check_model(&folder, &["model.safetensors: is a Git LFS pointer", "hint: run `git lfs pull`"]);
    fs::write(folder.join("config.json"), pointer).unwrap();
    check_model(&folder, &["config.json: is a Git LFS pointer"]);
}

#[test]
fn control_characters_in_names_are_escaped() {
    let folder = with_config("escapes", "model_type", "a\nerror: b\u{1b}[31m".into());
    check_model(&folder, &["architecture `a\\nerror: b\\u{1b}[31m` is not supported"]);
}

#[test]
fn a_config_of_another_architecture() {
    let folder = with_config("llama", "model_type", "llama".into());
    check_model(&folder, &["architecture `llama` is not supported", "hint: supported architectures: bloom, opt"]);
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
        (
            "n_layer",
            1.into(),
            "tensor `transformer.h.1.input_layernorm.bias`: is of block 1, counted from 0, but config.json calls for 1 blocks",
        ),
        ("layer_norm_epsilon", 1e300.into(), "`layer_norm_epsilon` is 1e+300, wanted a number above 0"),
        ("n_layer", "two".into(), "`n_layer` is \"two\", wanted a whole number"),
        ("n_layer", serde_json::Value::Null, "`num_hidden_layers` or `n_layer` is missing"),
        ("n_head", 5.into(), "hidden size 32 is not a multiple of 5 heads"),
        ("n_head", 0.into(), "`n_head` is 0, wanted a whole number from 1"),
        ("layer_norm_epsilon", (-1).into(), "`layer_norm_epsilon` is -1, wanted a number above 0"),
        ("apply_residual_connection_post_layernorm", "yes".into(), "wanted true or false"),
        ("eos_token_id", "</s>".into(), "wanted a token id or a list of them"),
        (
            "quantization_config",
            serde_json::json!({ "load_in_8bit": true, "llm_int8_threshold": -1 }),
            "`quantization_config.llm_int8_threshold` is -1, wanted 0 or a number above 0",
        ),
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

/// A folder with the config of a small BLOOM and a pytorch_model.bin.
fn with_bin(copy: &str, pickle: &[u8], storages: &[(String, Vec<u8>)]) -> PathBuf {
    let folder = scratch(copy);
    fs::copy(fixtures().join(SMALL).join("config.json"), folder.join("config.json")).unwrap();
    write_archive(&folder.join("pytorch_model.bin"), pickle, storages);
    folder
}

/// The embedding of that BLOOM, (160, 32) in f32, and its storage.
fn embedding() -> (Pickled, Vec<(String, Vec<u8>)>) {
    let tensor = Pickled::whole("transformer.word_embeddings.weight", "FloatStorage", "0", &[160, 32]);
    (tensor, vec![("0".to_string(), vec![0; 160 * 32 * 4])])
}

#[test]
fn a_pickle_that_would_run_something() {
    let marker = scratch("pickle-calls").join("was-run");
    let command = format!("touch {}", marker.display());
    let calls = [
        (format!("\u{2}cos\nsystem\n(X{{}}{command}tR."), "os.system"),
        (format!("\u{2}cposix\nsystem\n(X{{}}{command}tR."), "posix.system"),
        (format!("\u{2}cbuiltins\neval\n(X{{}}{command}tR."), "builtins.eval"),
        // INST calls without REDUCE.
        (format!("\u{2}(X{{}}{command}ios\nsystem\n."), "opcode 0x69"),
    ];
    for (index, (program, named)) in calls.into_iter().enumerate() {
        let mut bytes = vec![0x80];
        let (before, after) = program.split_once("{}").unwrap();
        bytes.extend(before.bytes());
        bytes.extend((command.len() as u32).to_le_bytes());
        bytes.extend(after.bytes());
        let folder = with_bin(&format!("pickle-call-{index}"), &bytes, &[]);
        check_model(&folder, &["pytorch_model.bin: its pickle", named, "which no checkpoint needs; nothing was run"]);
    }
    assert!(!marker.exists());
}

#[test]
fn a_pickle_that_makes_no_sense() {
    let whole = pickle(&[embedding().0]);
    let cases: [(&[u8], &str); 8] = [
        (b"", "ends in the middle"),
        (&whole[..whole.len() / 2], "ends in the middle"),
        (b"\x80\x02N.", "holds no dictionary of tensors"),
        (b"\x80\x02R.", "takes from an empty stack"),
        (b"\x80\x02u.", "takes from an empty stack"),
        (b"\x80\x02h\x07.", "recalls what it never stored"),
        // A text of 4 GB.
        (b"\x80\x02X\xff\xff\xff\xff.", "ends in the middle"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "has a text that is not UTF-8"),
    ];
    for (index, (pickle, wanted)) in cases.into_iter().enumerate() {
        check_model(&with_bin(&format!("pickle-{index}"), pickle, &[]), &["pytorch_model.bin: its pickle", wanted]);
    }
}

#[test]
fn a_pickle_that_names_large_things_again_and_again() {
    // A name of 1 MiB and a shape of 200,000 dimensions, kept once and used 20,000 times.
    let name = [&b"\x80\x02}X\x00\x00\x10\x00"[..], &[b'a'; 1 << 20], b"q\x00"].concat();
    let names = [&name[..], &b"h\x00Ns".repeat(20_000), b"."].concat();
    check_model(&with_bin("pickle-names", &names, &[]), &["its pickle has a name of 1048576 bytes"]);
    let mut shape = b"\x80\x02(".to_vec();
    shape.extend(b"K\x01".repeat(200_000));
    shape.extend(b"tq\x000ctorch._utils\n_rebuild_tensor_v2\nq\x01((");
    shape.extend(b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQq\x02");
    shape.extend(b"K\x00h\x00h\x00tR.");
    check_model(&with_bin("pickle-shapes", &shape, &[]), &["its pickle has a tensor of 200000 dimensions"]);
}

#[test]
fn a_pickled_tensor_that_does_not_fit_its_storage() {
    let (whole, storages) = embedding();
    let name = whole.name.clone();
    let beyond = "reaches beyond its storage of 5120 elements";
    type Edit<'a> = &'a dyn Fn(&mut Pickled);
    let cases: [(Edit, &str); 9] = [
        (&|tensor| tensor.storage_len = 1 << 30, "its storage `0` holds 5120 elements, but should hold 1073741824"),
        (&|tensor| tensor.shape = vec![161, 32], beyond),
        (
            &|tensor| tensor.shape = vec![i32::MAX, i32::MAX, i32::MAX],
            "has shape [2147483647, 2147483647, 2147483647], but strides",
        ),
        (&|tensor| tensor.strides = vec![i32::MAX, i32::MAX], beyond),
        (&|tensor| tensor.offset = 1, beyond),
        (&|tensor| tensor.offset = i32::MAX, beyond),
        (&|tensor| tensor.strides = vec![1, 160], "wanted one row after the other"),
        (&|tensor| tensor.strides = vec![0, 0], "wanted one row after the other"),
        (&|tensor| tensor.key = "7".to_string(), "its storage `7` is not in the file"),
    ];
    for (index, (edit, wanted)) in cases.into_iter().enumerate() {
        let mut tensor = whole.clone();
        edit(&mut tensor);
        let folder = with_bin(&format!("tensor-{index}"), &pickle(&[tensor]), &storages);
        check_model(&folder, &["pytorch_model.bin", &name, wanted]);
    }
    let mut negative = whole.clone();
    negative.offset = -1;
    check_model(&with_bin("tensor-negative", &pickle(&[negative]), &storages), &["its pickle has the size -1"]);
    let mut absurd = whole.clone();
    (absurd.shape, absurd.strides) = (vec![i32::MAX; 3], vec![1; 3]);
    check_model(&with_bin("tensor-absurd", &pickle(&[absurd]), &storages), &[&name, beyond]);
    // What is right is read: only the rest of the model is missing.
    check_model(
        &with_bin("tensor-whole", &pickle(&[whole]), &storages),
        &["word_embeddings_layernorm.weight`: not found"],
    );
}

#[test]
fn a_bin_file_that_is_truncated_compressed_or_something_else() {
    let folder = copy_of("random/bloom-bin", "bin-damaged");
    let file = folder.join("pytorch_model.bin");
    let whole = fs::read(&file).unwrap();
    let damaged = "pytorch_model.bin: damaged or incomplete PyTorch checkpoint";
    for len in [0, 10, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..len]).unwrap();
        check_model(&folder, &[damaged]);
    }
    fs::write(&file, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").unwrap();
    check_model(&folder, &["in the form that PyTorch had before version 1.6"]);
    let mut archive = zip::ZipWriter::new(fs::File::create(&file).unwrap());
    archive.start_file("readme.txt", zip::write::SimpleFileOptions::default()).unwrap();
    archive.finish().unwrap();
    check_model(&folder, &["a zip archive without data.pkl"]);
}

#[test]
fn any_damage_to_a_bin_file_is_an_error_and_never_a_panic() {
    // Bytes all over the pickle and the zip's directory; a change may also do no harm.
    let folder = copy_of("random/bloom-bin", "bin-flipped");
    let file = folder.join("pytorch_model.bin");
    let whole = fs::read(&file).unwrap();
    let args = ["generate", "-q", "--prompt-ids", "5", "-n", "1", "-m", folder.to_str().unwrap()];
    for at in (0..4096).chain(whole.len() - 2048..whole.len()).step_by(23) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0xa5;
        fs::write(&file, &flipped).unwrap();
        let output = llm8(&args).output().unwrap();
        if !output.status.success() {
            check_failure(&output, 1, &[]);
        }
    }
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
    write(&|shards| shards["weight_map"] = serde_json::json!({}));
    check_model(&folder, &[index, "`weight_map` names no tensor"]);
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
fn a_vocabulary_or_merges_that_make_no_tokenizer() {
    let folder = copy_of("tiny-opt", "vocabulary");
    let generate = || llm8(&["generate", "-q", "-m", folder.to_str().unwrap(), "Debian"]).output().unwrap();
    let merges = fs::read(folder.join("merges.txt")).unwrap();
    fs::write(folder.join("merges.txt"), "one two three\n").unwrap();
    check_failure(&generate(), 1, &["merges.txt: does not make a tokenizer with vocab.json"]);
    fs::write(folder.join("merges.txt"), b"\xff \xff\n").unwrap();
    check_failure(&generate(), 1, &["merges.txt: is not UTF-8"]);
    fs::remove_file(folder.join("merges.txt")).unwrap();
    check_failure(&generate(), 1, &["merges.txt: no such file", "hint: "]);
    fs::write(folder.join("merges.txt"), merges).unwrap();
    fs::write(folder.join("vocab.json"), "{\"a\": 1}").unwrap();
    check_failure(&generate(), 1, &["vocab.json: has no token `</s>`, with which texts begin"]);
    fs::write(folder.join("vocab.json"), "[").unwrap();
    check_failure(&generate(), 1, &["vocab.json: is not JSON"]);
    fs::write(folder.join("tokenizer_config.json"), "nonsense").unwrap();
    check_failure(&generate(), 1, &["tokenizer_config.json: is not JSON"]);
}

#[test]
fn a_prompt_that_is_longer_than_the_model_has_positions() {
    let folder = fixtures().join("random/opt-odd");
    let ids = (0..21).map(|_| "5").collect::<Vec<_>>().join(",");
    let output = llm8(&["generate", "-q", "-m", folder.to_str().unwrap(), "--prompt-ids", &ids]).output().unwrap();
    check_failure(&output, 1, &["the prompt has 21 tokens, but the model has only 20 positions", "hint: "]);
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
    check_failure(&output, 1, &["the prompt has token id 5120, which is outside the vocabulary of 5120"]);
}

#[test]
fn what_this_machine_or_build_does_not_have() {
    let output = llm8(&["generate", "-q", "--instruction-set", "a\nb", "x"]).output().unwrap();
    check_failure(&output, 1, &["instruction set `a\\nb` is not available here; there is", "portable"]);
    let output = llm8(&["generate", "-q", "--instruction-set", "mmx", "x"]).output().unwrap();
    check_failure(&output, 1, &["instruction set `mmx` is not available here; there is", "portable"]);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_cuda_device_in_a_build_without_cuda() {
    let commands: [&[&str]; 3] = [&["generate", "x"], &["compare", "x"], &["bench", "--dummy-weights"]];
    for command in commands {
        for device in ["cuda", "cuda:0", "cuda:3"] {
            let output = llm8(&[command, &["--device", device]].concat()).output().unwrap();
            let hint = "hint: build it with `make cuda`, which runs `cargo build --release --features cuda`";
            check_failure(&output, 1, &["--device cuda: this llm8 has no CUDA support", hint, "--device cpu"]);
        }
    }
}

#[test]
fn a_module_name_that_matches_nothing() {
    let output = llm8(&["generate", "-q", "--skip-module", "fc1", "x"]).output().unwrap();
    check_failure(&output, 1, &["no linear layer matches the module name `fc1`", "h.0.self_attention.query_key_value"]);
}

#[test]
fn wrong_usage_has_exit_code_2() {
    let cases: [&[&str]; 18] = [
        &["generate", "x", "--temperature", "-1"],
        &["generate", "x", "--temperature", "1e46"],
        &["generate", "x", "--top-p", "1e-50"],
        &["generate", "x", "--repetition-penalty", "1e-45"],
        &["generate", "x", "--threshold", "1e-50"],
        &["generate", "x", "--temperature", "nan"],
        &["generate", "x", "--top-p", "0"],
        &["generate", "x", "--top-k", "-1"],
        &["generate", "x", "--precision", "int4"],
        &["generate", "x", "--device", "gpu"],
        &["generate", "x", "--device", "cpu:1"],
        &["generate", "x", "--device", "cuda:"],
        &["generate", "x", "--device", "cuda:first"],
        &["bench", "--device", "CUDA"],
        &["quantize", "-o", "no/such/folder", "--device", "cuda"],
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

#[test]
fn a_model_that_is_too_large_for_the_memory() {
    let folder = scratch("beyond-memory");
    let config = |layers: u64| {
        let config = format!(
            r#"{{"model_type": "bloom", "vocab_size": 1000, "hidden_size": 4096, "n_layer": {layers}, "n_head": 32}}"#
        );
        fs::write(folder.join("config.json"), config).unwrap();
    };
    let generate = |more: &[&str]| {
        let args = [&["generate", "-q", "--prompt-ids", "5", "-m", folder.to_str().unwrap()], more].concat();
        llm8(&args).output().unwrap()
    };
    config(1_000_000);
    let least = "hint: int8 with an int8 head and a cache in int8, which is the least, needs ";
    let parts = [
        "/beyond-memory: int8 needs ",
        " TB of memory with 129 tokens in the cache, but ",
        " is free",
        least,
        "--force",
    ];
    check_failure(&generate(&[]), 1, &parts);
    let smallest = generate(&["--int8-head", "--cache-dtype", "int8"]);
    let together = ["compare", "-q", "--together", "-n", &usize::MAX.to_string(), "hi"];
    check_failure(&llm8(&together).output().unwrap(), 1, &["f16 and int8 need ", "hint: "]);
    check_failure(&smallest, 1, &[": int8 + head needs ", "hint: there is no smaller way to hold it; --force"]);
    // A block takes 403 MB at f16 and half of that at int8: as many as make two thirds of what is free.
    let footprint = json_of(&["footprint", "--json", "-q", "-m", folder.to_str().unwrap()]);
    let available = footprint["machine"]["available_bytes"].as_u64().unwrap();
    config(available / 300_000_000);
    check_failure(
        &generate(&["--precision", "f16"]),
        1,
        &["f16 needs ", "hint: with --precision int8 it needs ", "which would fit"],
    );
    // The same with a cache of 67 MB a block for 2,048 tokens, which the hint keeps.
    config(available / 390_000_000);
    check_failure(
        &generate(&["--precision", "f16", "--cache-dtype", "f32", "-n", "2047"]),
        1,
        &["f16 needs ", "hint: with --precision int8 --cache-dtype f32 it needs ", "which would fit"],
    );
    // What is free does, and with --force what is not: then the weights are looked for.
    check_failure(&generate(&[]), 1, &["model.safetensors: no such file"]);
    check_failure(&generate(&["--precision", "f16", "--force"]), 1, &["model.safetensors: no such file"]);
    // After 20,000 tokens a block has 0.33 GB of them in 16 bits, half of that in 8, and 0.2 GB of weights.
    config(available / 450_000_000);
    let in_folder = ["-q", "-m", folder.to_str().unwrap()];
    let parts = [": int8 needs ", "20,001 tokens", "hint: with --cache-dtype int8 it needs ", "fewer tokens"];
    let bench = ["bench", "--dummy-weights", "--prompt-len=0", "--gen-len=1", "--context=20000"];
    check_failure(&llm8(&[&bench[..], &in_folder].concat()).output().unwrap(), 1, &parts);
    // As many tokens as are asked for count.
    check_failure(&generate(&["-n", "20000"]), 1, &parts);
    let compare = ["compare", "--prompt-ids", "5", "-n", "20000"];
    let parts = [
        ": f16 needs ",
        "20,001 tokens",
        "hint: with generate --precision int8 --cache-dtype int8 it needs ",
        "fewer tokens",
    ];
    check_failure(&llm8(&[&compare[..], &in_folder].concat()).output().unwrap(), 1, &parts);
}
