//! `llm8 quantize`: a checkpoint in, an int8 checkpoint out.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{Error, QuantizeOptions, Quantized, quantize};
use serde::Serialize;

use super::model;
use crate::args::QuantizeArgs;
use crate::{interrupt, output};

pub fn run(args: &QuantizeArgs) -> anyhow::Result<ExitCode> {
    model::set_up(&args.machine)?;
    let folder = model::folder(&args.model, &args.output, |_| Ok(()))?;
    let int8 = model::int8_options(&args.int8, &folder)?;
    interrupt::listen(args.output.quiet);
    let (bar, progress) = model::progress_bar("quantising", &args.output)?;
    let options = QuantizeOptions {
        int8: int8.clone(),
        shard_bytes: args.shard_size,
        progress: Some(Box::new(progress)),
        is_interrupted: interrupt::is_requested,
    };
    let quantized = quantize(&folder, &args.output_dir, &options);
    bar.finish_and_clear();
    let quantized = match quantized {
        Err(Error::Interrupted) => return Ok(ExitCode::from(interrupt::EXIT_CODE)),
        quantized => quantized?,
    };
    let report = Report::new(args, int8.threshold, &quantized);
    if args.output.json {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(&serde_json::to_vec(&report)?).and_then(|()| writeln!(stdout)).context("stdout")?;
    } else if !args.output.quiet {
        output::say(&report.summary());
    }
    Ok(ExitCode::SUCCESS)
}

/// What `--json` writes.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    output: String,
    source_bytes: usize,
    bytes: u64,
    shards: usize,
    int8_weights: usize,
    /// 0 for no decomposition.
    threshold: f32,
    int8_head: bool,
    seconds: f64,
    /// Null where the system does not tell.
    peak_rss_bytes: Option<usize>,
}

impl Report {
    fn new(args: &QuantizeArgs, threshold: Option<f32>, quantized: &Quantized) -> Self {
        Self {
            model: model::name(&args.model),
            output: args.output_dir.display().to_string(),
            source_bytes: quantized.source_bytes,
            bytes: quantized.bytes,
            shards: quantized.shards,
            int8_weights: quantized.int8_weights,
            threshold: threshold.unwrap_or(0.0),
            int8_head: quantized.has_int8_head,
            seconds: quantized.duration.as_secs_f64(),
            peak_rss_bytes: output::peak_rss_bytes(),
        }
    }

    /// One line for people.
    fn summary(&self) -> String {
        let files = if self.shards == 1 { "1 file".to_string() } else { format!("{} files", self.shards) };
        format!(
            "{}: {} in {files}, from {} · {} weights in int8 · {:.1} s",
            self.output,
            output::bytes(self.bytes as usize),
            output::bytes(self.source_bytes),
            self.int8_weights,
            self.seconds,
        )
    }
}
