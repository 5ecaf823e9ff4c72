//! The command line; the doc comments are its help.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use int8_models::{CacheDtype, GenerateOptions};

/// 8-bit inference of BLOOM and OPT language models: half the memory of fp16, the same text.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write the text that follows a prompt.
    Generate(Box<GenerateArgs>),
    /// Run a model at 16 bits and at int8 in turn, and compare.
    Compare(Box<CompareArgs>),
    /// Say how much memory a model takes, before it is downloaded.
    Footprint(FootprintArgs),
    /// Fetch a model from the Hugging Face Hub, to be used later.
    Download(DownloadArgs),
    /// Write a model's weights in int8, to load in a moment.
    Quantize(Box<QuantizeArgs>),
    /// Measure how fast a model is here, and what share of the machine's limits that is.
    Bench(Box<BenchArgs>),
}

/// Which model.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// A BLOOM or OPT model: its id on the Hugging Face Hub, such as bigscience/bloomz-560m, or a folder
    /// with config.json, the tokenizer's files, and weights in safetensors or pytorch_model.bin. Without
    /// it, the small demonstration model inside this program is used.
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub hub: HubArgs,
}

/// What the weights are held in.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Precision")]
pub struct PrecisionArgs {
    /// What the weights of the linear layers are held in.
    #[arg(long, value_enum, default_value_t = PrecisionName::Int8)]
    pub precision: PrecisionName,

    #[command(flatten)]
    pub int8: Int8Args,
}

/// How LLM.int8() is done.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Precision")]
pub struct Int8Args {
    /// Magnitude from which a feature of the activations is an outlier and stays in float; 0 keeps
    /// none in float [int8 only; default: what an int8 checkpoint says, or else 6].
    #[arg(long, value_name = "X", value_parser = threshold)]
    pub threshold: Option<f32>,

    /// Keep this linear layer in 16 bits: the name of a module or whole parts of it, such as h.0 or
    /// mlp.dense_h_to_4h; may be given several times [int8 only].
    #[arg(long = "skip-module", value_name = "NAME")]
    pub skip_modules: Vec<String>,

    /// Hold the embedding and the head in int8 too: less memory, a little less exact [int8 only].
    #[arg(long)]
    pub int8_head: bool,
}

/// What to compute with.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    #[command(flatten)]
    pub processor: ProcessorArgs,

    /// Threads to compute with [default: all cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(THREADS))]
    pub threads: Option<u16>,
}

/// How many threads can be asked for.
const THREADS: std::ops::RangeInclusive<i64> = 1..=1024;

/// What to compute on.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Machine")]
pub struct ProcessorArgs {
    /// Go on though the memory that is free seems too little for the model.
    #[arg(long)]
    pub force: bool,

    /// Instruction set of the CPU kernels, for measuring and for finding faults: portable, avx2,
    /// avx-vnni, avx512-vnni-256, avx512-vnni or neon-dotprod [default: the fastest here].
    #[arg(long, value_name = "NAME", env = "LLM8_INSTRUCTION_SET", hide_env_values = true, hide_short_help = true)]
    pub instruction_set: Option<String>,
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Machine")]
pub struct DeviceArgs {
    /// Where to run: auto, cpu, cuda, or cuda:N for the N-th device counted from 0. auto is the first CUDA device
    /// if this program was built for CUDA and there is one, and else the CPU.
    #[arg(long = "device", value_name = "DEVICE", default_value = "auto", value_parser = device)]
    pub name: DeviceName,
}

/// What a model that runs keeps of the tokens before.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Precision")]
pub struct CacheArgs {
    /// What keys and values are cached in [default: int16 on a CPU, f16 on a CUDA device].
    #[arg(long = "cache-dtype", value_name = "CACHE_DTYPE", value_enum)]
    pub dtype: Option<CacheDtypeName>,
}

/// How a model is found on the Hugging Face Hub, and where it is kept.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Hub")]
pub struct HubArgs {
    /// Branch, tag or commit of a model on the Hub [default: main].
    #[arg(long, value_name = "R")]
    pub revision: Option<String>,

    /// Access token for private and gated models [default: HF_TOKEN, or the login that Python's tools
    /// have stored].
    #[arg(long, value_name = "T")]
    pub token: Option<String>,

    /// Where models of the Hub are kept [default: HF_HUB_CACHE, or the cache that Python's tools share].
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Use what is in the cache, and no network, as HF_HUB_OFFLINE=1 does.
    #[arg(long)]
    pub offline: bool,
}

/// The names of the precisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionName {
    /// LLM.int8(): blocks in 8 bits, embedding and head in 16.
    Int8,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
}

/// What can be measured: the precisions, and int8 with its head in int8 too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchPrecision {
    /// LLM.int8(): blocks in 8 bits, embedding and head in 16.
    Int8,
    /// The same with --int8-head.
    Int8Head,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
}

/// What int8 can be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BaselineName {
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit floats.
    F32,
}

/// What keys and values can be cached in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheDtypeName {
    /// 8-bit integers with a scale for each head's key and value, on a CPU: about half the memory and reading of f16,
    /// and less exact.
    Int8,
    /// 16-bit integers with a scale for each head's key and value, on a CPU: faster than f16.
    Int16,
    /// 16-bit floats.
    F16,
    /// 32-bit floats, as keys and values are computed: twice the memory, and twice the reading at each token.
    F32,
}

impl From<CacheDtypeName> for CacheDtype {
    fn from(name: CacheDtypeName) -> Self {
        match name {
            CacheDtypeName::Int8 => Self::Int8,
            CacheDtypeName::Int16 => Self::Int16,
            CacheDtypeName::F16 => Self::F16,
            CacheDtypeName::F32 => Self::F32,
        }
    }
}

/// A device by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// The best there is, in this build and on this machine.
    Auto,
    Cpu,
    Cuda(usize),
}

/// What is said on the terminal.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Write JSON to stdout instead of text.
    #[arg(long)]
    pub json: bool,

    /// Say nothing on stderr but errors.
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Say more on stderr: threads, instruction set, the bytes of every tensor.
    #[arg(short, long)]
    pub verbose: bool,
}

/// What the model is to go on from.
#[derive(Debug, clap::Args)]
pub struct PromptArgs {
    /// The prompt; `-` reads it from stdin, as does leaving it out when stdin is not a terminal. One
    /// line break at the end of a prompt from stdin or a file is not part of it.
    pub prompt: Option<OsString>,

    /// Read the prompt from this file.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,

    /// Token ids instead of text, separated by commas: 2,45,7.
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = token_id)]
    #[arg(conflicts_with_all = ["prompt", "prompt_file"])]
    pub prompt_ids: Option<Vec<u32>>,
}

/// Write the text that follows a prompt.
///
/// The text goes to stdout as it comes; everything else goes to stderr.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct GenerateArgs {
    #[command(flatten)]
    pub prompt: PromptArgs,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub precision: PrecisionArgs,

    #[command(flatten)]
    pub cache: CacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    #[command(flatten)]
    pub machine: MachineArgs,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// Run a model at 16 bits and at int8 in turn, and show what int8 saves and what it costs.
///
/// Without a prompt a sample text is gone on from; `-` reads one from stdin.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct CompareArgs {
    #[command(flatten)]
    pub prompt: PromptArgs,

    #[command(flatten)]
    pub model: ModelArgs,

    /// What int8 is compared with.
    #[arg(long, value_enum, default_value_t = BaselineName::F16, help_heading = "Precision")]
    pub baseline: BaselineName,

    /// Keep both models in memory, instead of one after the other.
    #[arg(long, help_heading = "Precision")]
    pub together: bool,

    #[command(flatten)]
    pub int8: Int8Args,

    #[command(flatten)]
    pub cache: CacheArgs,

    #[command(flatten)]
    pub device: DeviceArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    #[command(flatten)]
    pub machine: MachineArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    /// Write the comparison as a page to this file.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
}

/// Say how much memory a model takes: its weights by component and precision, its cache, and which
/// machines and GPUs hold them.
///
/// Computed from config.json alone: a folder needs to hold no more, and published models are known by
/// name. Where there are weight files, on the Hub too, their headers are checked against it.
#[derive(Debug, clap::Args)]
pub struct FootprintArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Tokens to count the cache for [default: 2048, or the longest context where that is shorter].
    #[arg(long, value_name = "N", help_heading = "Precision", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    pub context: Option<u32>,

    #[command(flatten)]
    pub cache: CacheArgs,

    /// Draw the bytes of each precision to this file, as an SVG picture.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub svg: Option<PathBuf>,

    /// Write a page with the picture and all figures to this file.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,

    /// Write one JSON object to stdout instead of text.
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// Say nothing on stderr but errors.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

/// Write a model's weights in int8, to load in a moment.
///
/// The new folder holds the checkpoint in the layout of bitsandbytes, with the tokenizer's files: llm8
/// loads it without quantising anything again, and so does Transformers with bitsandbytes, unless
/// --int8-head was given. The folder appears when it is whole; on any error nothing is left. All of it is done
/// on the CPU.
#[derive(Debug, clap::Args)]
pub struct QuantizeArgs {
    /// The folder to write: a new one, or one that is empty.
    #[arg(short, long, value_name = "DIR")]
    pub output_dir: PathBuf,

    /// Split the weights into files of at most this size, such as 5GB or 500MB; a larger tensor has a
    /// file of its own.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    pub shard_size: usize,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub int8: Int8Args,

    #[command(flatten)]
    pub machine: MachineArgs,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// Measure how fast a model is here: the prompt and the tokens after it apart, and what share of the
/// machine's own limits that is.
///
/// Where an option takes several values, separated by commas, every combination is measured. A prompt's speed
/// is a share of the int8 products that the processor can do, that of a few tokens, and of those after a prompt, of
/// the bytes that can be read from memory. Limits are measured before and after every repetition, with the same
/// threads and on the same weights: each row has its own, and where other work comes between a share may pass 100 %.
///
/// In the table, `of the limit` is the share of the whole; `in products` the share of the time that the linear
/// layers' products take (with the head's, where memory is the limit), and `their limit` the share of the limit in
/// that time alone. `-`: not known, as for a prompt in floats. --json and --csv also have where the rest goes.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelArgs,

    /// Draw the weights at random instead of loading them: a folder needs to hold only config.json, and
    /// published models are known by name.
    #[arg(long, help_heading = "Model")]
    pub dummy_weights: bool,

    /// What the weights of the linear layers are held in.
    #[arg(long, value_enum, default_values_t = [BenchPrecision::Int8], value_delimiter = ',')]
    #[arg(help_heading = "Precision")]
    pub precision: Vec<BenchPrecision>,

    /// Keep the model in all precisions in memory, and measure them in turns too, instead of one after the other: what
    /// else the machine does meets them all alike. Peaks of memory are then of all.
    #[arg(long, help_heading = "Precision")]
    pub together: bool,

    #[command(flatten)]
    pub int8: Int8Args,

    /// What keys and values are cached in [default: int16 on a CPU, f16 on a CUDA device].
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "Precision")]
    pub cache_dtype: Vec<CacheDtypeName>,

    #[command(flatten)]
    pub device: DeviceArgs,

    /// Tokens of the prompt; 0 measures no prompt.
    #[arg(long, value_name = "N", default_values_t = [512], value_delimiter = ',', value_parser = tokens)]
    pub prompt_len: Vec<usize>,

    /// Tokens to generate one by one; 0 generates none.
    #[arg(long, value_name = "N", default_values_t = [64], value_delimiter = ',', value_parser = tokens)]
    pub gen_len: Vec<usize>,

    /// Tokens that are in the cache before the first of those is generated.
    #[arg(long, value_name = "N", default_values_t = [0], value_delimiter = ',', value_parser = tokens)]
    pub context: Vec<usize>,

    /// Sequences that are run together.
    #[arg(long, value_name = "N", default_values_t = [1], value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: Vec<u16>,

    /// How often each is measured, in turns, after a run that warms up; the median counts.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    pub repetitions: u16,

    /// Threads to compute with [default: all cores].
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(THREADS))]
    #[arg(help_heading = "Machine")]
    pub threads: Vec<u16>,

    #[command(flatten)]
    pub processor: ProcessorArgs,

    #[command(flatten)]
    pub output: OutputArgs,

    /// Write comma-separated values with a header line to stdout instead of text.
    #[arg(long, conflicts_with = "json", help_heading = "Output")]
    pub csv: bool,

    /// The one of several numbers of threads that this process is for; the rows go to stdout as JSON.
    #[arg(long, hide = true)]
    pub only_threads: Option<u16>,
}

/// How tokens are chosen, and when to stop.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Tokens to generate at most.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,

    /// 0 takes the likeliest token each time; higher values, up to 100, draw more freely.
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f64,

    /// Draw among the K likeliest tokens only, as many as Transformers does by default; 0 draws among
    /// all.
    #[arg(long, value_name = "K", default_value_t = 50)]
    pub top_k: usize,

    /// Draw among the likeliest tokens that together have this probability, up to 1; applied after
    /// --top-k.
    #[arg(long, value_name = "P", value_parser = probability)]
    pub top_p: Option<f64>,

    /// Above 1, tokens that the prompt or the text holds already become less likely; 0.01 to 100.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = penalty)]
    pub repetition_penalty: f32,

    /// The same seed draws the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Go on when the model ends its text.
    #[arg(long)]
    pub ignore_eos: bool,
}

/// Fetch a model from the Hugging Face Hub, to be used later.
///
/// What an interrupted download has left is taken up. The model's folder is written to stdout.
#[derive(Debug, clap::Args)]
pub struct DownloadArgs {
    /// The model's id, such as bigscience/bloomz-560m.
    #[arg(short, long, value_name = "MODEL")]
    pub model: String,

    #[command(flatten)]
    pub hub: HubArgs,

    /// Write one JSON object with `model`, `folder`, `commit`, `files` and their `bytes` to stdout.
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// Say nothing on stderr but errors.
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

fn token_id(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| "wanted token ids, such as 2,45,7".to_string())
}

/// A number of tokens.
fn tokens(text: &str) -> Result<usize, String> {
    const MAX: usize = 1 << 20;
    text.trim().parse().ok().filter(|count| *count <= MAX).ok_or_else(|| format!("wanted a number from 0 to {MAX}"))
}

/// A finite number for which `holds` is true; `wanted` says what that is.
fn number(text: &str, holds: impl Fn(f64) -> bool, wanted: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && holds(value) => Ok(value),
        _ => Err(format!("wanted {wanted}")),
    }
}

fn threshold(text: &str) -> Result<f32, String> {
    let is_threshold = |value: f64| value == 0.0 || (1e-30..=1e30).contains(&value);
    number(text, is_threshold, "0, or a number from 1e-30 to 1e30").map(|value| value as f32)
}

fn temperature(text: &str) -> Result<f64, String> {
    let range = 0.0..=GenerateOptions::MAX_TEMPERATURE;
    number(text, |value| range.contains(&value), &format!("a number from 0 to {}", range.end()))
}

fn probability(text: &str) -> Result<f64, String> {
    let range = GenerateOptions::MIN_TOP_P..=1.0;
    number(text, |value| range.contains(&value), &format!("a number from {} to 1", range.start()))
}

fn penalty(text: &str) -> Result<f32, String> {
    let range = GenerateOptions::REPETITION_PENALTIES;
    let wanted = format!("a number from {} to {}", range.start(), range.end());
    number(text, |value| range.contains(&(value as f32)), &wanted).map(|value| value as f32)
}

/// Bytes, in decimal units or as they are.
fn size(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: Option<usize> = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => Some(1),
        "KB" => Some(1_000),
        "MB" => Some(1_000_000),
        "GB" => Some(1_000_000_000),
        "TB" => Some(1_000_000_000_000),
        _ => None,
    };
    let size = digits.trim().parse::<usize>().ok().zip(unit).and_then(|(count, unit)| count.checked_mul(unit));
    size.filter(|size| *size > 0).ok_or_else(|| "wanted a size, such as 5GB or 500MB".to_string())
}

fn device(text: &str) -> Result<DeviceName, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceName::Auto),
        None if text == "cpu" => Ok(DeviceName::Cpu),
        None if text == "cuda" => Ok(DeviceName::Cuda(0)),
        // As many as the driver can count.
        Some(("cuda", number)) => match number.parse::<u16>() {
            Ok(ordinal) if !number.starts_with('+') => Ok(DeviceName::Cuda(ordinal.into())),
            _ => Err("wanted cuda:N with a small number N, such as cuda:0".to_string()),
        },
        _ => Err("wanted auto, cpu, cuda or cuda:N".to_string()),
    }
}
