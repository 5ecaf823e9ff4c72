//! A checkpoint becomes an int8 checkpoint in bitsandbytes' layout, tensor by tensor: what loading would
//! hold in memory is written instead.

use std::cell::Cell;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use int8_ops::OUTLIER_THRESHOLD;
use safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::rows::Float;
use crate::checkpoint::stored_int8::{ABSMAX, FORMAT, ROWS};
use crate::checkpoint::writer::{CheckpointWriter, Layout, TensorSpec};
use crate::checkpoint::{Checkpoint, RawTensor};
use crate::config::Config;
use crate::error::{Error, NOT_FOUND, Result};
use crate::folder::ModelFolder;
use crate::load::{Family, LoadOptions, Progress, load};
use crate::outline::{Outline, Role};
use crate::precision::{Int8Options, Precision};
use crate::staging::Staging;

/// How a checkpoint is quantised.
pub struct QuantizeOptions {
    /// What becomes int8; the threshold is recorded for whoever loads the checkpoint.
    pub int8: Int8Options,
    /// The most bytes of tensors that a file holds.
    pub shard_bytes: usize,
    /// Called after every part of a tensor.
    pub progress: Option<Box<dyn Fn(Progress)>>,
    /// Asked after every part of a tensor; `true` ends the work, and leaves nothing behind.
    pub is_interrupted: fn() -> bool,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        let int8 = Int8Options { threshold: Some(OUTLIER_THRESHOLD), ..Int8Options::default() };
        Self { int8, shard_bytes: Self::SHARD_BYTES, progress: None, is_interrupted: || false }
    }
}

impl QuantizeOptions {
    /// The shard size of Transformers.
    pub const SHARD_BYTES: usize = 5_000_000_000;
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub struct Quantized {
    /// Bytes of the tensors that were read.
    pub source_bytes: usize,
    /// Bytes of the files of tensors that were written.
    pub bytes: u64,
    /// How many files hold them.
    pub shards: usize,
    /// How many weights are in int8.
    pub int8_weights: usize,
    /// Whether the embedding and the head are among them.
    pub has_int8_head: bool,
    /// How long it took.
    pub duration: Duration,
}

/// What else a model's folder holds that goes with it.
const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE",
];

/// Memory for the part of a tensor that is being written.
const PART_BYTES: usize = 1 << 25;

/// Writes the model in `folder` to the folder `destination`, new or empty, as an int8 checkpoint that
/// loads to the same logits, bit for bit, as quantising while loading does. Transformers loads it with
/// bitsandbytes, unless the embedding is in int8 too, which is a form of our own.
///
/// The folder appears under its name when it is whole and on the disk, and after it has been loaded
/// once; on any error nothing is left. Errors name the file, and the tensor in full.
pub fn quantize(folder: &ModelFolder, destination: &Path, options: &QuantizeOptions) -> Result<Quantized> {
    let start = Instant::now();
    let config = Config::read(folder)?;
    let outline = Family::of(&config)?.outline(&config)?;
    let checkpoint = Checkpoint::open(folder)?;
    let tensors = plan(&checkpoint, &outline, config.stored_int8()?.is_some(), &options.int8)?;
    let kept = kept_in_16_bits(&tensors, &options.int8)?;
    let int8_weights = tensors.iter().filter(|tensor| matches!(tensor.form, Form::Int8)).count();

    let specs = tensors.iter().flat_map(Planned::specs).collect();
    let layout = Layout::new(specs, options.shard_bytes);
    let (bytes, shards) = (layout.file_bytes(), layout.shards());
    let is_bf16 = tensors.iter().any(|tensor| matches!(tensor.form, Form::Half(Dtype::BF16)));
    let has_int8_head =
        tensors.iter().any(|tensor| tensor.role == Role::Embedding && matches!(tensor.form, Form::Int8));
    let config = config.with_int8(options.int8.threshold, &kept, has_int8_head, is_bf16);

    let companions = COMPANIONS.iter().map(|name| Ok((name, folder.read(name)?))).collect::<Result<Vec<_>>>()?;

    let staging = Staging::new(destination)?;
    staging.check_space(bytes)?;
    let mut output = Output {
        writer: layout.create(staging.path()).map_err(|error| staging.unwritable(error))?,
        checkpoint: &checkpoint,
        staging: &staging,
        options,
        done: Cell::new(0),
        total: checkpoint.bytes(),
    };
    tensors.iter().try_for_each(|tensor| output.write(tensor))?;
    let Output { writer, .. } = output;
    writer.finish().map_err(|error| staging.unwritable(error))?;
    staging.write(Config::FILE, format!("{:#}\n", Value::Object(config)).as_bytes())?;
    for (name, content) in companions {
        if let Some(content) = content {
            staging.write(name, &content)?;
        }
    }
    check_loads(folder, &staging, &options.int8)?;
    staging.publish()?;
    Ok(Quantized {
        source_bytes: checkpoint.bytes(),
        bytes,
        shards,
        int8_weights,
        has_int8_head,
        duration: start.elapsed(),
    })
}

/// A tensor on its way from one checkpoint to the other.
struct Planned<'a> {
    source: RawTensor<'a>,
    /// In the new checkpoint.
    name: String,
    role: Role,
    form: Form,
}

/// What becomes of a tensor.
enum Form {
    /// Int8 codes and the largest magnitude of each row, quantised here or as they stand.
    Int8,
    /// 16-bit floats, F16 or BF16.
    Half(Dtype),
    /// As it stands.
    Same,
}

impl Planned<'_> {
    /// The module of a weight.
    fn module(&self) -> &str {
        module_of(&self.name)
    }

    /// The tensors to write.
    fn specs(&self) -> Vec<TensorSpec> {
        let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.to_vec() };
        let shape = self.source.shape;
        match self.form {
            Form::Int8 => vec![
                spec(self.name.clone(), Dtype::I8, shape),
                spec(format!("{}.{ABSMAX}", self.module()), Dtype::F32, &shape[..1]),
                spec(format!("{}.{FORMAT}", self.module()), Dtype::U8, &[]),
            ],
            Form::Half(dtype) => vec![spec(self.name.clone(), dtype, shape)],
            Form::Same => vec![spec(self.name.clone(), self.source.dtype, shape)],
        }
    }
}

/// The module of the weight of this name.
fn module_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// What becomes of every tensor of the model, in the order of the files.
fn plan<'a>(
    checkpoint: &'a Checkpoint,
    outline: &Outline,
    is_stored_int8: bool,
    options: &Int8Options,
) -> Result<Vec<Planned<'a>>> {
    let prefix = checkpoint.prefix_of(outline.prefixes, outline.probe)?;
    let mut planned = Vec::new();
    for ((found, parameter), (name, _)) in outline.tensors(prefix).zip(outline.tensors(outline.prefixes[0])) {
        let Some(source) = checkpoint.tensor(&found) else { return Err(checkpoint.missing(found, NOT_FOUND)) };
        if source.shape != parameter.shape {
            return Err(Error::wrong_shape(source.file, source.name, source.shape, &parameter.shape));
        }
        let is_int8 = source.dtype == Dtype::I8;
        if !is_int8 || parameter.role == Role::Vector {
            source.check_float()?;
        }
        let becomes_int8 = match parameter.role {
            // What an int8 checkpoint keeps in 16 bits stays so.
            Role::Linear => !options.skips(module_of(&name)) && (is_int8 || !is_stored_int8),
            Role::Embedding => options.has_int8_head(is_int8),
            Role::Table | Role::Vector => false,
        };
        let form = match (becomes_int8, parameter.role, source.dtype) {
            (true, ..) => Form::Int8,
            (false, Role::Vector, _) => Form::Same,
            (false, _, Dtype::BF16) => Form::Half(Dtype::BF16),
            (false, ..) => Form::Half(Dtype::F16),
        };
        planned.push(Planned { source, name, role: parameter.role, form });
    }
    planned.sort_by(|one, other| {
        (one.source.file, one.source.range.start).cmp(&(other.source.file, other.source.range.start))
    });
    Ok(planned)
}

/// The full names of the linear layers that do not become int8; an error when a module to skip is not
/// there.
fn kept_in_16_bits(tensors: &[Planned], options: &Int8Options) -> Result<Vec<String>> {
    let linear = || tensors.iter().filter(|tensor| tensor.role == Role::Linear);
    options.check_skip_modules(&linear().map(Planned::module).collect::<Vec<_>>())?;
    let kept = linear().filter(|tensor| !matches!(tensor.form, Form::Int8));
    Ok(kept.map(|tensor| tensor.module().to_string()).collect())
}

/// Loads what was written, of which little is read: a checkpoint that is no whole model is told here.
fn check_loads(folder: &ModelFolder, staging: &Staging, options: &Int8Options) -> Result<()> {
    let precision = Precision::Int8(Int8Options { skip_modules: Vec::new(), ..options.clone() });
    let loaded = load(&ModelFolder::open(staging.path())?, &LoadOptions { precision, ..LoadOptions::default() });
    let told = |error: Error| {
        let place = folder.path().display().to_string();
        let problem = error.to_string().replace(&staging.path().display().to_string(), &place);
        Error::File {
            file: folder.path().to_path_buf(),
            problem: format!("is no whole model: {problem}"),
            hint: error.hint(),
        }
    };
    loaded.map(|_| ()).map_err(told)
}

/// The new checkpoint while it is written.
struct Output<'a> {
    writer: CheckpointWriter,
    checkpoint: &'a Checkpoint,
    staging: &'a Staging,
    options: &'a QuantizeOptions,
    /// Bytes of the old checkpoint's tensors that are done.
    done: Cell<usize>,
    total: usize,
}

impl Output<'_> {
    fn write(&mut self, tensor: &Planned) -> Result<()> {
        match tensor.form {
            Form::Int8 if tensor.source.dtype == Dtype::I8 => self.copy_int8(tensor),
            Form::Int8 => self.quantize(tensor),
            Form::Half(Dtype::BF16) => self.narrow::<bf16>(tensor),
            Form::Half(_) => self.narrow::<f16>(tensor),
            Form::Same => self.copy(tensor),
        }
    }

    fn copy_int8(&mut self, tensor: &Planned) -> Result<()> {
        let absmax = self.checkpoint.stored_absmax(&tensor.source)?;
        let cols = tensor.source.shape[1];
        for rows in parts(&tensor.source, cols) {
            self.put(&tensor.name, rows.start * cols, &tensor.source.data()[rows.start * cols..rows.end * cols])?;
            tensor.source.give_back(&rows);
            self.progress(rows.len() * cols)?;
        }
        self.put_absmax(tensor, &absmax)
    }

    fn quantize(&mut self, tensor: &Planned) -> Result<()> {
        let (rows, cols) = (tensor.source.shape[0], tensor.source.shape[1]);
        let mut absmax = vec![0f32; rows];
        let mut codes = Vec::new();
        for part in parts(&tensor.source, cols) {
            codes.resize(part.len() * cols, 0u8);
            tensor.source.quantize_rows(part.clone(), &mut codes, &mut absmax[part.clone()])?;
            self.put(&tensor.name, part.start * cols, &codes)?;
            self.progress(tensor.source.range_of(&part).len())?;
        }
        self.put_absmax(tensor, &absmax)
    }

    fn put_absmax(&mut self, tensor: &Planned, absmax: &[f32]) -> Result<()> {
        self.put(&format!("{}.{ABSMAX}", tensor.module()), 0, bytemuck::cast_slice(absmax))?;
        self.put(&format!("{}.{FORMAT}", tensor.module()), 0, &[ROWS])
    }

    fn narrow<T: Float + bytemuck::Pod>(&mut self, tensor: &Planned) -> Result<()> {
        let source = &tensor.source;
        let scales = if source.dtype == Dtype::I8 { Some(self.checkpoint.stored_scales(source)?) } else { None };
        let row_bytes = source.shape[1] * size_of::<T>();
        let mut values = Vec::new();
        for rows in parts(source, row_bytes) {
            values.resize(rows.len() * source.shape[1], T::zeroed());
            source.narrow_rows(rows.clone(), scales.as_deref(), &mut values)?;
            self.put(&tensor.name, rows.start * row_bytes, bytemuck::cast_slice(&values))?;
            self.progress(source.range_of(&rows).len())?;
        }
        Ok(())
    }

    fn copy(&mut self, tensor: &Planned) -> Result<()> {
        let mut values = vec![0f32; tensor.source.shape.iter().product()];
        tensor.source.widen(0, &mut values);
        tensor.source.check_finite(0, &values)?;
        self.put(&tensor.name, 0, tensor.source.data())?;
        self.progress(tensor.source.range.len())
    }

    fn put(&mut self, name: &str, offset: usize, data: &[u8]) -> Result<()> {
        self.writer.write(name, offset, data).map_err(|error| self.staging.unwritable(error))
    }

    /// Tells that so many bytes of the old checkpoint are done; an error when the work is to end.
    fn progress(&self, bytes: usize) -> Result<()> {
        self.done.set(self.done.get() + bytes);
        if let Some(progress) = &self.options.progress {
            progress(Progress { bytes: self.done.get(), total_bytes: self.total });
        }
        if (self.options.is_interrupted)() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// The rows of a tensor in parts, of which each takes at most [`PART_BYTES`] or is one row.
fn parts(tensor: &RawTensor, row_bytes: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let (rows, step) = (tensor.shape[0], (PART_BYTES / row_bytes.max(1)).max(1));
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}
