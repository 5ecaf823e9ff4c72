//! `llm8 footprint`: the memory that a model takes, from its config.json and tensor headers alone.

mod page;
mod picture;
mod report;
mod text;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{Device, Footprint, TensorHeaders};

use super::model;
use crate::args::FootprintArgs;
use crate::output;
use report::Report;

pub fn run(args: FootprintArgs) -> anyhow::Result<ExitCode> {
    let (folder, remote) = model::config_folder(&args.model, args.quiet)?;
    let footprint = Footprint::of(&folder)?;
    let headers = match &remote {
        Some(remote) => TensorHeaders::read(remote)?,
        None => TensorHeaders::read(&folder)?,
    };
    if let Some(headers) = &headers {
        footprint.check(headers)?;
    }
    let dtype = model::cache_dtype(args.cache, &Device::Cpu)?;
    let report = Report::new(model::name(&args.model), &footprint, headers.as_ref(), args.context, dtype);
    if let Some(file) = &args.svg {
        output::write_file(file, &picture::svg(&report)?)?;
    }
    if let Some(file) = &args.html {
        output::write_file(file, &page::html(&report)?)?;
    }
    let text = if args.json { serde_json::to_string(&report)? } else { text::table(&report) };
    writeln!(std::io::stdout(), "{text}").context("stdout")?;
    Ok(ExitCode::SUCCESS)
}
