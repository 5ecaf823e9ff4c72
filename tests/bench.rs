//! `llm8 bench` as a process. What it measures is never asserted: only what it measures of what.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;

use std::fs;
use std::path::PathBuf;

use fixtures::*;
use program::*;
use serde_json::Value;

/// A small model: BLOOM, hidden 32, 2 layers, a separate head.
const SMALL: &str = "random/bloom-residual";

/// Little to do.
const QUICK: [&str; 7] = ["bench", "-q", "--prompt-len=8", "--gen-len=3", "--repetitions=2", "--threads=1", "-m"];

fn quick(model: &str, more: &[&str]) -> Vec<String> {
    QUICK.into_iter().chain([model]).chain(more.iter().copied()).map(str::to_string).collect()
}

fn rows(arguments: &[String]) -> Vec<Value> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--json"]).collect();
    json_of(&arguments).as_array().unwrap().clone()
}

/// A folder with the config of the small model alone.
fn config_alone(name: &str) -> PathBuf {
    let folder = scratch(name);
    fs::copy(fixtures().join(SMALL).join("config.json"), folder.join("config.json")).unwrap();
    folder
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"))
}

#[test]
fn rows_tell_what_was_measured_and_its_share_of_the_limit() {
    let folder = model("tiny-bloom");
    let folder = folder.to_str().unwrap();
    let rows = rows(&quick(folder, &["--batch", "2", "--context", "5"]));
    let [prefill, decode] = rows.as_slice() else { panic!("{rows:?}") };
    let generated = json_of(&["generate", "--json", "-q", "-n", "1", "--prompt-ids", "5", "-m", folder]);
    for row in &rows {
        assert_eq!(row["model"], folder);
        assert_eq!(row["precision"], "int8");
        assert_eq!(row["unit"], "tokens/s");
        assert_eq!(row["cache_dtype"], "int16");
        assert_eq!(row["device"], "cpu");
        for key in [
            "device_name",
            "device_bytes",
            "peak_device_bytes",
            "copy_bandwidth",
            "int8_matmul_peak",
            "f16_matmul_peak",
        ] {
            assert_eq!(row.get(key), Some(&Value::Null), "{key}: {row}");
        }
        assert_eq!((&row["threads"], &row["batch"], &row["repetitions"]), (&1.into(), &2.into(), &2.into()));
        assert_eq!(row["weight_bytes"], generated["memory"]["weight_bytes"]);
        // The head is the embedding: every weight is read.
        assert_eq!(row["weight_bytes_per_token"], row["weight_bytes"]);
        assert!(number(row, "min") <= number(row, "median") && number(row, "median") <= number(row, "max"), "{row}");
        let parts = ["products_share", "head_share", "quantize_share", "attention_share", "cache_share", "norm_share"];
        let shares = parts.map(|part| number(row, part));
        assert!(shares.iter().all(|&share| share > 0.0) && shares.iter().sum::<f64>() < 1.0, "{row}");
        for key in ["min", "load_seconds", "load_peak_rss_bytes", "peak_rss_bytes", "read_bandwidth"] {
            assert!(number(row, key) > 0.0, "{key}: {row}");
        }
    }
    assert_eq!(prefill["test"], "prefill");
    assert_eq!((&prefill["prompt_len"], &prefill["gen_len"]), (&8.into(), &0.into()));
    assert!(number(prefill, "first_token_seconds") > 0.0 && prefill["token_seconds"].is_null());
    assert_eq!(decode["test"], "decode");
    assert_eq!((&decode["prompt_len"], &decode["gen_len"], &decode["context"]), (&0.into(), &3.into(), &5.into()));
    assert!(number(decode, "token_seconds") > 0.0 && decode["first_token_seconds"].is_null());

    let prompt = ["--batch=2", "--context=5", "--prompt-len=8", "--gen-len=3", "--repetitions=1", "--threads=1"];
    let once = json_of(&[["bench", "-q", "--json", "-m", folder].as_slice(), &prompt].concat());
    let [prefill, decode] = [&once[0], &once[1]];
    // A step of both sequences reads the weights once.
    let limit = number(decode, "read_bandwidth") / number(decode, "weight_bytes_per_token") * 2.0;
    assert!((number(decode, "limit") / limit - 1.0).abs() < 1e-9, "{decode}");
    assert!((number(decode, "share_of_limit") * limit / number(decode, "median") - 1.0).abs() < 1e-9, "{decode}");
    assert_eq!(decode["limited_by"], "read_bandwidth");
    // Of one repetition there is one figure.
    let in_products = number(decode, "products_share") + number(decode, "head_share");
    assert!((number(decode, "bounded_share") / in_products - 1.0).abs() < 1e-9, "{decode}");
    let products = number(decode, "share_of_limit") / in_products;
    assert!((number(decode, "products_share_of_limit") / products - 1.0).abs() < 1e-9, "{decode}");
    match prefill["int8_dot_peak"].as_f64() {
        Some(peak) => {
            let by_operations = peak / number(prefill, "int8_operations_per_token");
            // 16 tokens share a read of the weights.
            let by_bytes = number(prefill, "read_bandwidth") / number(prefill, "weight_bytes_per_token") * 16.0;
            assert!((number(prefill, "limit") / by_operations.min(by_bytes) - 1.0).abs() < 1e-9, "{prefill}");
            let (name, mut share) = match by_bytes < by_operations {
                true => ("read_bandwidth", number(prefill, "head_share")),
                false => ("int8_dot_peak", 0.0),
            };
            share += number(prefill, "products_share");
            assert_eq!(prefill["limited_by"], name);
            assert!((number(prefill, "bounded_share") / share - 1.0).abs() < 1e-9, "{prefill}");
        }
        None => assert!(prefill["limit"].is_null() && prefill["share_of_limit"].is_null(), "{prefill}"),
    }
}

#[test]
fn every_combination_has_a_row() {
    let folder = config_alone("sweeps");
    let folder = folder.to_str().unwrap();
    let sweeps =
        ["--precision=int8,int8-head,f16", "--batch=1,2", "--prompt-len=4,8", "--context=0,6", "--threads=1,2"];
    let fixed = ["bench", "-q", "--json", "--dummy-weights", "--repetitions=1", "--gen-len=2", "-m", folder];
    let rows = json_of(&[fixed.as_slice(), &sweeps].concat());
    let rows = rows.as_array().unwrap();
    // Threads, precisions, batches, and two prompts and two contexts.
    assert_eq!(rows.len(), 2 * 3 * 2 * (2 + 2));
    let of = |rows: &[Value]| -> Vec<String> {
        let keys = ["threads", "precision", "int8_head", "batch", "cache_dtype", "test", "prompt_len", "context"];
        rows.iter().map(|row| keys.map(|key| row[key].to_string()).join(" ")).collect()
    };
    let mut combinations = of(rows);
    // In memory at once, the same in the same order.
    let together = json_of(&[fixed.as_slice(), &sweeps, &["--together"]].concat());
    assert_eq!(of(together.as_array().unwrap()), combinations);
    combinations.sort();
    combinations.dedup();
    assert_eq!(combinations.len(), rows.len());
    for row in rows {
        assert_eq!(row["dummy_weights"], true);
        let is_f16_prompt = row["precision"] == "f16" && row["test"] == "prefill";
        assert!(!is_f16_prompt || row["limit"].is_null(), "{row}");
    }
    // No prompt, or no tokens after it.
    for (flag, test) in [("--prompt-len=0", "decode"), ("--gen-len=0", "prefill")] {
        let rows = json_of(&["bench", "-q", "--json", "--dummy-weights", "--repetitions=1", flag, "-m", folder]);
        assert_eq!(rows.as_array().unwrap().len(), 1);
        assert_eq!(rows[0]["test"], test);
    }
    let caches = ["int8", "int16", "f16", "f32"];
    let rows =
        json_of(&[fixed.as_slice(), &["--threads=1", "--together", "--cache-dtype", &caches.join(",")]].concat());
    let dtypes: Vec<&Value> = rows.as_array().unwrap().iter().map(|row| &row["cache_dtype"]).collect();
    assert_eq!(dtypes, [caches, caches].as_flattened());
}

#[test]
fn random_weights_need_no_more_than_a_config() {
    let folder = config_alone("config-alone");
    let folder = folder.to_str().unwrap();
    let footprint = json_of(&["footprint", "--json", "-q", "-m", folder]);
    for (flags, precision) in [
        (["--precision", "f32"].as_slice(), "f32"),
        (&["--precision", "f16"], "f16"),
        (&[], "int8"),
        (&["--int8-head"], "int8_head"),
    ] {
        let rows = rows(&quick(folder, &[&["--dummy-weights"], flags].concat()));
        let wanted = &footprint["precisions"][precision]["total_bytes"];
        assert_eq!(&rows[0]["weight_bytes"], wanted, "{precision}");
        assert_eq!(rows[0]["int8_head"], precision == "int8_head");
    }
    let failure = llm8(&quick(folder, &[])).output().unwrap();
    check_failure(&failure, 1, &["model.safetensors: no such file", "hint: ", "--dummy-weights"]);
    // Each process of a sweep tells of itself, and the first failure ends it.
    let failure = llm8(&["bench", "-q", "--threads", "1,2", "-m", folder]).output().unwrap();
    check_failure(&failure, 1, &["model.safetensors: no such file"]);
}

#[test]
fn tables_and_comma_separated_values() {
    let folder = model("tiny-opt");
    let folder = folder.to_str().unwrap();
    let table =
        stdout(&succeeds(&quick(folder, &["--precision", "int8,bf16", "--int8-head", "--cache-dtype", "f16,int8"])));
    let limits = ["of the limit", "in products", "their limit", "limits of 1 thread", "medians of 2"];
    for part in ["prompt of 8", "3 tokens", "int8 + head", "bf16", " f16 ", "int8  "].into_iter().chain(limits) {
        assert!(table.contains(part), "`{part}` is not in: {table}");
    }
    let csv = stdout(&succeeds(&quick(folder, &["--csv"])));
    let lines: Vec<&str> = csv.lines().collect();
    let header: Vec<&str> = lines[0].split(',').collect();
    for key in ["model", "precision", "threads", "batch", "prompt_len", "gen_len", "median", "share_of_limit"] {
        assert!(header.contains(&key), "{key}: {csv}");
    }
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|line| line.split(',').count() == header.len()), "{csv}");

    // Without -q turns and results are told as they come.
    let output = succeeds(&["bench", "--prompt-len", "4", "--gen-len", "2", "--repetitions", "1", "--threads", "1"]);
    let stderr = stderr(&output);
    assert!(stderr.contains("demonstration model"), "{stderr}");
    assert!(stderr.contains("repetition 1 of 1"), "{stderr}");
    assert!(stderr.contains("prompt of 4: ") && stderr.contains("2 tokens: "), "{stderr}");
}

#[test]
fn what_cannot_be_measured() {
    let fails = |arguments: &[&str], code: i32, parts: &[&str]| {
        let arguments = [&["bench", "-q"], arguments].concat();
        check_failure(&llm8(&arguments).output().unwrap(), code, parts);
    };
    fails(&["--prompt-len", "0", "--gen-len", "0"], 2, &["nothing to measure"]);
    fails(&["--precision", "f16", "--int8-head"], 2, &["--int8-head belongs to --precision int8"]);
    let opt = ["--dummy-weights", "-m", "facebook/opt-125m"];
    fails(&[&opt, ["--prompt-len", "2049"].as_slice()].concat(), 1, &["2049 tokens", "2048 positions", "hint: "]);
    fails(&[&opt, ["--context", "2000"].as_slice()].concat(), 1, &["2064 tokens", "2048 positions"]);
    fails(&["--dummy-weights", "-m", "no/such/model/folder"], 1, &["no such folder"]);
    // More than any machine that runs tests has.
    let immense = config_alone("immense");
    let mut config = json(format!("{SMALL}/config.json"));
    config["vocab_size"] = (1 << 24).into();
    config["hidden_size"] = (1 << 20).into();
    fs::write(immense.join("config.json"), config.to_string()).unwrap();
    fails(
        &["--dummy-weights", "-m", immense.to_str().unwrap()],
        1,
        &["int8 needs", "576 tokens in the cache, but", "hint: "],
    );
    let both = ["--dummy-weights", "--precision", "int8-head,f16", "--together", "-m", immense.to_str().unwrap()];
    fails(&both, 1, &["int8 + head and f16 need", "hint: "]);
    let caches = ["--dummy-weights", "--cache-dtype", "f32,int16", "-m", immense.to_str().unwrap()];
    fails(&caches, 1, &["int8 needs", "576 tokens in each of 2 caches, but", "hint: "]);
    fails(&["--precision", "int8,int8-head", "--int8-head"], 2, &["the same precision"]);
    let published = ["--offline", "--cache-dir", "no-such-cache", "-m", "bigscience/bloom-560m"];
    fails(&published, 1, &["offline", "--dummy-weights measures the model with random weights"]);
}
