//! `llm8 compare`: a model at 16 bits and at int8 in turn; what int8 saves, and what it costs.

mod page;
mod report;
mod table;

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{Agreement, CausalLm, Device, Loaded, ModelFolder, Precision, TextCodec, generate, score};

use super::model;
use super::prompt::Prompt;
use super::report::Report as Run;
use crate::args::{BaselineName, CompareArgs};
use crate::failure::Failure;
use crate::{device, interrupt, output};
use report::Report;

/// What is compared when there is no prompt.
const SAMPLE: &str = "A language model reads a text word by word, and says which words may follow. \
    It was trained on many books and pages, and what it has seen there it can go on with";

pub fn run(args: Box<CompareArgs>) -> anyhow::Result<ExitCode> {
    if let Some(file) = &args.html {
        output::check_writable(file)?;
    }
    let prompt = Prompt::read_or(&args.prompt, SAMPLE, &args.output)?;
    model::set_up(&args.machine)?;
    let device = device::open(args.device, &args.output)?;
    let baseline = match args.baseline {
        BaselineName::F16 => Precision::F16,
        BaselineName::Bf16 => Precision::BF16,
        BaselineName::F32 => Precision::F32,
    };
    let check = |folder: &ModelFolder, prompt_len: usize| {
        let int8 = Precision::Int8(model::int8_options(&args.int8, folder)?);
        let both = [baseline.clone(), int8];
        // One after the other, the larger decides.
        let at_once = if args.together { &both[..] } else { &both[..1] };
        let tokens = model::tokens_of_run(folder, prompt_len, args.sampling.max_new_tokens)?;
        let cache = model::cache_dtype(args.cache, &device)?;
        model::check_memory(tokens, &[cache], folder, at_once, &args.machine.processor, &device, "generate ")
    };
    // Before anything is downloaded; the prompt's tokens are known after the tokenizer's file is.
    let folder = model::folder(&args.model, &args.output, |folder| check(folder, 1))?;
    let text = prompt.codec(&folder)?;
    let prompt_ids = prompt.ids(text.as_ref())?;
    check(&folder, prompt_ids.len())?;
    interrupt::listen(args.output.quiet);
    let session =
        Session { args: &args, folder: &folder, device: &device, text: text.as_ref(), prompt_ids: &prompt_ids };

    let (reference, loaded) = session.run(baseline.clone())?;
    let mut logits = tempfile::tempfile().context("a temporary file for the logits")?;
    session.write_logits(loaded.model.as_ref(), &logits)?;
    let kept = args.together.then_some(loaded);
    let (int8, loaded) = session.run(Precision::Int8(model::int8_options(&args.int8, &folder)?))?;
    logits.rewind()?;
    let agreement = session.compare_logits(loaded.model.as_ref(), &logits)?;
    drop(kept);

    let report = Report::new(reference, int8, &agreement);
    let mut stdout = std::io::stdout().lock();
    let text = if args.output.json { serde_json::to_string(&report)? } else { table::text(&report) };
    writeln!(stdout, "{text}").context("stdout")?;
    if let Some(file) = &args.html {
        output::write_file(file, &page::html(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What both runs share.
struct Session<'a> {
    args: &'a CompareArgs,
    folder: &'a ModelFolder,
    device: &'a Device,
    text: Option<&'a TextCodec>,
    prompt_ids: &'a [u32],
}

impl Session<'_> {
    /// Loads the model and generates; the memory peak is this run's own.
    fn run(&self, precision: Precision) -> anyhow::Result<(Run, Loaded)> {
        device::reset_peaks(self.device)?;
        let loaded = model::load_with_progress(self.folder, precision.clone(), self.device, &self.args.output)?;
        let options = model::generate_options(&self.args.sampling, self.args.cache, &loaded)?;
        let mut generation = generate(loaded.model.as_ref(), self.prompt_ids, &options)?;
        generation.by_ref().try_for_each(|id| id.map(drop))?;
        check_interrupt()?;
        let text = match self.text {
            Some(codec) => codec.decode(generation.ids())?,
            None => generation.ids().iter().map(u32::to_string).collect::<Vec<_>>().join(","),
        };
        let run = Run::new(&model::name(&self.args.model), &precision, self.prompt_ids, text, &loaded, &generation);
        Ok((run, loaded))
    }

    /// Calls `each` with the logits of every position of the prompt, (vocabulary).
    fn logits(&self, model: &dyn CausalLm, each: impl FnMut(&[f32]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let cache_dtype = model::cache_dtype(self.args.cache, model.device())?;
        score(model, self.prompt_ids, Some(cache_dtype), interrupt::is_requested, each)?;
        check_interrupt()
    }

    /// Keeps the logits in a file: in memory they would count as the next model's.
    fn write_logits(&self, model: &dyn CausalLm, file: &File) -> anyhow::Result<()> {
        let mut writer = BufWriter::new(file);
        self.logits(model, |logits| {
            let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
            writer.write_all(&bytes).context("the temporary file for the logits")
        })?;
        writer.flush().context("the temporary file for the logits")
    }

    fn compare_logits(&self, model: &dyn CausalLm, file: &File) -> anyhow::Result<Agreement> {
        let mut reader = BufReader::new(file);
        let mut agreement = Agreement::default();
        let mut bytes = vec![0; model.vocab_size() * size_of::<f32>()];
        self.logits(model, |logits| {
            reader.read_exact(&mut bytes).context("the temporary file for the logits")?;
            let reference: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            agreement.add(&reference, logits);
            Ok(())
        })?;
        Ok(agreement)
    }
}

fn check_interrupt() -> anyhow::Result<()> {
    if interrupt::is_requested() { Err(Failure::interrupted("nothing was compared").into()) } else { Ok(()) }
}
