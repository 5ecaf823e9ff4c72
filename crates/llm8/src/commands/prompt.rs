//! The prompt: from the arguments, a file or stdin, as text or as token ids.

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Read};

use anyhow::Context;
use int8_models::{ModelFolder, TextCodec};

use crate::args::{OutputArgs, PromptArgs};
use crate::failure::Failure;
use crate::output;

/// The longest prompt that is read.
const MAX_PROMPT_BYTES: u64 = 1 << 24;

/// What the model is to go on from.
pub enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompt {
    pub fn read(args: &PromptArgs) -> anyhow::Result<Self> {
        if let Some(ids) = &args.prompt_ids {
            return Ok(Self::Ids(ids.clone()));
        }
        let text = match (&args.prompt_file, &args.prompt) {
            (Some(file), _) => {
                let name = file.display().to_string();
                let reader = File::open(file).with_context(|| format!("{name}: cannot be read"))?;
                without_last_line_break(utf8(read_prompt(reader, &name)?, &name)?)
            }
            (None, Some(prompt)) if prompt != "-" => utf8(OsString::clone(prompt).into_encoded_bytes(), "the prompt")?,
            (None, None) if std::io::stdin().is_terminal() => {
                return Err(Failure::usage("no prompt: give one, or `-` to read it from stdin").into());
            }
            _ => {
                let bytes = read_prompt(std::io::stdin().lock(), "stdin")?;
                without_last_line_break(utf8(bytes, "the prompt on stdin")?)
            }
        };
        if text.is_empty() {
            return Err(Failure::new("the prompt is empty")
                .with_hint("give some text for the model to go on from")
                .into());
        }
        Ok(Self::Text(text))
    }

    /// As [`read`](Self::read), but without a prompt in the arguments it is `sample`, which is said, and
    /// stdin is left alone.
    pub fn read_or(args: &PromptArgs, sample: &str, output: &OutputArgs) -> anyhow::Result<Self> {
        match args {
            PromptArgs { prompt: None, prompt_file: None, prompt_ids: None } => {
                if !output.quiet {
                    output::say("No prompt given: this is about a sample text; `-` reads one from stdin.");
                }
                Ok(Self::Text(sample.to_string()))
            }
            args => Self::read(args),
        }
    }

    /// The tokenizer, which only a prompt of text cannot do without.
    pub fn codec(&self, folder: &ModelFolder) -> anyhow::Result<Option<TextCodec>> {
        match (self, TextCodec::load(folder)) {
            (_, Ok(codec)) => Ok(Some(codec)),
            (Self::Ids(_), Err(int8_models::Error::MissingFile { .. })) => Ok(None),
            (_, Err(error)) => Err(error.into()),
        }
    }

    pub fn ids(self, codec: Option<&TextCodec>) -> anyhow::Result<Vec<u32>> {
        match (self, codec) {
            (Self::Text(text), Some(codec)) => Ok(codec.encode(&text)?),
            (Self::Text(_), None) => Err(Failure::new("the model has no tokenizer").into()),
            (Self::Ids(ids), _) => Ok(ids),
        }
    }
}

/// All that `reader` gives, unless it gives more than any model could read.
fn read_prompt(reader: impl Read, what: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes).with_context(|| format!("{what}: cannot be read"))?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Failure::new(format!("{what}: the prompt has more than {MAX_PROMPT_BYTES} bytes")).into());
    }
    Ok(bytes)
}

fn utf8(bytes: Vec<u8>, what: &str) -> anyhow::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let failure = Failure::new(format!("{what} is not UTF-8: byte {at} begins no character"));
        failure.with_hint("convert it first, for instance with `iconv -t UTF-8`").into()
    })
}

fn without_last_line_break(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}
