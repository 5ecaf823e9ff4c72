//! Text to token ids and back.

use tokenizers::Tokenizer;

use crate::error::{Error, Result};
use crate::folder::ModelFolder;

/// A model's tokenizer.
#[derive(Debug)]
pub struct TextCodec {
    tokenizer: Tokenizer,
}

const TOKENIZER: &str = "tokenizer.json";

impl TextCodec {
    /// Reads tokenizer.json.
    pub fn load(folder: &ModelFolder) -> Result<Self> {
        let Some(content) = folder.read(TOKENIZER)? else {
            let hint = "fetch the model's tokenizer.json too, or give token ids instead of text".to_string();
            return Err(Error::MissingFile { file: folder.file(TOKENIZER), hint });
        };
        let not_a_tokenizer = |error| folder.problem(TOKENIZER, format!("is not a tokenizer: {error}"));
        let mut tokenizer = Tokenizer::from_bytes(content).map_err(not_a_tokenizer)?;
        // A prompt is encoded whole, whatever the file was saved with.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(not_a_tokenizer)?;
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
        if text.ends_with(char::REPLACEMENT_CHARACTER) || text.len() <= self.printed {
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
