//! `llm8 footprint` as a process.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;

use std::fs;
use std::path::{Path, PathBuf};

use fixtures::*;
use program::*;
use safetensors::Dtype;

/// A small model: BLOOM, hidden 32, 2 layers, one f32 file, a separate head.
const SMALL: &str = "random/bloom-residual";

fn footprint(folder: &Path, more: &[&str]) -> std::process::Output {
    let mut command = llm8(&["footprint", "-m"]);
    command.arg(folder).args(more).output().unwrap()
}

fn fails(folder: &Path, parts: &[&str]) {
    check_failure(&footprint(folder, &[]), 1, parts);
    check_failure(&footprint(folder, &["--json"]), 1, parts);
}

/// A folder with a config.json alone: a fixture's, with another value under `key`.
fn config_only(name: &str, key: &str, value: serde_json::Value) -> PathBuf {
    let folder = scratch(name);
    let mut config = json(Path::new(SMALL).join("config.json"));
    config[key] = value;
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn published_models_are_known_by_name() {
    let report = json_of(&["footprint", "-m", "bigscience/bloom-7b1", "--json"]);
    assert_eq!(report["model"], "bigscience/bloom-7b1");
    assert_eq!(report["architecture"], "bloom");
    assert_eq!(report["parameters"], 7_069_016_064_u64);
    assert_eq!(report["disk"], serde_json::Value::Null);
    for precision in ["f32", "f16", "int8", "int8_head"] {
        let weights = &report["precisions"][precision];
        let components = weights["components"].as_object().unwrap();
        assert_eq!(components.len(), 5);
        let sum: u64 = components.values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(weights["total_bytes"], sum, "{precision}");
        let needed =
            sum + report["context"]["kv_cache_bytes"].as_u64().unwrap() + report["overhead_bytes"].as_u64().unwrap();
        assert_eq!(report["needed_bytes"][precision], needed, "{precision}");
    }
    for component in ["embedding", "attention", "mlp", "norms_and_biases", "scales"] {
        assert!(report["precisions"]["int8"]["components"][component].as_u64().unwrap() > 0, "{component}");
    }
    assert_eq!(format!("{:.2}", report["ratio_f16_int8"].as_f64().unwrap()), "1.74");
    let a_thousand = report["kv_cache_bytes_per_1000_tokens"].as_u64().unwrap();
    assert_eq!(report["longest_context"]["tokens"], 2048);
    assert_eq!(report["longest_context"]["kv_cache_bytes"], a_thousand / 1000 * 2048);
    // One card with 12 GB does for int8 and not for 16 bits.
    let gpu = &report["gpus"][0];
    assert_eq!(gpu["name"], "RTX 3060 12 GB");
    assert_eq!(gpu["needed"]["int8"], 1);
    assert_eq!(gpu["needed"]["f16"], 2);
}

#[test]
fn the_text_has_the_published_figures() {
    let output = succeeds(&["footprint", "-m", "bigscience/bloomz-7b1"]);
    let text = stdout(&output);
    assert_eq!(stderr(&output), "");
    let line = |start: &str| {
        text.lines().find(|line| line.trim_start().starts_with(start)).unwrap_or_else(|| panic!("{text}"))
    };
    let weights = line("weights ");
    for figure in ["28.28 GB", "14.14 GB", "8.10 GB", "7.08 GB"] {
        assert!(weights.contains(figure), "{weights}");
    }
    assert!(line("smaller than").contains("1.74x"));
    assert!(line("int8 + head").contains('█'), "{text}");
    line("L4 24 GB");
    line("KV cache in int16: ");
    line("No weight files here");
    assert!(text.lines().all(|line| line.chars().count() <= 110 && line.trim_end() == line), "{text}");
    let larger = stdout(&succeeds(&["footprint", "-m", "bigscience/bloom"]));
    assert!(larger.contains("352.5 GB") && larger.contains("179.9 GB"), "{larger}");
    let opt = stdout(&succeeds(&["footprint", "-m", "facebook/opt-6.7b"]));
    assert!(opt.contains("13.32 GB") && opt.contains("6.88 GB"), "{opt}");
}

#[test]
fn a_folder_may_hold_the_config_alone() {
    let alone = config_only("config-alone", "use_cache", true.into());
    let whole = fixtures().join(SMALL);
    let report = |folder: &Path| json_of(&["footprint", "--json", "-m", folder.to_str().unwrap()]);
    let (found, wanted) = (report(&alone), report(&whole));
    assert_eq!(found["precisions"], wanted["precisions"]);
    assert_eq!(found["disk"], serde_json::Value::Null);
    assert_eq!(wanted["disk"]["bytes_by_dtype"]["F32"], wanted["parameters"].as_u64().unwrap() * 4);
    assert_eq!(wanted["disk"]["is_int8"], false);
    // Shards that have not been fetched yet, or are pointers only.
    fs::copy(
        fixtures().join("random/bloom-12-heads/model.safetensors.index.json"),
        alone.join("model.safetensors.index.json"),
    )
    .unwrap();
    assert_eq!(report(&alone)["disk"], serde_json::Value::Null);
    fs::write(
        alone.join("model.safetensors"),
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    )
    .unwrap();
    assert_eq!(report(&alone)["disk"], serde_json::Value::Null);
}

#[test]
fn what_is_on_disk_is_told() {
    let int8 = fixtures().join("bnb/opt/bnb_int8");
    let report = json_of(&["footprint", "--json", "-m", int8.to_str().unwrap()]);
    assert_eq!(report["disk"]["is_int8"], true);
    let text = stdout(&footprint(&int8, &[]));
    assert!(text.contains("an int8 checkpoint"), "{text}");
    let shards = fixtures().join("random/opt-sharded-bin");
    let text = stdout(&footprint(&shards, &[]));
    assert!(text.contains("On disk: 2 files"), "{text}");
}

#[test]
fn without_a_model_it_is_the_demonstration_model() {
    let output = succeeds(&["footprint"]);
    assert!(stderr(&output).contains("demonstration model"));
    assert!(stdout(&output).contains("an int8 checkpoint"));
    assert_eq!(stderr(&succeeds(&["footprint", "-q"])), "");
}

#[test]
fn the_cache_is_what_a_run_takes() {
    let folder = model("tiny-bloom");
    let folder = folder.to_str().unwrap();
    // 64 tokens, a block of a cache: 60 of the prompt and 4 that are fed back.
    let ids = vec!["5"; 60].join(",");
    let run = json_of(&["generate", "--json", "--ignore-eos", "-n", "5", "--prompt-ids", &ids, "-m", folder]);
    let report = json_of(&["footprint", "--json", "--context", "64", "-m", folder]);
    assert_eq!(report["context"]["tokens"], 64);
    assert_eq!(run["memory"]["kv_cache_bytes"], report["context"]["kv_cache_bytes"]);
    assert_eq!(run["memory"]["weight_bytes"], report["precisions"]["int8"]["total_bytes"]);
    for dtype in ["int8", "int16", "f16", "f32"] {
        let more = ["--json", "--cache-dtype", dtype, "-m", folder];
        let run = json_of(&[&["generate", "--ignore-eos", "-n", "5", "--prompt-ids", &ids], &more[..]].concat());
        let report = json_of(&[&["footprint", "--context", "64"], &more[..]].concat());
        assert_eq!(report["cache_dtype"], dtype);
        assert_eq!(run["memory"]["kv_cache_bytes"], report["context"]["kv_cache_bytes"], "{dtype}");
    }
}

#[test]
fn pictures_are_whole_files() {
    let folder = scratch("pictures");
    let (svg, html) = (folder.join("footprint.svg"), folder.join("footprint.html"));
    fs::write(&svg, "<svg>an older picture</svg>").unwrap();
    let output =
        llm8(&["footprint", "-q", "-m", "bigscience/bloom", "--svg"]).arg(&svg).arg("--html").arg(&html).output();
    assert!(output.unwrap().status.success());
    let (svg, html) = (fs::read_to_string(svg).unwrap(), fs::read_to_string(html).unwrap());
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{svg}");
    for figure in ["352.5 GB", "179.9 GB", "bigscience/bloom", "prefers-color-scheme: dark"] {
        assert!(svg.contains(figure) && html.contains(figure), "{figure}");
    }
    assert!(html.starts_with("<!DOCTYPE html>") && html.ends_with("</html>"), "{html}");
    assert!(!html.contains("http://") || html.matches("http://").count() == html.matches("http://www.w3.org/").count());
    // Nothing else was left behind.
    assert_eq!(fs::read_dir(folder).unwrap().count(), 2);
}

#[test]
fn pictures_that_cannot_be_written() {
    let model = fixtures().join(SMALL);
    check_failure(
        &footprint(&model, &["--svg", "no/such/folder/a.svg"]),
        1,
        &["no/such/folder/a.svg: cannot be written: there is no folder no/such/folder\n"],
    );
    let folder = scratch("not-a-file");
    let folder = folder.to_str().unwrap();
    check_failure(&footprint(&model, &["--html", folder]), 1, &["cannot be written: it is not a plain file"]);
    let page = format!("{folder}/none/page.html");
    check_failure(
        &footprint(&model, &["--html", &page]),
        1,
        &["none/page.html: cannot be written: there is no folder"],
    );
    check_failure(&footprint(&model, &["--svg", "/dev/null"]), 1, &["/dev/null: cannot be written"]);
    // What is no picture is not taken for one.
    let weights = Path::new(folder).join("model.safetensors");
    fs::write(&weights, "weights").unwrap();
    let output = footprint(&model, &["--svg", weights.to_str().unwrap()]);
    check_failure(&output, 1, &["model.safetensors: cannot be written: it is there already, and no page or picture"]);
    assert_eq!(fs::read_to_string(weights).unwrap(), "weights");
}

#[test]
fn names_and_folders_that_there_are_not() {
    fails(Path::new("./bigscience/bloom-2b5"), &["./bigscience/bloom-2b5: no such folder"]);
    fails(&fixtures().join("heldout.txt"), &["heldout.txt: not a folder"]);
    assert_eq!(footprint(&fixtures().join(SMALL), &["--context", "0"]).status.code(), Some(2));
}

#[test]
fn configs_that_are_broken() {
    let folder = scratch("no-config");
    let _ = fs::remove_file(folder.join("config.json"));
    fails(&folder, &["config.json: no such file"]);
    fs::write(folder.join("config.json"), "{\"model_type\": ").unwrap();
    fails(&folder, &["config.json: is not JSON"]);
    fails(
        &config_only("llama", "model_type", "llama".into()),
        &["architecture `llama` is not supported", "bloom, opt"],
    );
    fails(&config_only("no-layers", "n_layer", 0.into()), &["`n_layer` is 0, wanted a whole number from 1"]);
    let folder = config_only("immense", "vocab_size", (1 << 24).into());
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    config["hidden_size"] = (1 << 24).into();
    config["n_layer"] = (1 << 24).into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fails(&folder, &["config.json: calls for", "parameters, wanted"]);
}

#[test]
fn headers_that_contradict_the_config_or_are_damaged() {
    let name = "transformer.h.1.mlp.dense_h_to_4h.weight";
    let folder = copy_of(SMALL, "tensor-missing");
    edit_tensors(&folder, |tensors| tensors.retain(|(other, _)| other != name));
    fails(&folder, &["model.safetensors: tensor `transformer.h.1.mlp.dense_h_to_4h.weight`: not found", "hint: "]);
    edit_tensors(&folder, |tensors| tensors.retain(|(other, _)| other != "transformer.word_embeddings.weight"));
    fails(&folder, &["tensor `transformer.word_embeddings.weight`: not found, with any known prefix"]);
    let folder = copy_of(SMALL, "tensor-shape");
    edit_tensor(&folder, name, |tensor| tensor.shape.reverse());
    fails(&folder, &[name, "has shape [32, 128], but config.json calls for [128, 32]"]);
    let folder = copy_of(SMALL, "tensor-dtype");
    edit_tensor(&folder, name, |tensor| tensor.dtype = Dtype::I32);
    fails(&folder, &[name, "is I32, wanted F32, F16 or BF16"]);
    let folder = copy_of(SMALL, "tensor-int8-without-scales");
    edit_tensor(&folder, name, |tensor| {
        tensor.dtype = Dtype::I8;
        tensor.data.truncate(128 * 32);
    });
    fails(&folder, &["tensor `transformer.h.1.mlp.dense_h_to_4h.SCB`: not found"]);
    let folder = copy_of(SMALL, "fewer-blocks");
    let mut config = json(Path::new(SMALL).join("config.json"));
    config["n_layer"] = 1.into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fails(&folder, &["is of block 1, counted from 0, but config.json calls for 1 blocks"]);

    for (file, fixture) in [("model.safetensors", SMALL), ("pytorch_model.bin", "random/bloom-bin")] {
        let folder = copy_of(fixture, &format!("cut-{file}"));
        let bytes = fs::read(folder.join(file)).unwrap();
        for len in [0, 4, 100, bytes.len() - 1] {
            fs::write(folder.join(file), &bytes[..len]).unwrap();
            fails(&folder, &[file, "damaged or incomplete"]);
        }
        fs::write(folder.join(file), [0xff; 64]).unwrap();
        fails(&folder, &[file, "damaged or incomplete"]);
    }
}
