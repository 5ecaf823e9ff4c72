//! The tensors of a checkpoint, found by name in the files that hold them.

mod headers;
mod pickle;
mod pytorch;
pub(crate) mod rows;
mod safetensors;
mod source;
pub(crate) mod stored_int8;
mod values;
pub(crate) mod writer;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ::safetensors::Dtype;
use int8_ops::SharedBytes;

use crate::bytes::{Bytes, BytesPart};
use crate::error::{Error, NO_KNOWN_PREFIX, Result};
use crate::files::{WeightForm, weight_map};
use crate::folder::ModelFolder;
pub use headers::{ReadSeek, TensorHeaders, WeightFiles};
use pytorch::PytorchFile;
use safetensors::SafetensorsFile;

/// A checkpoint's weight files, opened; tensors are read when they are asked for.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    files: Vec<WeightFile>,
    /// Full tensor name to the index of its file.
    tensors: BTreeMap<String, usize>,
}

/// A tensor as it stands in a file.
#[derive(Debug, Clone)]
pub(crate) struct RawTensor<'a> {
    pub(crate) name: &'a str,
    pub(crate) file: &'a Path,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
    /// The file's.
    pub(crate) bytes: &'a Arc<Bytes>,
    /// Where in the file the values are: little-endian, row-major; of any alignment.
    pub(crate) range: Range<usize>,
}

/// A file of weights, in either format.
#[derive(Debug)]
enum WeightFile {
    Safetensors(SafetensorsFile),
    Pytorch(PytorchFile),
}

impl WeightFile {
    /// Opens a file, in the format that its name tells.
    fn open(folder: &ModelFolder, name: &str) -> Result<Self> {
        if name.ends_with(".safetensors") {
            SafetensorsFile::open(folder, name).map(Self::Safetensors)
        } else {
            PytorchFile::open(folder, name).map(Self::Pytorch)
        }
    }

    fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => file.path(),
            Self::Pytorch(file) => file.path(),
        }
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Safetensors(file) => file.names(),
            Self::Pytorch(file) => file.names(),
        }
    }

    fn tensor<'a>(&'a self, name: &'a str) -> Option<RawTensor<'a>> {
        match self {
            Self::Safetensors(file) => file.tensor(name),
            Self::Pytorch(file) => file.tensor(name),
        }
    }
}

impl Checkpoint {
    /// Opens the weights in `folder`: safetensors where there are any, else PyTorch's own format; one
    /// file, or the shards that an index lists.
    pub(crate) fn open(folder: &ModelFolder) -> Result<Self> {
        match WeightForm::choose(|name| folder.has(name)) {
            Some(WeightForm::Single(name)) => {
                let file = WeightFile::open(folder, name)?;
                let tensors = file.names().into_iter().map(|name| (name, 0)).collect();
                Ok(Self { files: vec![file], tensors })
            }
            Some(WeightForm::Sharded(index)) => Self::open_shards(folder, index),
            None => {
                let [safetensors, safetensors_index, pytorch, pytorch_index] = WeightForm::NAMES.map(WeightForm::name);
                let hint = format!(
                    "the weights must be in {safetensors} or {pytorch}, or in shards that {safetensors_index} or \
                     {pytorch_index} lists"
                );
                Err(Error::MissingFile { file: folder.file(safetensors), hint })
            }
        }
    }

    fn open_shards(folder: &ModelFolder, index: &str) -> Result<Self> {
        let json = folder.read_json(index)?.unwrap_or_default();
        let listed = weight_map(&json).map_err(|problem| folder.problem(index, problem))?;
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        let mut opened: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, shard) in listed {
            let file = match opened.get(shard) {
                Some(file) => *file,
                None => {
                    if !folder.has(shard) {
                        let hint = format!("{index} names this shard: fetch it again");
                        return Err(Error::MissingFile { file: folder.file(shard), hint });
                    }
                    files.push(WeightFile::open(folder, shard)?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if files[file].tensor(name).is_none() {
                return Err(Error::not_in_shard(&folder.file(shard), name, index));
            }
            tensors.insert(name.to_string(), file);
        }
        Ok(Self { files, tensors })
    }

    /// The tensor of that full name.
    pub(crate) fn tensor(&self, name: &str) -> Option<RawTensor<'_>> {
        let (name, file) = self.tensors.get_key_value(name)?;
        self.files[*file].tensor(name)
    }

    /// The first of `prefixes` under which there is the tensor `probe`: checkpoints are saved with and
    /// without the name of the model inside the language model.
    pub(crate) fn prefix_of<'p>(&self, prefixes: &[&'p str], probe: &str) -> Result<&'p str> {
        let found = prefixes.iter().find(|prefix| self.tensors.contains_key(&format!("{prefix}{probe}")));
        found.copied().ok_or_else(|| self.missing(format!("{}{probe}", prefixes[0]), NO_KNOWN_PREFIX))
    }

    /// The error of a tensor that is not there.
    pub(crate) fn missing(&self, tensor: String, problem: &str) -> Error {
        let file = self.files.first().map_or(Path::new(WeightForm::NAMES[0].name()), WeightFile::path);
        Error::missing_tensor(file, tensor, problem)
    }

    /// The first tensor whose full name begins with `prefix`.
    pub(crate) fn first_below(&self, prefix: &str) -> Option<RawTensor<'_>> {
        let (name, _) = self.tensors.range(prefix.to_string()..).next()?;
        if name.starts_with(prefix) { self.tensor(name) } else { None }
    }

    /// Whether any tensor is of this dtype.
    pub(crate) fn has_dtype(&self, dtype: Dtype) -> bool {
        self.tensors.keys().filter_map(|name| self.tensor(name)).any(|tensor| tensor.dtype == dtype)
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> usize {
        self.tensors.keys().filter_map(|name| self.tensor(name)).map(|tensor| tensor.range.len()).sum()
    }
}

impl<'a> RawTensor<'a> {
    /// The values, as they stand in the file.
    pub(crate) fn data(&self) -> &'a [u8] {
        &self.bytes[self.range.clone()]
    }

    /// The same, to be used in place for as long as need be.
    pub(crate) fn shared(&self) -> SharedBytes {
        Arc::new(BytesPart { bytes: self.bytes.clone(), range: self.range.clone() })
    }

    /// An error about this tensor.
    pub(crate) fn problem(&self, problem: String) -> Error {
        self.problem_with_hint(problem, None)
    }

    /// An error about this tensor, and what to do.
    pub(crate) fn problem_with_hint(&self, problem: String, hint: Option<String>) -> Error {
        Error::Tensor { file: self.file.to_path_buf(), tensor: self.name.to_string(), problem, hint }
    }
}
