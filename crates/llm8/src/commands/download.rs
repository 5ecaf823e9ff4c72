//! `llm8 download`: a model from the Hub into the cache.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use crate::args::DownloadArgs;
use crate::failure::Failure;
use crate::hub::{self, Hub};
use crate::interrupt;

/// What `--json` writes.
#[derive(Serialize)]
struct Report {
    model: String,
    /// The folder of the model's files.
    folder: String,
    /// The commit that the revision stands for.
    commit: String,
    files: Vec<FileReport>,
}

#[derive(Serialize)]
struct FileReport {
    name: String,
    bytes: u64,
}

pub fn run(args: DownloadArgs) -> anyhow::Result<ExitCode> {
    if !hub::is_id(&args.model) {
        let failure = Failure::usage(format!("`{}` is no id of a model on the Hub", args.model));
        return Err(failure.with_hint("an id is ORGANISATION/MODEL, such as bigscience/bloomz-560m").into());
    }
    interrupt::listen(args.quiet);
    let folder = Hub::new(&args.model, &args.hub, args.quiet)?.fetch_and_compare()?;
    let mut stdout = std::io::stdout().lock();
    if !args.json {
        return writeln!(stdout, "{}", folder.display()).context("stdout").map(|()| ExitCode::SUCCESS);
    }
    let mut files = Vec::new();
    for file in folder.read_dir().with_context(|| folder.display().to_string())? {
        let file = file?;
        // Of what a link leads to; Python's tools may have put folders beside the files.
        if let Ok(metadata) = file.path().metadata()
            && metadata.is_file()
        {
            let name = file.file_name().to_string_lossy().into_owned();
            files.push(FileReport { name, bytes: metadata.len() });
        }
    }
    files.sort_by(|one, other| one.name.cmp(&other.name));
    let commit = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let report = Report { model: args.model, folder: folder.display().to_string(), commit, files };
    writeln!(stdout, "{}", serde_json::to_string(&report)?).context("stdout")?;
    Ok(ExitCode::SUCCESS)
}
