//! `llm8 generate`, run as a process: texts, streams, exit codes.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;

use std::io::Read;
use std::process::{Command, Stdio};

use fixtures::*;
use program::*;
use serde_json::Value;

fn tiny_bloom() -> String {
    model("tiny-bloom").display().to_string()
}

fn comma_separated(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn greedy_text_and_ids_equal_the_reference() {
    for prompt in json("golden/tiny-bloom/golden.json")["prompts"].as_array().unwrap() {
        let (text, wanted) = (prompt["text"].as_str().unwrap(), &prompt["greedy_ids"]);
        let args = ["generate", "-m", &tiny_bloom(), "--precision", "f32", "--json", "-n", "32", "--", text];
        let found = json_of(&args);
        assert_eq!(found["prompt_ids"], prompt["ids"]);
        assert_eq!(found["ids"], *wanted, "{text:?}");
        let whole = prompt["greedy_text"].as_str().unwrap().trim_end_matches(char::REPLACEMENT_CHARACTER);
        assert_eq!(found["text"], whole, "{text:?}");
        assert_eq!(found["finish_reason"], "length");
    }
}

#[test]
fn the_demonstration_model_is_the_int8_form_of_the_fixture() {
    let tail = ["--prompt-ids", "404,583,2540,319", "--json", "-n", "48", "-q"];
    let demo = json_of(&[&["generate"], &tail[..]].concat());
    let quantised_here = json_of(&[&["generate", "-m", &tiny_bloom()], &tail[..]].concat());
    assert_eq!(demo["ids"], quantised_here["ids"]);
    assert_eq!(demo["text"], quantised_here["text"]);
    assert_eq!(demo["memory"]["weight_bytes"], quantised_here["memory"]["weight_bytes"]);
    assert_eq!(demo["precision"], "int8");
}

#[test]
fn every_precision_runs_and_counts_its_bytes() {
    let bytes = |precision: &str, more: &[&str]| {
        let args = ["generate", "--precision", precision, "--json", "-n", "2", "Debian"];
        let report = json_of(&[&args[..], more].concat());
        assert_eq!(report["memory"]["weight_bytes_f16"], 8_941_568);
        report["memory"]["weight_bytes"].as_u64().unwrap()
    };
    assert_eq!(bytes("f32", &[]), 17_883_136);
    assert_eq!(bytes("f16", &[]), 8_941_568);
    assert_eq!(bytes("bf16", &[]), 8_941_568);
    assert_eq!(bytes("int8", &[]), 5_832_704);
    assert_eq!(bytes("int8", &["--int8-head"]), 4_542_464);
    assert_eq!(bytes("int8", &["--threshold", "0", "--skip-module", "mlp"]), 5_832_704 + 4 * (2 * 262_144 - 4 * 1_280));
}

#[test]
fn every_instruction_set_writes_the_same_text() {
    let text = |name: &str| {
        let args = ["generate", "The package", "-n", "48", "-q", "--instruction-set", name];
        let output = llm8(&args).output().unwrap();
        output.status.success().then(|| stdout(&output)).ok_or(stderr(&output))
    };
    let portable = text("portable").unwrap();
    assert!(portable.len() > 48);
    for name in ["avx2", "avx-vnni", "avx512-vnni-256", "avx512-vnni", "neon-dotprod"] {
        match text(name) {
            Ok(found) => assert_eq!(found, portable, "{name}"),
            Err(error) => assert!(error.contains("is not available here"), "{error}"),
        }
    }
}

#[test]
fn the_device_is_chosen_by_name_and_told() {
    let report = |device: &[&str]| {
        let args = ["generate", "The package", "-n", "24", "--json", "-q"];
        json_of(&[&args[..], device].concat())
    };
    let cpu = report(&["--device", "cpu"]);
    assert_eq!((&cpu["device"], &cpu["device_name"]), (&Value::from("cpu"), &Value::Null));
    for key in ["device_bytes", "peak_device_bytes"] {
        assert_eq!(cpu["memory"].get(key), Some(&Value::Null), "{key}");
    }
    // No CUDA device can be seen here, whatever the build.
    for auto in [report(&[]), report(&["--device", "auto"])] {
        assert_eq!((&auto["device"], &auto["ids"], &auto["text"]), (&cpu["device"], &cpu["ids"], &cpu["text"]));
    }
}

#[test]
fn text_goes_to_stdout_and_everything_else_to_stderr() {
    let args = ["generate", "The Debian project", "-n", "8"];
    let output = succeeds(&args);
    let report = json_of(&[&args[..], &["--json"]].concat());
    assert_eq!(stdout(&output), format!("{}\n", report["text"].as_str().unwrap()));
    let stderr = stderr(&output);
    assert!(stderr.contains("demonstration model") && stderr.contains("--model"), "{stderr}");
    assert!(stderr.contains("int8 weights 5.83 MB (1.53x smaller than 16-bit)"), "{stderr}");
    assert!(stderr.contains("generated 8 tokens"), "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "no progress bar where stderr is no terminal: {stderr}");
    assert_eq!(program::stderr(&succeeds(&[&args[..], &["--quiet"]].concat())), "");
}

#[test]
fn json_has_the_documented_keys() {
    let report = json_of(&["generate", "Debian", "-n", "3", "--json"]);
    for key in ["model", "precision", "cache_dtype", "device", "prompt_ids", "ids", "text", "finish_reason"] {
        assert!(!report[key].is_null(), "{key}");
    }
    let timings = ["load", "prompt", "generation"].map(|part| format!("{part}_seconds"));
    let rates = ["prompt", "generation"].map(|part| format!("{part}_tokens_per_second"));
    for key in timings.iter().chain(&rates) {
        assert!(report["timings"][key].as_f64().is_some_and(|value| value > 0.0), "{key}");
    }
    for key in ["weight_bytes", "weight_bytes_f16", "kv_cache_bytes", "peak_rss_bytes"] {
        assert!(report["memory"][key].as_u64().is_some_and(|value| value > 0), "{key}");
    }
}

#[test]
fn a_cache_takes_the_memory_of_its_dtype() {
    let cache_bytes = |dtype: &str| {
        let report = json_of(&["generate", "Debian", "-n", "3", "--json", "--cache-dtype", dtype]);
        assert_eq!(report["cache_dtype"], dtype);
        report["memory"]["kv_cache_bytes"].as_u64().unwrap()
    };
    assert_eq!(cache_bytes("f32"), 2 * cache_bytes("f16"));
    let with_scales = cache_bytes("int16");
    assert!(cache_bytes("f16") < with_scales && with_scales < cache_bytes("f32"), "{with_scales}");
    let in_8_bits = cache_bytes("int8");
    assert!(in_8_bits < cache_bytes("f16") && with_scales < 2 * in_8_bits, "{in_8_bits}");
}

#[test]
fn a_prompt_comes_from_an_argument_a_file_or_stdin() {
    let wanted = stdout(&succeeds(&["generate", "Debian is", "-n", "6", "-q"]));
    let file = scratch("prompts").join("prompt.txt");
    std::fs::write(&file, "Debian is\n").unwrap();
    let from_file = succeeds(&["generate", "--prompt-file", file.to_str().unwrap(), "-n", "6", "-q"]);
    assert_eq!(stdout(&from_file), wanted);
    let command = llm8(&["generate", "-", "-n", "6", "-q"]);
    assert_eq!(stdout(&with_stdin(command, b"Debian is\r\n")), wanted);
    assert_eq!(stdout(&with_stdin(llm8(&["generate", "-n", "6", "-q"]), b"Debian is")), wanted);
}

#[test]
fn a_seed_draws_the_same_text_and_another_seed_another() {
    let text = |more: &[&str]| {
        let args = ["generate", "The Debian project", "--temperature", "0.9", "-n", "32", "-q"];
        stdout(&succeeds(&[&args[..], more].concat()))
    };
    assert_eq!(text(&["--seed", "1"]), text(&["--seed", "1"]));
    assert_ne!(text(&["--seed", "1"]), text(&["--seed", "2"]));
    let greedy = stdout(&succeeds(&["generate", "The Debian project", "-n", "32", "-q"]));
    assert_eq!(text(&["--top-k", "1"]), greedy);
    assert_eq!(text(&["--top-p", "0.000001"]), greedy);
    assert_ne!(text(&["--top-k", "5", "--top-p", "0.9", "--seed", "3"]), greedy);
    assert_eq!(text(&["--seed", "1"]), text(&["--seed", "1", "--top-k", "50"]));
    assert_ne!(text(&["--seed", "1"]), text(&["--seed", "1", "--top-k", "0"]));
}

#[test]
fn a_repetition_penalty_ends_repetition() {
    let ids = |penalty: &str| {
        let report =
            json_of(&["generate", "Debian", "-n", "24", "--json", "--ignore-eos", "--repetition-penalty", penalty]);
        let mut ids = fixtures::ids(&report["ids"]);
        ids.sort_unstable();
        ids.dedup();
        ids.len()
    };
    assert!(ids("1") < 12);
    assert_eq!(ids("100"), 24);
}

#[test]
fn generation_ends_with_the_model_s_text_unless_told_otherwise() {
    // An end-of-text id in generation_config.json wins over config.json's.
    let prompt = json("golden/tiny-bloom/golden.json")["prompts"][0].clone();
    let greedy = ids(&prompt["greedy_ids"]);
    let end = greedy[7];
    assert!(!greedy[..7].contains(&end));
    let folder = copy_of("tiny-bloom", "eos");
    let config = format!(r#"{{"eos_token_id": [4999, {end}]}}"#);
    std::fs::write(folder.join("generation_config.json"), config).unwrap();
    let prompt_ids = comma_separated(&ids(&prompt["ids"]));
    let args =
        ["generate", "-m", folder.to_str().unwrap(), "--precision", "f32", "--json", "--prompt-ids", &prompt_ids];
    let report = json_of(&args);
    assert_eq!((ids(&report["ids"]), &report["finish_reason"]), (greedy[..8].to_vec(), &Value::from("eos")));
    let report = json_of(&[&args[..], &["--ignore-eos", "-n", "32"]].concat());
    assert_eq!((ids(&report["ids"]), &report["finish_reason"]), (greedy, &Value::from("length")));
}

#[test]
fn a_model_without_a_tokenizer_answers_in_ids() {
    let folder = model("random/bloom-residual").display().to_string();
    let args = ["generate", "-m", &folder, "--prompt-ids", "5,6,7", "-n", "4", "-q"];
    let text = stdout(&succeeds(&args));
    let ids: Vec<u32> = text.trim_end().split(',').map(|id| id.parse().unwrap()).collect();
    assert_eq!(ids, fixtures::ids(&json_of(&[&args[..], &["--json"]].concat())["ids"]));
}

#[test]
fn a_closed_pipe_is_a_clean_exit() {
    let args = ["generate", "Debian", "-n", "2000", "--ignore-eos", "-q"];
    let mut child = llm8(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0u8; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    // The pipe's reading end is closed now.
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn json_to_a_closed_pipe_is_a_clean_exit_too() {
    let args = ["generate", "Debian", "-n", "600", "--ignore-eos", "--json", "-q"];
    let mut child = llm8(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

#[test]
fn where_nobody_reads_stderr_the_text_still_comes() {
    let args = ["generate", "Debian", "-n", "4", "--verbose"];
    let mut child = llm8(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(!output.stdout.is_empty());
    let mut child = llm8(&["generate", "-m", "no/such/model", "x"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_long_prompt_too() {
    // The signal most likely comes while the prompt is run; if the machine is faster, while text is.
    let ids = comma_separated(&vec![404; 6000]);
    let args = ["generate", "--prompt-ids", &ids, "--json", "-q", "-n", "100000", "--ignore-eos"];
    let mut child = llm8(&args).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["finish_reason"], "interrupted");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_text_and_the_exit_code_is_130() {
    let args = ["generate", "Debian", "-n", "100000", "--ignore-eos"];
    let mut child = llm8(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = child.stdout.take().unwrap();
    let mut text = vec![0u8; 64];
    pipe.read_exact(&mut text).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    pipe.read_to_end(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(text.ends_with(b"\n"));
    assert!(stderr(&output).contains("interrupted"), "{}", stderr(&output));
}

#[test]
fn help_names_every_flag_and_the_version_is_told() {
    let help = stdout(&succeeds(&["generate", "--help"]));
    let model = ["--model", "--precision", "--threshold", "--skip-module", "--int8-head", "--device", "--threads"];
    let sampling = ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--seed"];
    let rest = ["--ignore-eos", "--prompt-file", "--prompt-ids", "--json", "--quiet", "--verbose", "--instruction-set"];
    for flag in model.iter().chain(&sampling).chain(&rest) {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(stdout(&succeeds(&["--version"])).starts_with("llm8 "));
}
