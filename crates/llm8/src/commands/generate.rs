//! `llm8 generate`: prompt in, text out as it comes.

use std::ffi::OsString;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{FinishReason, GenerateOptions, Generation, Loaded, ModelFolder, Precision, TextCodec, generate};
use serde::Serialize;

use super::model;
use crate::args::{GenerateArgs, SamplingArgs};
use crate::failure::Failure;
use crate::{interrupt, output};

pub fn run(args: Box<GenerateArgs>) -> anyhow::Result<ExitCode> {
    let precision = model::precision(&args.model)?;
    let prompt = Prompt::read(&args)?;
    model::set_up(&args.model)?;
    let folder = model::folder(&args.model, &args.output)?;
    let text = prompt.codec(&folder)?;
    let prompt_ids = prompt.ids(text.as_ref())?;
    let loaded = model::load_with_progress(&folder, precision.clone(), &args.output)?;
    interrupt::listen(args.output.quiet);

    let mut generation = generate(loaded.model.as_ref(), &prompt_ids, &options(&args.sampling, &loaded))?;
    let mut stdout = std::io::stdout().lock();
    let mut written = String::new();
    let mut stream = text.as_ref().map(TextCodec::stream);
    let mut write = |piece: &str| -> anyhow::Result<()> {
        written += piece;
        if !args.output.json {
            stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush()).context("stdout")?;
        }
        Ok(())
    };
    let mut separator = "";
    for id in generation.by_ref() {
        let id = id?;
        match &mut stream {
            Some(stream) => write(&stream.push(id)?)?,
            // A model without a tokenizer can be run by ids alone, and answers in ids.
            None => write(&format!("{separator}{id}"))?,
        }
        separator = ",";
    }
    if let Some(stream) = stream {
        write(&stream.finish()?)?;
    }

    let report = Report::new(&folder, &precision, &prompt_ids, written, &loaded, &generation);
    if args.output.json {
        stdout.write_all(&serde_json::to_vec(&report)?).context("stdout")?;
    }
    writeln!(stdout).context("stdout")?;
    if !args.output.quiet && !args.output.json {
        output::say(&format!("\n{}", report.summary()));
    }
    let is_interrupted = generation.finish_reason() == Some(FinishReason::Interrupted);
    Ok(ExitCode::from(if is_interrupted { interrupt::EXIT_CODE } else { 0 }))
}

/// The longest prompt that is read.
const MAX_PROMPT_BYTES: u64 = 1 << 24;

/// What the model is to go on from.
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

impl Prompt {
    fn read(args: &GenerateArgs) -> anyhow::Result<Self> {
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

    /// The tokenizer, which only a prompt of text cannot do without.
    fn codec(&self, folder: &ModelFolder) -> anyhow::Result<Option<TextCodec>> {
        match (self, TextCodec::load(folder)) {
            (_, Ok(codec)) => Ok(Some(codec)),
            (Self::Ids(_), Err(int8_models::Error::MissingFile { .. })) => Ok(None),
            (_, Err(error)) => Err(error.into()),
        }
    }

    fn ids(self, codec: Option<&TextCodec>) -> anyhow::Result<Vec<u32>> {
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

fn options(args: &SamplingArgs, loaded: &Loaded) -> GenerateOptions {
    GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: (args.top_k > 0).then_some(args.top_k),
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        eos: if args.ignore_eos { Vec::new() } else { loaded.eos.clone() },
        is_interrupted: interrupt::is_requested,
    }
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    precision: &'static str,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: String,
    finish_reason: &'static str,
    timings: Timings,
    memory: Memory,
}

#[derive(Debug, Serialize)]
struct Timings {
    load_seconds: f64,
    prompt_seconds: f64,
    prompt_tokens_per_second: f64,
    generation_seconds: f64,
    generation_tokens_per_second: f64,
}

#[derive(Debug, Serialize)]
struct Memory {
    weight_bytes: usize,
    weight_bytes_f16: usize,
    kv_cache_bytes: usize,
    /// Null where the system does not tell.
    peak_rss_bytes: Option<usize>,
}

impl Report {
    fn new(
        folder: &ModelFolder,
        precision: &Precision,
        prompt_ids: &[u32],
        text: String,
        loaded: &Loaded,
        generation: &Generation,
    ) -> Self {
        let (prompt, decode) = (generation.prompt_duration(), generation.generation_duration());
        Self {
            model: folder.path().display().to_string(),
            precision: precision.name(),
            prompt_ids: prompt_ids.to_vec(),
            ids: generation.ids().to_vec(),
            text,
            finish_reason: generation.finish_reason().map_or("", FinishReason::name),
            timings: Timings {
                load_seconds: loaded.duration.as_secs_f64(),
                prompt_seconds: prompt.as_secs_f64(),
                prompt_tokens_per_second: output::rate(prompt_ids.len(), prompt),
                generation_seconds: decode.as_secs_f64(),
                // The first token comes out of the prompt's pass.
                generation_tokens_per_second: output::rate(generation.ids().len().saturating_sub(1), decode),
            },
            memory: Memory {
                weight_bytes: loaded.ledger.bytes(),
                weight_bytes_f16: loaded.ledger.bytes_at_16_bits(),
                kv_cache_bytes: generation.kv_cache_bytes(),
                peak_rss_bytes: peak_rss_bytes(),
            },
        }
    }

    /// One line for people.
    fn summary(&self) -> String {
        let Memory { weight_bytes, weight_bytes_f16, .. } = self.memory;
        let ratio = match self.precision {
            "int8" => format!(" ({:.2}x smaller than 16-bit)", weight_bytes_f16 as f64 / weight_bytes as f64),
            _ => String::new(),
        };
        let tokens = |count: usize| if count == 1 { "1 token".to_string() } else { format!("{count} tokens") };
        let rate = |rate: f64| if rate > 0.0 { format!(", {rate:.1} tokens/s") } else { String::new() };
        format!(
            "{} weights {}{ratio} · prompt {}{} · generated {}{} · {}",
            self.precision,
            output::bytes(weight_bytes),
            tokens(self.prompt_ids.len()),
            rate(self.timings.prompt_tokens_per_second),
            tokens(self.ids.len()),
            rate(self.timings.generation_tokens_per_second),
            self.finish_reason,
        )
    }
}

/// The largest resident memory the process has had, as the kernel counts it.
fn peak_rss_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
