//! `llm8 footprint`: the memory that a model takes, from its config.json and tensor headers alone.

mod page;
mod picture;
mod report;
mod text;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{Footprint, ModelFolder, TensorHeaders, published};

use super::model;
use crate::args::FootprintArgs;
use crate::hub::{self, Hub, RemoteFiles};
use crate::{demo, output};
use report::Report;

pub fn run(args: FootprintArgs) -> anyhow::Result<ExitCode> {
    let (folder, remote) = folder(&args)?;
    let footprint = Footprint::of(&folder)?;
    let headers = match &remote {
        Some(remote) => TensorHeaders::read(remote)?,
        None => TensorHeaders::read(&folder)?,
    };
    if let Some(headers) = &headers {
        footprint.check(headers)?;
    }
    let report = Report::new(model::name(&args.model), &footprint, headers.as_ref(), args.context);
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

/// The folder of the model's config, and where its weight files are if they are not there: a folder on
/// disk, a published model's config inside the program, a model on the Hub, or without a name the
/// demonstration model, which is said.
fn folder(args: &FootprintArgs) -> anyhow::Result<(ModelFolder, Option<RemoteFiles>)> {
    let Some(path) = &args.model.model else {
        if !args.quiet {
            output::say("No model given: this is the small demonstration model inside the program.");
        }
        return Ok((demo::folder(), None));
    };
    let Some(id) = hub::id_of(path) else {
        model::check_local(&args.model.hub)?;
        return Ok((ModelFolder::open(path)?, None));
    };
    // A published model's shape is known; of a revision that is asked for, it may be another.
    match published(id).filter(|_| args.model.hub.revision.is_none()) {
        Some(folder) => Ok((folder, None)),
        None => {
            let (folder, remote) = Hub::new(id, &args.model.hub, args.quiet)?.headers()?;
            Ok((ModelFolder::open(folder)?, remote))
        }
    }
}
