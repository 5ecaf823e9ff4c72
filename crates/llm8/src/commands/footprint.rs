//! `llm8 footprint`: the memory that a model takes, from its config.json and tensor headers alone.

mod page;
mod picture;
mod report;
mod text;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use int8_models::{Footprint, ModelFolder, TensorHeaders, published, published_names};

use crate::args::FootprintArgs;
use crate::failure::Failure;
use crate::{demo, output};
use report::Report;

pub fn run(args: FootprintArgs) -> anyhow::Result<ExitCode> {
    let folder = folder(args.model.as_deref(), args.quiet)?;
    let footprint = Footprint::of(&folder)?;
    let headers = TensorHeaders::read(&folder)?;
    if let Some(headers) = &headers {
        footprint.check(headers)?;
    }
    let report = Report::new(&folder, &footprint, headers.as_ref(), args.context);
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

/// The folder of the model: one on disk, that of a published model's config, or without a name the
/// demonstration model, which is said.
fn folder(model: Option<&Path>, quiet: bool) -> anyhow::Result<ModelFolder> {
    let Some(path) = model else {
        if !quiet {
            output::say("No model given: this is the small demonstration model inside the program.");
        }
        return Ok(demo::folder());
    };
    if path.symlink_metadata().is_err() {
        let published = path.to_str().and_then(published);
        return published.ok_or_else(|| {
            let message = format!("{}: no such folder, and no published model that is known here", path.display());
            let names = published_names().collect::<Vec<_>>().join(", ");
            Failure::new(message).with_hint(format!("known by name: {names}")).into()
        });
    }
    Ok(ModelFolder::open(path)?)
}
