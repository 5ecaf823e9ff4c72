//! Text to token ids and back.

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{Error, Result};
use crate::folder::ModelFolder;

/// A model's tokenizer.
#[derive(Debug)]
pub struct TextCodec {
    tokenizer: Tokenizer,
}

pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const VOCABULARY: &str = "vocab.json";
pub(crate) const MERGES: &str = "merges.txt";
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(crate) const SPECIAL_TOKENS: &str = "special_tokens_map.json";

impl TextCodec {
    /// Reads tokenizer.json, or else vocab.json and merges.txt (GPT-2's byte-level BPE, as OPT is
    /// published); special tokens are also those of tokenizer_config.json and special_tokens_map.json.
    pub fn load(folder: &ModelFolder) -> Result<Self> {
        let special = SpecialTokens::read(folder)?;
        let mut tokenizer = match folder.read(TOKENIZER)? {
            Some(content) => {
                Tokenizer::from_bytes(content).map_err(|error| not_a_tokenizer(folder, TOKENIZER, error))?
            }
            None => byte_level_bpe(folder, &special)?,
        };
        // Only tokens that the vocabulary has: a new one would have an id that the model does not know.
        let known = special.tokens.into_iter().filter(|token| tokenizer.token_to_id(&token.content).is_some());
        let known: Vec<_> = known.collect();
        tokenizer.add_special_tokens(known).map_err(|error| not_a_tokenizer(folder, TOKENIZER_CONFIG, error))?;
        // A prompt is encoded whole, whatever the file was saved with.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| not_a_tokenizer(folder, TOKENIZER, error))?;
        Ok(Self { tokenizer })
    }

    /// The ids of a text, with the special tokens that the model wants around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// The ids of a text alone.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode(text, special_tokens).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// Text piece by piece as ids come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { codec: self, ids: Vec::new(), settled: 0, printed: 0 }
    }
}

/// What tokenizer_config.json and special_tokens_map.json say.
#[derive(Debug, Default)]
struct SpecialTokens {
    /// The tokens that are no text.
    tokens: Vec<AddedToken>,
    /// The token that every text begins with, where the config says so.
    begin: Option<String>,
    /// Whether a text is encoded as if a space stood before it.
    add_prefix_space: bool,
}

impl SpecialTokens {
    const KEYS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

    fn read(folder: &ModelFolder) -> Result<Self> {
        let config = folder.read_json(TOKENIZER_CONFIG)?.unwrap_or_default();
        let map = folder.read_json(SPECIAL_TOKENS)?.unwrap_or_default();
        let token = |key: &str| [&config, &map].into_iter().find_map(|json| added_token(json.get(key)?));
        let flag = |key: &str, default| config.get(key).and_then(Value::as_bool).unwrap_or(default);
        let additional =
            [&config, &map].into_iter().filter_map(|json| json.get("additional_special_tokens")?.as_array());
        let added = config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
        let added =
            added.map(|(_, json)| json).filter(|json| json.get("special").and_then(Value::as_bool) == Some(true));
        let others = additional.flatten().chain(added).filter_map(added_token);
        let mut tokens: Vec<AddedToken> = Vec::new();
        for token in Self::KEYS.into_iter().filter_map(token).chain(others) {
            if tokens.iter().all(|other| other.content != token.content) {
                tokens.push(token);
            }
        }
        // OPT's class is GPT-2's, which adds the token only where `add_bos_token` says so.
        let begin = if flag("add_bos_token", false) { token("bos_token").map(|token| token.content) } else { None };
        Ok(Self { tokens, begin, add_prefix_space: flag("add_prefix_space", false) })
    }
}

/// A special token, written as a text or as an object with its `content`.
fn added_token(json: &Value) -> Option<AddedToken> {
    let flag = |key: &str, default| json.get(key).and_then(Value::as_bool).unwrap_or(default);
    let content = json.as_str().or_else(|| json.get("content")?.as_str())?;
    let token = AddedToken::from(content, true).lstrip(flag("lstrip", false)).rstrip(flag("rstrip", false));
    Some(token.single_word(flag("single_word", false)).normalized(flag("normalized", false)))
}

/// GPT-2's tokenizer from its two files, as Transformers converts it (`GPT2Converter` in
/// convert_slow_tokenizer.py).
fn byte_level_bpe(folder: &ModelFolder, special: &SpecialTokens) -> Result<Tokenizer> {
    let missing = |file: &str| Error::MissingFile {
        file: folder.file(file),
        hint: format!(
            "fetch the model's {TOKENIZER}, or its {VOCABULARY} and {MERGES}, or give token ids (--prompt-ids) instead of text"
        ),
    };
    let vocabulary = match (folder.read(VOCABULARY)?, folder.has(MERGES)) {
        (Some(vocabulary), _) => vocabulary,
        (None, true) => return Err(missing(VOCABULARY)),
        (None, false) => return Err(missing(TOKENIZER)),
    };
    let vocabulary: Value = serde_json::from_slice(&vocabulary)
        .map_err(|error| folder.problem(VOCABULARY, format!("is not JSON: {error}")))?;
    if !vocabulary.is_object() {
        return Err(folder.problem(VOCABULARY, "is not a JSON object".to_string()));
    }
    let merges = folder.read(MERGES)?.ok_or_else(|| missing(MERGES))?;
    let merges = std::str::from_utf8(&merges).map_err(|_| folder.problem(MERGES, "is not UTF-8".to_string()))?;
    let merges: Vec<&str> = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": special.add_prefix_space, "trim_offsets": true, "use_regex": true,
    });
    let begin = special.begin.as_ref().map(|begin| match vocabulary.get(begin) {
        Some(id) => Ok(json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [id], "tokens": [begin]}},
        })),
        None => Err(folder.problem(VOCABULARY, format!("has no token `{begin}`, with which texts begin"))),
    });
    // Written as the tokenizer.json that these files stand for.
    let tokenizer = json!({
        "version": "1.0",
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "post_processor": begin.transpose()?,
    });
    serde_json::from_value(tokenizer)
        .map_err(|error| folder.problem(MERGES, format!("does not make a tokenizer with {VOCABULARY}: {error}")))
}

fn not_a_tokenizer(folder: &ModelFolder, file: &str, error: tokenizers::Error) -> Error {
    folder.problem(file, format!("is not a tokenizer: {error}"))
}

/// Ids that wait for the rest of a character: it has at most 4 bytes, so what is longer in coming is
/// none.
const MAX_WAITING: usize = 8;

/// Turns ids into text as they come, and never gives half a character: a byte-level token may hold
/// only some of a character's bytes, which then wait for the rest.
#[derive(Debug)]
pub struct TextStream<'a> {
    codec: &'a TextCodec,
    /// Ids from the last settled one on: enough context to decode what follows.
    ids: Vec<u32>,
    /// How many of `ids` have been given as text.
    settled: usize,
    /// Bytes of the text of the settled ids.
    printed: usize,
}

impl TextStream<'_> {
    /// The text that is certain now that `id` has come; often empty.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.codec.decode(&self.ids)?;
        let is_waiting = self.ids.len() - self.settled <= MAX_WAITING;
        if is_waiting && (text.ends_with(char::REPLACEMENT_CHARACTER) || text.len() <= self.printed) {
            return Ok(String::new());
        }
        let new = text.get(self.printed..).unwrap_or_default().to_string();
        // The ids just settled stay as context: a decoder may treat the first token of a text
        // otherwise than the ones that follow.
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.printed = self.codec.decode(&self.ids)?.len();
        Ok(new)
    }

    /// What is left when no more ids come: all but the bytes of an unfinished character.
    pub fn finish(self) -> Result<String> {
        let text = self.codec.decode(&self.ids)?;
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        Ok(whole.get(self.printed..).unwrap_or_default().to_string())
    }
}
