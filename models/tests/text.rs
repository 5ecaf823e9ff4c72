//! Token ids and text as the reference tokenizer gives them, whole and streamed.

mod support;

use support::*;

/// One with tokenizer.json, one with vocab.json and merges.txt.
const MODELS: [&str; 2] = ["tiny-bloom", "tiny-opt"];

#[test]
fn every_string_has_the_reference_s_ids_and_comes_back() {
    for name in MODELS {
        let text = text_codec(name);
        let cases = json(format!("golden/{name}/tokenizer_cases.json"));
        let cases = cases["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 83);
        for case in cases {
            let string = case["text"].as_str().unwrap();
            assert_eq!(text.encode(string).unwrap(), ids(&case["ids"]), "{name} {string:?}");
            assert_eq!(text.encode_plain(string).unwrap(), ids(&case["ids_no_special"]), "{name} {string:?}");
            assert_eq!(text.decode(&ids(&case["ids"])).unwrap(), case["decoded_skip_special"], "{name} {string:?}");
        }
    }
}

#[test]
fn streamed_text_is_the_whole_text_and_never_half_a_character() {
    for (name, case) in MODELS.into_iter().flat_map(|name| {
        let cases = json(format!("golden/{name}/tokenizer_cases.json"))["cases"].take();
        cases.as_array().unwrap().clone().into_iter().map(move |case| (name, case))
    }) {
        let text = text_codec(name);
        let mut stream = text.stream();
        let mut streamed = String::new();
        for id in ids(&case["ids"]) {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?} of {}", case["text"]);
            streamed += &piece;
        }
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, case["decoded_skip_special"].as_str().unwrap());
    }
}

#[test]
fn a_character_cut_off_at_the_end_is_not_given() {
    let text = text_codec("tiny-bloom");
    let ids = text.encode_plain("ok 😀").unwrap();
    let mut stream = text.stream();
    let mut streamed = String::new();
    for id in &ids[..ids.len() - 1] {
        streamed += &stream.push(*id).unwrap();
    }
    assert_eq!(streamed + &stream.finish().unwrap(), "ok ");
}
