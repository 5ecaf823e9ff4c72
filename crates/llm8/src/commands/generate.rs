//! `llm8 generate`: prompt in, text out as it comes.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{FinishReason, ModelFolder, TextCodec, generate};

use super::model;
use super::prompt::Prompt;
use super::report::Report;
use crate::args::GenerateArgs;
use crate::{device, interrupt, output};

pub fn run(args: Box<GenerateArgs>) -> anyhow::Result<ExitCode> {
    model::check_flags(&args.precision)?;
    let prompt = Prompt::read(&args.prompt)?;
    model::set_up(&args.machine)?;
    let device = device::open(args.device, &args.output)?;
    let check = |folder: &ModelFolder, prompt_len: usize| {
        let precision = model::precision(&args.precision, folder)?;
        let tokens = model::tokens_of_run(folder, prompt_len, args.sampling.max_new_tokens)?;
        let cache = model::cache_dtype(args.cache, &device)?;
        model::check_memory(tokens, &[cache], folder, &[precision], &args.machine.processor, &device, "")
    };
    // Before anything is downloaded; the prompt's tokens are known after the tokenizer's file is.
    let folder = model::folder(&args.model, &args.output, |folder| check(folder, 1))?;
    let precision = model::precision(&args.precision, &folder)?;
    let text = prompt.codec(&folder)?;
    let prompt_ids = prompt.ids(text.as_ref())?;
    check(&folder, prompt_ids.len())?;
    let loaded = model::load_with_progress(&folder, precision.clone(), &device, &args.output)?;
    interrupt::listen(args.output.quiet);

    let mut generation =
        generate(loaded.model.as_ref(), &prompt_ids, &model::generate_options(&args.sampling, args.cache, &loaded)?)?;
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

    let report = Report::new(&model::name(&args.model), &precision, &prompt_ids, written, &loaded, &generation);
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
