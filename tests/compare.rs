//! `llm8 compare` as a process.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/program.rs"]
mod program;

use fixtures::*;
use program::*;
use serde_json::Value;

fn compare(model: &str, more: &[&str]) -> Value {
    json_of(&[&["compare", "--json", "-q", "-n", "8", "-m", model], more].concat())
}

/// A number that must be there.
fn number(report: &Value, key: &str) -> f64 {
    report[key].as_f64().unwrap_or_else(|| panic!("{key}: {}", report[key]))
}

#[test]
fn the_figures_are_those_of_the_cache_that_is_asked_for() {
    let folder = model("tiny-bloom");
    let kl = |dtype| {
        let report = compare(folder.to_str().unwrap(), &["--cache-dtype", dtype, "The Debian project is"]);
        assert_eq!((&report["f16"]["cache_dtype"], &report["int8"]["cache_dtype"]), (&dtype.into(), &dtype.into()));
        number(&report, "mean_kl")
    };
    assert_ne!(kl("int8"), kl("f32"));
}

#[test]
fn the_ratio_is_that_of_footprint_on_every_fixture() {
    for fixture in ["tiny-bloom", "tiny-opt", "random/bloom-12-heads", "random/opt-350m-form", "random/galactica-form"]
    {
        let folder = model(fixture);
        let folder = folder.to_str().unwrap();
        for head in [false, true] {
            let flags: &[&str] = if head { &["--int8-head"] } else { &[] };
            let report = compare(folder, &[&["--prompt-ids", "5,6,7"], flags].concat());
            let footprint = json_of(&["footprint", "--json", "-q", "-m", folder]);
            let int8 = &footprint["precisions"][if head { "int8_head" } else { "int8" }];
            assert_eq!(report["int8"]["memory"]["weight_bytes"], int8["total_bytes"], "{fixture}");
            assert_eq!((&report["f16"]["device"], &report["int8"]["device"]), (&"cpu".into(), &"cpu".into()));
            assert_eq!(report["f16"]["memory"]["weight_bytes"], footprint["precisions"]["f16"]["total_bytes"]);
            if !head {
                assert_eq!(number(&report, "ratio"), number(&footprint, "ratio_f16_int8"), "{fixture}");
            }
        }
    }
}

#[test]
fn a_model_agrees_with_itself_and_nearly_at_int8() {
    let folder = fixtures().join("tiny-bloom");
    let folder = folder.to_str().unwrap();
    // Every layer is left at 16 bits: the two are one model.
    let same = compare(folder, &["--skip-module", "h", "The Debian project"]);
    assert_eq!(same["f16"]["ids"], same["int8"]["ids"]);
    assert_eq!(same["first_difference"], Value::Null);
    for key in ["mean_kl", "max_logit_difference", "mean_logit_difference"] {
        assert_eq!(number(&same, key), 0.0, "{key}");
    }
    assert_eq!(number(&same, "top1_agreement"), 1.0);

    let int8 = compare(folder, &["The Debian project is an association of people who make a free system"]);
    assert!((0.9..=1.0).contains(&number(&int8, "top1_agreement")), "{int8}");
    assert!(number(&int8, "mean_kl") > 0.0 && number(&int8, "mean_kl") < 0.01, "{int8}");
    assert!(number(&int8, "max_logit_difference") > 0.0);
    for run in ["f16", "int8"] {
        assert!(number(&int8[run]["memory"], "peak_rss_bytes") > number(&int8[run]["memory"], "weight_bytes"));
        assert_eq!(int8[run]["precision"], run);
    }
    let together = compare(folder, &["--together", "--baseline", "f32", "The Debian project"]);
    assert_eq!(together["f16"]["precision"], "f32");
}

#[test]
fn the_first_difference_is_where_the_texts_part() {
    // Outlier features that are squeezed into int8 change what is said.
    let folder = model("tiny-bloom-outliers");
    let more = ["-n", "64", "--threshold", "0", "--prompt-ids", "36,3286,584"];
    let report = json_of(&[&["compare", "--json", "-q", "-m", folder.to_str().unwrap()], more.as_slice()].concat());
    let list = |run: &str| ids(&report[run]["ids"]);
    let (f16, int8) = (list("f16"), list("int8"));
    let parted = f16.iter().zip(&int8).position(|(one, other)| one != other);
    assert!(parted.is_some(), "{report}");
    assert_eq!(report["first_difference"].as_u64().map(|index| index as usize), parted);
}

#[test]
fn a_table_for_people_and_a_page() {
    let page = scratch("page").join("compare.html");
    let output = succeeds(&["compare", "-n", "8", "--html", page.to_str().unwrap()]);
    let text = stdout(&output);
    for part in ["f16", "int8", "weights", "5.83 MB", "peak memory", "generation", "likeliest token", "KL divergence"] {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(
        page.starts_with("<!DOCTYPE html>") && page.contains("prefers-color-scheme: dark") && page.contains("5.83 MB")
    );
    let output = llm8(&["compare", "-q", "-n", "1", "--html", "no/such/folder/page.html"]).output().unwrap();
    check_failure(&output, 1, &["no/such/folder/page.html: cannot be written"]);
}
