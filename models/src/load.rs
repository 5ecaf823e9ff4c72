//! A folder becomes a model: config, then weights in the chosen precision.

use std::cell::Cell;
use std::time::{Duration, Instant};

use candle_core::Device;
use int8_ops::device;

use crate::bloom::Bloom;
use crate::causal_lm::CausalLm;
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::error::Result;
use crate::folder::ModelFolder;
use crate::ledger::Ledger;
use crate::opt::Opt;
use crate::outline::Outline;
use crate::precision::Precision;
use crate::quantization_config::StoredInt8;
use crate::source::Source;
use crate::weights::Loader;

/// How a model is loaded.
pub struct LoadOptions {
    /// What the weights are held in; int8 by default.
    pub precision: Precision,
    /// Where the weights are, and the model runs; the CPU by default. Tensors are brought there one by one.
    pub device: Device,
    /// Called after every tensor.
    pub progress: Option<Box<dyn Fn(Progress)>>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { precision: Precision::default(), device: Device::Cpu, progress: None }
    }
}

/// How far loading has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Bytes of the checkpoint's tensors that have been read.
    pub bytes: usize,
    /// Bytes of all of the checkpoint's tensors.
    pub total_bytes: usize,
}

/// A loaded model.
pub struct Loaded {
    /// The model.
    pub model: Box<dyn CausalLm>,
    /// The bytes of every tensor as it was loaded.
    pub ledger: Ledger,
    /// The bytes that loading has taken on a CUDA device; `None` on the CPU, and where the device does not tell.
    pub device_bytes: Option<usize>,
    /// The ids that end a text, from generation_config.json or else config.json; may be empty.
    pub eos: Vec<u32>,
    /// How long loading took.
    pub duration: Duration,
}

/// Loads the model in `folder`.
///
/// Errors name the file, and the tensor in full, and say what was found and what was wanted.
pub fn load(folder: &ModelFolder, options: &LoadOptions) -> Result<Loaded> {
    load_from(folder, options, || Checkpoint::open(folder))
}

/// Loads the model that config.json in `folder` describes, its tensors from what `open` gives.
pub(crate) fn load_from<S: Source>(
    folder: &ModelFolder,
    options: &LoadOptions,
    open: impl FnOnce() -> Result<S>,
) -> Result<Loaded> {
    let start = Instant::now();
    let config = Config::read(folder)?;
    let family = Family::of(&config)?;
    let generation = Config::read_generation(folder)?;
    let eos = [generation.as_ref(), Some(&config)].into_iter().flatten().map(|config| config.token_ids("eos_token_id"));
    let eos = eos.collect::<Result<Vec<_>>>()?.into_iter().find(|ids| !ids.is_empty()).unwrap_or_default();
    let source = open()?;
    let used_before = device::used_bytes(&options.device);
    let (bytes, total_bytes) = (Cell::new(0), source.stored_bytes());
    let loaded = |tensor_bytes: usize| {
        bytes.set(bytes.get() + tensor_bytes);
        if let Some(progress) = &options.progress {
            progress(Progress { bytes: bytes.get(), total_bytes });
        }
    };
    let is_stored_int8 = source.is_as_config_says() && config.stored_int8()?.is_some();
    let is_head_tied = family.outline(&config)?.head.iter().next().is_none();
    let loader = Loader::new(&source, options, is_stored_int8, is_head_tied, &loaded);
    let model = family.load(&config, &loader)?;
    let ledger = loader.finish()?;
    // Memory is given back behind the work that uses it.
    device::synchronize(&options.device)?;
    let used = device::used_bytes(&options.device);
    let device_bytes = used.zip(used_before).map(|(used, before)| used.saturating_sub(before));
    Ok(Loaded { model, ledger, device_bytes, eos, duration: start.elapsed() })
}

/// The architecture of the model in `folder`, `bloom` or `opt`, from its config alone: what to ask
/// before anything large is read.
///
/// Errors when there is no config.json, or when it is of another architecture.
pub fn architecture(folder: &ModelFolder) -> Result<&'static str> {
    Ok(Family::of(&Config::read(folder)?)?.name())
}

/// What the checkpoint in `folder` says of itself if it was saved in int8.
///
/// Errors when there is no config.json, or when it says what makes no sense.
pub fn stored_int8(folder: &ModelFolder) -> Result<Option<StoredInt8>> {
    Config::read(folder)?.stored_int8()
}

/// The families of models; the only list of them.
pub(crate) enum Family {
    Bloom,
    Opt,
}

impl Family {
    pub(crate) fn of(config: &Config) -> Result<Self> {
        match config.model_type() {
            Some(Bloom::MODEL_TYPE | "BloomForCausalLM") => Ok(Self::Bloom),
            Some(Opt::MODEL_TYPE | "OPTForCausalLM") => Ok(Self::Opt),
            _ => Err(config.unsupported(&[Bloom::MODEL_TYPE, Opt::MODEL_TYPE])),
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Bloom => Bloom::MODEL_TYPE,
            Self::Opt => Opt::MODEL_TYPE,
        }
    }

    /// The tensors that loading reads, and what the cache grows with.
    pub(crate) fn outline(&self, config: &Config) -> Result<Outline> {
        let outline = match self {
            Self::Bloom => Bloom::outline(config),
            Self::Opt => Opt::outline(config),
        }?;
        outline.check_size(config)?;
        Ok(outline)
    }

    fn load(self, config: &Config, loader: &Loader) -> Result<Box<dyn CausalLm>> {
        match self {
            Self::Bloom => Ok(Box::new(Bloom::load(config, loader)?)),
            Self::Opt => Ok(Box::new(Opt::load(config, loader)?)),
        }
    }
}
