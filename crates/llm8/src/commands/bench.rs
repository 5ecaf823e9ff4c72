//! `llm8 bench`: how fast a model is here, and what share of the machine's limits that is.

mod limits;
mod measure;
mod report;
mod text;

use std::ffi::OsString;
use std::io::Write;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;
use int8_models::{CacheDtype, CausalLm, Device, Footprint, Loaded, LongestContext, ModelFolder, Precision, published};

use super::model;
use crate::args::{BenchArgs, BenchPrecision, CacheArgs, Int8Args, MachineArgs, PrecisionArgs, PrecisionName};
use crate::failure::{self, Failure};
use crate::{device, interrupt, output};
use measure::{Bench, Figures, Test};
use report::{Load, Row};

pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    check(args)?;
    let rows = match (args.only_threads, args.threads.as_slice()) {
        (None, threads @ [_, _, ..]) => match in_processes_of_their_own(args, threads)? {
            Ok(rows) => rows,
            Err(code) => return Ok(code),
        },
        (only, threads) => measure(args, only.or(threads.first().copied()))?,
    };
    let text = match () {
        () if args.output.json || args.only_threads.is_some() => serde_json::to_string(&rows)?,
        () if args.csv => text::csv(&rows)?,
        () => text::table(&rows),
    };
    writeln!(std::io::stdout(), "{}", text.trim_end()).context("stdout")?;
    Ok(ExitCode::SUCCESS)
}

/// An error when what is asked for makes no sense, whatever the model.
fn check(args: &BenchArgs) -> anyhow::Result<()> {
    let precisions: Vec<PrecisionArgs> = args.precision.iter().map(|&name| precision_args(args, name)).collect();
    if precisions.iter().all(|precision| precision.precision != PrecisionName::Int8) {
        model::check_flags(&precisions[0])?;
    }
    let both = [BenchPrecision::Int8, BenchPrecision::Int8Head];
    if args.int8.int8_head && both.iter().all(|precision| args.precision.contains(precision)) {
        return Err(Failure::usage("with --int8-head, int8 and int8-head are the same precision").into());
    }
    if tests(args).is_empty() {
        return Err(Failure::usage("--prompt-len 0 and --gen-len 0 leave nothing to measure").into());
    }
    Ok(())
}

/// Every combination of what is to be measured with one cache.
fn tests(args: &BenchArgs) -> Vec<Test> {
    let mut tests = Vec::new();
    for batch in args.batch.iter().map(|&batch| batch.into()) {
        for &prompt_len in args.prompt_len.iter().filter(|&&len| len > 0) {
            tests.push(Test::Prefill { batch, prompt_len });
        }
        for &context in &args.context {
            for &gen_len in args.gen_len.iter().filter(|&&len| len > 0) {
                tests.push(Test::Decode { batch, context, gen_len });
            }
        }
    }
    tests
}

/// What keys and values are to be cached in, one after the other.
fn caches(args: &BenchArgs, device: &Device) -> anyhow::Result<Vec<CacheDtype>> {
    let dtypes: Vec<_> = args.cache_dtype.iter().copied().map(Some).collect();
    let dtypes = if dtypes.is_empty() { vec![None] } else { dtypes };
    dtypes.into_iter().map(|dtype| model::cache_dtype(CacheArgs { dtype }, device)).collect()
}

fn precision_args(args: &BenchArgs, precision: BenchPrecision) -> PrecisionArgs {
    let int8 = args.int8.clone();
    let (precision, int8_head) = match precision {
        BenchPrecision::Int8 => (PrecisionName::Int8, int8.int8_head),
        BenchPrecision::Int8Head => (PrecisionName::Int8, true),
        BenchPrecision::F16 => (PrecisionName::F16, int8.int8_head),
        BenchPrecision::Bf16 => (PrecisionName::Bf16, int8.int8_head),
        BenchPrecision::F32 => (PrecisionName::F32, int8.int8_head),
    };
    PrecisionArgs { precision, int8: Int8Args { int8_head, ..int8 } }
}

fn precisions(args: &BenchArgs, folder: &ModelFolder) -> anyhow::Result<Vec<Precision>> {
    args.precision.iter().map(|&name| model::precision(&precision_args(args, name), folder)).collect()
}

/// The precisions in the order they are measured in, those that are in memory at once side by side.
fn at_once<'a>(args: &BenchArgs, precisions: &'a [Precision]) -> impl Iterator<Item = &'a [Precision]> {
    precisions.chunks(if args.together { precisions.len() } else { 1 })
}

/// Measures each number of threads in a process of its own, as a pool of threads is started once; each has
/// its own memory peak, too. The exit code when one has failed, which it has told.
fn in_processes_of_their_own(args: &BenchArgs, threads: &[u16]) -> anyhow::Result<Result<Vec<Row>, ExitCode>> {
    // What is not here is fetched once. The device is closed again: each process opens it for itself.
    folder(args, &device::open(args.device, &args.output)?)?;
    let program = std::env::current_exe().context("the program cannot find itself")?;
    let mut rows = Vec::new();
    for count in threads {
        // The arguments begin with the command.
        let (command, rest) = (std::env::args_os().nth(1), std::env::args_os().skip(2));
        let only: [OsString; 2] = ["--only-threads".into(), count.to_string().into()];
        let mut child = Command::new(&program);
        child.args(command).args(only).args(rest).stdout(Stdio::piped()).stdin(Stdio::null());
        let output = child.spawn().and_then(|child| child.wait_with_output()).context("starting the program again")?;
        if !output.status.success() {
            return Ok(Err(ExitCode::from(output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))));
        }
        rows.extend(serde_json::from_slice::<Vec<Row>>(&output.stdout).context("the figures of another process")?);
    }
    Ok(Ok(rows))
}

/// Measures everything with one number of threads.
fn measure(args: &BenchArgs, threads: Option<u16>) -> anyhow::Result<Vec<Row>> {
    model::set_up(&MachineArgs { processor: args.processor.clone(), threads })?;
    let device = device::open(args.device, &args.output)?;
    let folder = folder(args, &device)?;
    interrupt::listen(args.output.quiet);
    let (tests, precisions) = (tests(args), precisions(args, &folder)?);

    let name = model::name(&args.model);
    let mut rows = Vec::new();
    for precisions in at_once(args, &precisions) {
        let loaded = precisions.iter().map(|precision| load(args, &folder, precision, &device));
        let loaded = loaded.collect::<anyhow::Result<Vec<_>>>()?;
        let models: Vec<&dyn CausalLm> = loaded.iter().map(|(loaded, _)| loaded.model.as_ref()).collect();
        let figures = measure_in_turns(args, precisions, &models, &tests)?;
        for ((precision, (_, load)), figures) in precisions.iter().zip(&loaded).zip(&figures) {
            rows.extend(figures.iter().map(|figures| Row::new(&name, precision, load, figures)));
        }
    }
    Ok(rows)
}

/// Loads the model in one precision, or draws its weights.
fn load(
    args: &BenchArgs,
    folder: &ModelFolder,
    precision: &Precision,
    device: &Device,
) -> anyhow::Result<(Loaded, Load)> {
    device::reset_peaks(device)?;
    let loaded = match args.dummy_weights {
        true => model::load_dummy_with_progress(folder, precision.clone(), device, &args.output)?,
        false => model::load_with_progress(folder, precision.clone(), device, &args.output)
            .map_err(|error| with_dummy_hint(error, !weights_are_missing(folder)))?,
    };
    let load = Load::new(args.dummy_weights, &loaded);
    Ok((loaded, load))
}

/// Runs every test of the models, one for each precision; the figures of each model.
fn measure_in_turns(
    args: &BenchArgs,
    precisions: &[Precision],
    models: &[&dyn CausalLm],
    tests: &[Test],
) -> anyhow::Result<Vec<Vec<Figures>>> {
    let bench = Bench { repetitions: args.repetitions.into(), caches: caches(args, models[0].device())? };
    let say = |names: &str, text: &str| {
        if !args.output.quiet {
            output::say(&format!("{names}, {}: {text}", text::threads(rayon::current_num_threads())));
        }
    };
    let names: Vec<String> = precisions.iter().map(model::precision_label).collect();
    let after_turn = |turn| say(&names.join(" and "), &format!("repetition {turn} of {}", args.repetitions));
    let figures = bench.measure(models, tests, after_turn)?;
    for (name, figures) in names.iter().zip(&figures) {
        for figures in figures {
            let cache = if bench.caches.len() > 1 {
                format!(", cache in {}", figures.cache_dtype.name())
            } else {
                String::new()
            };
            let rate = text::rate(figures.tokens_per_second().median);
            say(name, &format!("{}{cache}: {rate} tokens/s", figures.test));
        }
    }
    Ok(figures)
}

/// The folder of the model; for random weights its config alone.
fn folder(args: &BenchArgs, device: &Device) -> anyhow::Result<ModelFolder> {
    if args.dummy_weights {
        let (folder, _) = model::config_folder(&args.model, args.output.quiet)?;
        check_model(args, &folder, device)?;
        return Ok(folder);
    }
    let is_published =
        args.model.model.as_ref().and_then(|model| model.to_str()).is_some_and(|id| published(id).is_some());
    let folder = model::folder(&args.model, &args.output, |folder| check_model(args, folder, device));
    folder.map_err(|error| with_dummy_hint(error, !is_published))
}

/// Whether the folder has no file of weights.
fn weights_are_missing(folder: &ModelFolder) -> bool {
    int8_models::WeightForm::choose(|name| folder.path().join(name).exists()).is_none()
}

/// The error with a hint that says that weights are not needed, unless that is `beside_the_point`.
fn with_dummy_hint(error: anyhow::Error, beside_the_point: bool) -> anyhow::Error {
    if beside_the_point || interrupt::is_requested() {
        return error;
    }
    let dummy = "--dummy-weights measures the model with random weights";
    let hint = failure::hint(&error).map_or(dummy.to_string(), |hint| format!("{hint}; or {dummy}"));
    Failure::new(format!("{error:#}")).with_hint(hint).into()
}

/// An error when the model in `folder` has not as many positions as a test takes, or when there is too
/// little memory for it.
fn check_model(args: &BenchArgs, folder: &ModelFolder, device: &Device) -> anyhow::Result<()> {
    let tests = tests(args);
    let longest = tests.iter().map(Test::tokens).max().unwrap_or(0);
    if let LongestContext::Positions(positions) = Footprint::of(folder)?.longest_context()
        && longest > positions
    {
        let failure = Failure::new(format!("{longest} tokens are to be run, but the model has {positions} positions"));
        return Err(failure.with_hint("lower --prompt-len, --context or --gen-len").into());
    }
    // All that generate keep their caches until the end; prompts come one at a time.
    let cached = |is_kept| {
        tests
            .iter()
            .filter(move |test| matches!(test, Test::Decode { .. }) == is_kept)
            .map(|test| test.batch() * test.tokens())
    };
    let cached = cached(true).sum::<usize>() + cached(false).max().unwrap_or(0);
    let caches = caches(args, device)?;
    at_once(args, &precisions(args, folder)?).try_for_each(|precisions| {
        model::check_memory(cached, &caches, folder, precisions, &args.processor, device, "")
    })
}
