//! llm8: 8-bit inference of BLOOM and OPT language models on the command line.

mod args;
mod commands;
mod demo;
mod device;
mod failure;
mod hub;
mod interrupt;
mod machine;
mod output;
mod page;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};
use mimalloc::MiMalloc;

/// Keeps what a layer has given back for the next one's output, which is as large. The system's allocator
/// gives blocks of megabytes back to the system, which has to clear them before they are used again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Bench(args) => commands::bench::run(&args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Compare(args) => commands::compare::run(args),
        Command::Download(args) => commands::download::run(args),
        Command::Footprint(args) => commands::footprint::run(args),
        Command::Quantize(args) => commands::quantize::run(&args),
    }
}
