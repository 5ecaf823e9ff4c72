//! From the arguments to a loaded model and how it is to be run.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use int8_models::{
    CacheDtype, Device, Footprint, GenerateOptions, Int8Options, LoadOptions, Loaded, LongestContext, ModelFolder,
    Precision, Progress, architecture, load, load_dummy, published, stored_int8,
};
use int8_ops::cpu::Kernels;
use int8_ops::device::label;

use crate::args::{
    CacheArgs, HubArgs, Int8Args, MachineArgs, ModelArgs, OutputArgs, PrecisionArgs, PrecisionName, ProcessorArgs,
    SamplingArgs,
};
use crate::demo;
use crate::failure::Failure;
use crate::hub::{self, Hub, RemoteFiles};
use crate::{device, interrupt, output};

/// Sets up threads and kernels as the arguments say.
pub fn set_up(args: &MachineArgs) -> anyhow::Result<()> {
    if let Some(threads) = args.threads {
        // SAFETY: nothing has started a thread yet. The variable is read by rayon's pool, which our
        // kernels use, and by candle's own, when each is first used; candle offers no other way.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    rayon::ThreadPoolBuilder::new().build_global().map_err(|error| {
        Failure::new(format!("threads cannot be started: {error}")).with_hint("ask for fewer with --threads")
    })?;
    if let Some(name) = args.processor.instruction_set.as_deref().filter(|name| !name.is_empty()) {
        Kernels::select(name).map_err(|error| {
            let hint = "leave out --instruction-set, and the variable LLM8_INSTRUCTION_SET, for the fastest";
            // A Candle error may carry a backtrace.
            Failure::new(error.to_string().lines().next().unwrap_or_default()).with_hint(hint)
        })?;
    }
    Ok(())
}

/// What the model is called.
pub fn name(args: &ModelArgs) -> String {
    args.model.as_ref().map_or(demo::NAME.to_string(), |model| model.display().to_string())
}

/// The folder of the model, which must be of an architecture that there is; without one in the
/// arguments, the demonstration model, which is said.
///
/// `check` is given the folder once it holds the config, and may refuse it: before any weight is fetched.
pub fn folder(
    args: &ModelArgs,
    output: &OutputArgs,
    check: impl Fn(&ModelFolder) -> anyhow::Result<()>,
) -> anyhow::Result<ModelFolder> {
    let Some(path) = &args.model else {
        check_local(&args.hub)?;
        if !output.quiet {
            output::say(
                "No model given: this is the small demonstration model, trained on Debian's documentation.\n\
                 Name a real one, on the Hugging Face Hub or by its folder: --model bigscience/bloomz-560m",
            );
        }
        return Ok(demo::folder());
    };
    let folder = match hub::id_of(path) {
        Some(id) => {
            interrupt::listen(output.quiet);
            ModelFolder::open(Hub::new(id, &args.hub, output.quiet)?.fetch(&check)?)?
        }
        None => {
            check_local(&args.hub)?;
            ModelFolder::open(path)?
        }
    };
    let architecture = architecture(&folder)?;
    check(&folder)?;
    if output.verbose {
        output::say(&format!("architecture {architecture}"));
    }
    Ok(folder)
}

/// A folder with the model's config.json at least, and where its weight files are if they are not there: a
/// folder on disk, a published model's config inside the program, a model on the Hub, or without a name the
/// demonstration model, which is said.
pub fn config_folder(args: &ModelArgs, quiet: bool) -> anyhow::Result<(ModelFolder, Option<RemoteFiles>)> {
    let Some(path) = &args.model else {
        if !quiet {
            output::say("No model given: this is the small demonstration model inside the program.");
        }
        return Ok((demo::folder(), None));
    };
    let Some(id) = hub::id_of(path) else {
        check_local(&args.hub)?;
        return Ok((ModelFolder::open(path)?, None));
    };
    // A published model's shape is known; of a revision that is asked for, it may be another.
    match published(id).filter(|_| args.hub.revision.is_none()) {
        Some(folder) => Ok((folder, None)),
        None => {
            let (folder, remote) = Hub::new(id, &args.hub, quiet)?.headers()?;
            Ok((ModelFolder::open(folder)?, remote))
        }
    }
}

/// An error when flags that only models on the Hub have are given with a folder.
pub fn check_local(args: &HubArgs) -> anyhow::Result<()> {
    match args.revision {
        Some(_) => Err(Failure::usage("--revision belongs to models on the Hub, not to a folder").into()),
        None => Ok(()),
    }
}

/// An error when flags that belong to int8 are given with another precision.
pub fn check_flags(args: &PrecisionArgs) -> anyhow::Result<()> {
    let given = [
        ("--threshold", args.int8.threshold.is_some()),
        ("--skip-module", !args.int8.skip_modules.is_empty()),
        ("--int8-head", args.int8.int8_head),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((flag, _)) if args.precision != PrecisionName::Int8 => {
            Err(Failure::usage(format!("{flag} belongs to --precision int8")).into())
        }
        _ => Ok(()),
    }
}

/// The precision that the arguments describe, for the model in `folder`.
pub fn precision(args: &PrecisionArgs, folder: &ModelFolder) -> anyhow::Result<Precision> {
    Ok(match args.precision {
        PrecisionName::F32 => Precision::F32,
        PrecisionName::F16 => Precision::F16,
        PrecisionName::Bf16 => Precision::BF16,
        PrecisionName::Int8 => Precision::Int8(int8_options(&args.int8, folder)?),
    })
}

/// Whether the precision holds the head in int8.
pub fn has_int8_head(precision: &Precision) -> bool {
    matches!(precision, Precision::Int8(options) if options.head)
}

/// What a reader calls a precision.
pub fn precision_label(precision: &Precision) -> String {
    with_head(precision.name(), has_int8_head(precision))
}

/// What a reader calls a precision of this name.
pub fn with_head(name: &str, has_int8_head: bool) -> String {
    if has_int8_head { format!("{name} + head") } else { name.to_string() }
}

/// How int8 is to be applied to the model in `folder`.
pub fn int8_options(args: &Int8Args, folder: &ModelFolder) -> anyhow::Result<Int8Options> {
    let threshold = match args.threshold {
        Some(threshold) => (threshold > 0.0).then_some(threshold),
        None => stored_int8(folder)?.map_or(Some(int8_ops::OUTLIER_THRESHOLD), |stored| stored.threshold),
    };
    Ok(Int8Options { threshold, skip_modules: args.skip_modules.clone(), head: args.int8_head })
}

/// The tokens of a run that generates so many after a prompt, with a model that may have fewer positions.
pub fn tokens_of_run(folder: &ModelFolder, prompt_len: usize, max_new_tokens: usize) -> anyhow::Result<usize> {
    let tokens = prompt_len.saturating_add(max_new_tokens);
    Ok(match Footprint::of(folder)?.longest_context() {
        LongestContext::Positions(positions) => tokens.min(positions),
        LongestContext::Trained(_) => tokens,
    })
}

/// An error when the memory that is free on the device is too little for the model in `folder`, with so many
/// tokens in each of these caches, at these precisions at once, unless the arguments say to go on; it names a cache
/// or a precision that would fit alone. `command` stands before a precision's flags, where they are another command's.
pub fn check_memory(
    tokens: usize,
    caches: &[CacheDtype],
    folder: &ModelFolder,
    precisions: &[Precision],
    args: &ProcessorArgs,
    device: &Device,
    command: &str,
) -> anyhow::Result<()> {
    let footprint = Footprint::of(folder)?;
    let with_caches = |precision: &Precision, caches: &[CacheDtype]| {
        let weights = footprint.weights(precision).total();
        caches.iter().fold(weights, |sum, &dtype| sum.saturating_add(footprint.kv_cache(tokens, dtype)))
    };
    let together = |caches: &[CacheDtype]| {
        precisions.iter().fold(0u64, |sum, precision| sum.saturating_add(with_caches(precision, caches)))
    };
    let needed = together(caches);
    let Some(free) = device::free_memory(device).filter(|free| needed > *free && !args.force) else {
        return Ok(());
    };
    let int8 = |head| Precision::Int8(Int8Options { head, ..Int8Options::default() });
    let default_dtype = CacheDtype::of(device);
    let least_dtype = if device.is_cpu() { CacheDtype::Int8 } else { default_dtype };
    let held_in = |dtype: CacheDtype| {
        if dtype == default_dtype { String::new() } else { format!(" --cache-dtype {}", dtype.name()) }
    };
    // Another cache first, and then from what loses least to what takes least.
    let other_caches = [default_dtype, CacheDtype::F16, least_dtype]
        .map(|dtype| (format!("--cache-dtype {}", dtype.name()), together(&[dtype])));
    let precisions_down = [
        ("--precision f16", Precision::F16),
        ("--precision int8", int8(false)),
        ("--precision int8 --int8-head", int8(true)),
    ];
    let precisions_down = precisions_down.iter().flat_map(|(flags, precision)| {
        let of = |dtype| (format!("{command}{flags}{}", held_in(dtype)), with_caches(precision, &[dtype]));
        caches.iter().copied().take(1).chain([default_dtype, least_dtype]).map(of).collect::<Vec<_>>()
    });
    let smaller: Vec<(String, u64)> = other_caches.into_iter().chain(precisions_down).collect();
    let apart = precisions
        .iter()
        .map(|precision| with_caches(precision, caches))
        .max()
        .filter(|largest| precisions.len() > 1 && *largest <= free);
    let least = smaller.iter().map(|(_, bytes)| *bytes).min().unwrap_or(needed);
    let hint = match smaller.iter().find(|(_, bytes)| *bytes <= free) {
        _ if apart.is_some() => "one after the other, without --together, they would fit".to_string(),
        Some((flags, bytes)) => format!("with {flags} it needs {}, which would fit", output::precise_bytes(*bytes)),
        None if needed <= least => "there is no smaller way to hold it".to_string(),
        None => {
            let (dtype, bytes) = (least_dtype.name(), output::precise_bytes(least));
            format!(
                "int8 with an int8 head and a cache in {dtype}, which is the least, needs {bytes}, too much as well"
            )
        }
    };
    let is_roomier = !device.is_cpu() && device::free_memory(&Device::Cpu).is_some_and(|free| needed <= free);
    let hint = if is_roomier { format!("{hint}; with --device cpu it would fit") } else { hint };
    let weights: u64 = precisions.iter().map(|precision| footprint.weights(precision).total()).sum();
    let hint = if weights <= free { format!("{hint}; fewer tokens need less") } else { hint };
    let names = precisions.iter().map(precision_label).collect::<Vec<_>>().join(" and ");
    let (needed, free) = (output::precise_bytes(needed), output::precise_bytes(free));
    let place = if device.is_cpu() { String::new() } else { format!(" on {}", label(device)) };
    let tokens = output::thousands(tokens as u64);
    let cache = match caches {
        [_] => "the cache".to_string(),
        _ => format!("each of {} caches", caches.len()),
    };
    let verb = if precisions.len() > 1 { "need" } else { "needs" };
    let message = format!(
        "{}: {names} {verb} {needed} of memory{place} with {tokens} tokens in {cache}, but {free} is free",
        folder.path().display()
    );
    Err(Failure::new(message).with_hint(format!("{hint}; --force goes on all the same")).into())
}

/// How to generate with a loaded model, as the arguments say.
pub fn generate_options(args: &SamplingArgs, cache: CacheArgs, loaded: &Loaded) -> anyhow::Result<GenerateOptions> {
    Ok(GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: (args.top_k > 0).then_some(args.top_k),
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        cache_dtype: Some(cache_dtype(cache, loaded.model.device())?),
        eos: if args.ignore_eos { Vec::new() } else { loaded.eos.clone() },
        is_interrupted: interrupt::is_requested,
    })
}

/// What keys and values are cached in on a device, as the arguments say; an error where it can't be.
pub fn cache_dtype(cache: CacheArgs, device: &Device) -> anyhow::Result<CacheDtype> {
    let best = CacheDtype::of(device);
    let dtype = cache.dtype.map_or(best, CacheDtype::from);
    if dtype.is_integer() && !device.is_cpu() {
        let message = format!("keys and values can't be cached in {} on {}", dtype.name(), label(device));
        let hint = format!("leave --cache-dtype out for {}, or run with --device cpu", best.name());
        return Err(Failure::new(message).with_hint(hint).into());
    }
    Ok(dtype)
}

/// A progress bar on a terminal, and what moves it.
pub fn progress_bar(what: &str, output: &OutputArgs) -> anyhow::Result<(ProgressBar, impl Fn(Progress) + use<>)> {
    let bar = ProgressBar::new(0);
    if output.quiet || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let template = format!("{what} {{bar:30}} {{decimal_bytes}}/{{decimal_total_bytes}}");
    bar.set_style(ProgressStyle::with_template(&template)?);
    let moved = bar.clone();
    let progress = move |progress: Progress| {
        moved.set_length(progress.total_bytes as u64);
        moved.set_position(progress.bytes as u64);
    };
    Ok((bar, progress))
}

/// Loads the model, with a progress bar on a terminal. Ctrl-C ends the program between two tensors: there
/// is nothing yet to be kept.
pub fn load_with_progress(
    folder: &ModelFolder,
    precision: Precision,
    device: &Device,
    output: &OutputArgs,
) -> anyhow::Result<Loaded> {
    with_progress("loading", precision, device, output, |options| load(folder, options))
}

/// Makes the model with random weights, with a progress bar on a terminal, and Ctrl-C as above.
pub fn load_dummy_with_progress(
    folder: &ModelFolder,
    precision: Precision,
    device: &Device,
    output: &OutputArgs,
) -> anyhow::Result<Loaded> {
    with_progress("drawing", precision, device, output, |options| load_dummy(folder, options))
}

fn with_progress(
    what: &str,
    precision: Precision,
    device: &Device,
    output: &OutputArgs,
    load: impl FnOnce(&LoadOptions) -> int8_models::Result<Loaded>,
) -> anyhow::Result<Loaded> {
    let (bar, progress) = progress_bar(what, output)?;
    let cleared = bar.clone();
    let progress = move |loaded: Progress| {
        if interrupt::is_requested() {
            cleared.finish_and_clear();
            std::process::exit(interrupt::EXIT_CODE.into());
        }
        progress(loaded);
    };
    let loaded = load(&LoadOptions { precision, device: device.clone(), progress: Some(Box::new(progress)) });
    bar.finish_and_clear();
    let loaded = loaded?;
    if output.verbose {
        for entry in loaded.ledger.entries() {
            output::say(&format!("{:>10}  {}", output::bytes(entry.bytes), entry.name));
        }
        output::say(&format!("{} threads, {} kernels", rayon::current_num_threads(), Kernels::active().name));
        if let Some(line) = device::describe(device) {
            output::say(&line);
        }
    }
    Ok(loaded)
}
