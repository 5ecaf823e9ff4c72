//! `llm8 quantize`, run as a process: what it writes, what it says, what it leaves behind.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use fixtures::*;
use program::*;
use safetensors::Dtype;

/// A place where there is nothing yet, in a folder of its own.
fn place(name: &str) -> PathBuf {
    let folder = scratch(name);
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    folder.join("int8")
}

fn tiny(name: &str) -> String {
    model(name).display().to_string()
}

/// The names in a folder, hidden ones too.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A BLOOM of one block whose weights are a hole in a file: zeros that take no room.
fn hollow_bloom(name: &str, vocab: usize, hidden: usize) -> PathBuf {
    let folder = copy_of("random/bloom-residual", name);
    let mut config = json("random/bloom-residual/config.json");
    for (key, value) in [("vocab_size", vocab), ("hidden_size", hidden), ("n_layer", 1)] {
        config[key] = value.into();
    }
    config["tie_word_embeddings"] = true.into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
        if name.contains(".h.1.") || name.starts_with("lm_head") {
            continue;
        }
        // The model that is copied has a vocabulary of 160 and a width of 32.
        let scaled = |size: usize| if size == 160 { vocab } else { size / 32 * hidden };
        let shape: Vec<usize> = view.shape().iter().map(|&size| scaled(size)).collect();
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = serde_json::Value::Object(header).to_string();
    let start = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    fs::write(folder.join("model.safetensors"), &start).unwrap();
    let file = fs::OpenOptions::new().write(true).open(folder.join("model.safetensors")).unwrap();
    file.set_len((start.len() + end) as u64).unwrap();
    folder
}

#[test]
fn the_checkpoint_writes_the_text_that_the_model_at_int8_writes() {
    let ids = json("golden/tiny-opt/golden.json")["prompts"][4]["ids"].clone();
    let ids: Vec<String> = fixtures::ids(&ids).iter().map(u32::to_string).collect();
    for (name, head) in [("tiny-bloom", false), ("tiny-opt", false), ("tiny-bloom", true)] {
        let place = place(&format!("text-{name}-{head}"));
        let place = place.to_str().unwrap();
        let head: &[&str] = if head { &["--int8-head"] } else { &[] };
        let output = succeeds(&[&["quantize", "-m", &tiny(name), "-o", place], head].concat());
        assert_eq!(stdout(&output), "");
        assert!(stderr(&output).contains("weights in int8"), "{}", stderr(&output));
        let generate = |folder: &str, more: &[&str]| {
            json_of(&[&["generate", "-m", folder, "--prompt-ids", &ids.join(","), "--json", "-n", "24"], more].concat())
        };
        let (found, wanted) = (generate(place, &[]), generate(&tiny(name), head));
        for key in ["ids", "text", "precision"] {
            assert_eq!(found[key], wanted[key], "{name}");
        }
        for key in ["weight_bytes", "weight_bytes_f16"] {
            assert_eq!(found["memory"][key], wanted["memory"][key], "{name}");
        }
    }
}

#[test]
fn json_tells_what_was_written_and_the_tokenizer_goes_along() {
    let place = place("json");
    let args = ["quantize", "-m", &tiny("tiny-opt"), "-o", place.to_str().unwrap(), "--json", "--threshold", "5.5"];
    let report = json_of(&args);
    let file = fs::metadata(place.join("model.safetensors")).unwrap().len();
    assert_eq!(report["bytes"], file);
    assert_eq!(report["shards"], 1);
    assert_eq!(report["threshold"], 5.5);
    assert_eq!(report["int8_head"], false);
    for key in ["model", "output", "source_bytes", "int8_weights", "seconds", "peak_rss_bytes"] {
        assert!(!report[key].is_null(), "{key}");
    }
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"] {
        assert!(fs::read(place.join(name)).unwrap() == fs::read(model("tiny-opt").join(name)).unwrap(), "{name}");
    }
    assert_eq!(names(place.parent().unwrap()), ["int8"]);
}

#[test]
fn the_demonstration_model_can_be_written_out() {
    let place = place("demo");
    fs::create_dir(&place).unwrap();
    succeeds(&["quantize", "-o", place.to_str().unwrap(), "-q", "--shard-size", "1MB"]);
    assert!(place.join("model.safetensors.index.json").exists());
    let text = |more: &[&str]| stdout(&succeeds(&[&["generate", "The package", "-n", "16", "-q"], more].concat()));
    assert_eq!(text(&["-m", place.to_str().unwrap()]), text(&[]));
}

#[test]
fn a_folder_that_holds_something_is_refused_and_left_as_it_is() {
    let place = place("taken");
    fs::create_dir(&place).unwrap();
    fs::write(place.join("thesis.tex"), "dear").unwrap();
    let output = llm8(&["quantize", "-q", "-o", place.to_str().unwrap()]).output().unwrap();
    check_failure(&output, 1, &["int8: is there already, and not empty", "hint: give the name of a new folder"]);
    assert_eq!(names(&place), ["thesis.tex"]);
    let file = place.join("thesis.tex");
    let output = llm8(&["quantize", "-q", "-o", file.to_str().unwrap()]).output().unwrap();
    check_failure(&output, 1, &["thesis.tex: is there already, and is no folder"]);
    assert_eq!(fs::read(&file).unwrap(), b"dear");
    let below = file.join("int8");
    let output = llm8(&["quantize", "-q", "-o", below.to_str().unwrap()]).output().unwrap();
    check_failure(&output, 1, &["thesis.tex/int8"]);
    let nowhere = place.join("no/such/int8");
    let output = llm8(&["quantize", "-q", "-o", nowhere.to_str().unwrap()]).output().unwrap();
    check_failure(&output, 1, &["int8: cannot be made: no folder", "hint: make that folder first"]);
    assert_eq!(names(place.parent().unwrap()), ["int8"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_to_is_told() {
    // Where not even root can make a folder.
    let output = llm8(&["quantize", "-q", "-o", "/proc/self/int8"]).output().unwrap();
    check_failure(&output, 1, &["/proc/self/int8: cannot be made: ", "hint: "]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_without_room_is_told_before_anything_is_written() {
    let folder = hollow_bloom("enormous", 1000, 1 << 19);
    let place = place("full");
    let args = ["quantize", "-q", "-m", folder.to_str().unwrap(), "-o", place.to_str().unwrap()];
    check_failure(&llm8(&args).output().unwrap(), 1, &["int8: needs 3299", "but its disk has only", "hint: "]);
    assert_eq!(names(place.parent().unwrap()), [""; 0]);
}

#[test]
fn a_checkpoint_that_is_damaged_leaves_nothing_behind() {
    let folder = copy_of("random/bloom-residual", "damaged");
    let name = "transformer.h.1.mlp.dense_h_to_4h.weight";
    edit_tensor(&folder, name, |tensor| tensor.data[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    let place = place("from-damaged");
    let args = ["quantize", "-q", "-m", folder.to_str().unwrap(), "-o", place.to_str().unwrap()];
    check_failure(&llm8(&args).output().unwrap(), 1, &[name, "value [0, 0] is NaN"]);
    edit_tensors(&folder, |tensors| tensors.retain(|(other, _)| other != name));
    check_failure(&llm8(&args).output().unwrap(), 1, &["model.safetensors: tensor", name, "not found"]);
    edit_tensors(&folder, |tensors| {
        let tensor = Stored { dtype: Dtype::F32, shape: vec![32, 128], data: vec![0; 4 * 32 * 128] };
        tensors.push((name.to_string(), tensor));
    });
    check_failure(
        &llm8(&args).output().unwrap(),
        1,
        &[name, "has shape [32, 128], but config.json calls for [128, 32]"],
    );
    assert_eq!(names(place.parent().unwrap()), [""; 0]);
}

#[test]
fn footprint_knows_what_an_int8_checkpoint_keeps() {
    let source = fixtures().join("tiny-bloom");
    for (name, flags) in [("head", ["--int8-head"].as_slice()), ("skip", &["--skip-module", "h.1"])] {
        let folder = place(&format!("footprint-{name}"));
        let folder = folder.to_str().unwrap();
        succeeds(&[&["quantize", "-q", "-m", source.to_str().unwrap(), "-o", folder], flags].concat());
        let footprint = json_of(&["footprint", "--json", "-q", "-m", folder]);
        let run = json_of(&["generate", "--json", "-q", "-n", "1", "--prompt-ids", "5", "-m", folder]);
        assert_eq!(footprint["precisions"]["int8"]["total_bytes"], run["memory"]["weight_bytes"], "{name}");
    }
}

#[test]
fn wrong_usage_is_told() {
    let place = place("usage");
    let place = place.to_str().unwrap();
    let quantize = |more: &[&str]| llm8(&[&["quantize", "-q", "-o", place], more].concat()).output().unwrap();
    assert_eq!(quantize(&["--shard-size", "5 bananas"]).status.code(), Some(2));
    assert_eq!(quantize(&["--cache-dtype", "f32"]).status.code(), Some(2), "nothing is cached");
    check_failure(&quantize(&["--skip-module", "dens"]), 1, &["no linear layer matches the module name `dens`"]);
    assert!(!Path::new(place).exists());
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_behind() {
    // Too large to be done before the signal comes.
    let folder = hollow_bloom("long", 250_880, 4096);
    let place = place("interrupted");
    let args = ["quantize", "-m", folder.to_str().unwrap(), "-o", place.to_str().unwrap()];
    let child = llm8(&args).stderr(Stdio::piped()).spawn().unwrap();
    // The signal must find the program at work, which the other name of the folder tells.
    while names(place.parent().unwrap()).is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert_eq!(names(place.parent().unwrap()), [""; 0]);
}
