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

use std::ffi::c_long;
use std::process::ExitCode;

use clap::Parser;
use libmimalloc_sys::{_mi_option_last, mi_option_set, mi_option_t};
use mimalloc::MiMalloc;

use args::{Args, Command};

/// Keeps what a layer has given back for the next one's output, which is as large. The system's allocator
/// gives blocks of megabytes back to the system, which has to clear them before they are used again.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// How often freed memory is given back, in milliseconds. All that is free goes then, also what the next layer of a
/// prompt needs, which the system has to clear first: rarely enough not to count beside a long prompt.
const PURGE_DELAY: c_long = 60_000;

fn main() -> ExitCode {
    /// Its number in mimalloc.h; the crate does not name it.
    const MI_OPTION_PURGE_DELAY: mi_option_t = 15;
    const { assert!(_mi_option_last == 47, "another version of mimalloc: look the number up again") };
    // SAFETY: an option may be set at any time.
    unsafe { mi_option_set(MI_OPTION_PURGE_DELAY, PURGE_DELAY) };
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
