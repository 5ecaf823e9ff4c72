//! The tensors of a checkpoint by the headers of its files alone, wherever the files are.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::pytorch;
use super::stored_int8::ABSMAX;
use super::values::{FLOATS, is_float};
use crate::error::{Error, NO_KNOWN_PREFIX, NOT_FOUND, Result};
use crate::files::{WeightForm, weight_map};
use crate::outline::{Outline, Role};

/// Bytes that can be read from any place.
pub trait ReadSeek: Read + Seek {}

impl<T: Read + Seek> ReadSeek for T {}

/// Where the weight files of a model can be read piece by piece: a folder, or a repository far away.
///
/// What is read of a file is small, and known before: of a safetensors file its length (a seek to the
/// end), its first 8 bytes and the header they announce; of a `.bin` file the directory at its end and
/// the pickle, which comes first. A source that pays for every read, such as HTTP range requests, does
/// well to fetch some 64 kB at a time and to keep them.
pub trait WeightFiles {
    /// What names the file in messages.
    fn path(&self, name: &str) -> PathBuf;

    /// The file, or `None` where there is none of that name; it stands at its first byte.
    fn open(&self, name: &str) -> Result<Option<Box<dyn ReadSeek + '_>>>;
}

/// What the files of a checkpoint say of their tensors.
#[derive(Debug)]
pub struct TensorHeaders {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, TensorHeader>,
}

/// What a file says of one tensor.
#[derive(Debug, Clone)]
pub(super) struct TensorHeader {
    /// The index of its file.
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The largest index of shards, header of safetensors, or pickle that is believed; the largest
/// published one has 1 MB.
pub(super) const MAX_HEADER: u64 = 100_000_000;

impl TensorHeaders {
    /// Reads the headers of the weights that [`load`](crate::load()) would take; `None` when there are
    /// none, or not all of them.
    ///
    /// Errors when a file that is there is no checkpoint, or does not hold what its index says.
    pub fn read(files: &dyn WeightFiles) -> Result<Option<Self>> {
        for form in WeightForm::NAMES {
            let Some(source) = files.open(form.name())? else { continue };
            let mut headers = Self { files: Vec::new(), tensors: BTreeMap::new() };
            let is_whole = match form {
                WeightForm::Single(name) => headers.add(files.path(name), source).map(|()| true)?,
                WeightForm::Sharded(index) => headers.add_shards(files, index, source)?,
            };
            return Ok(is_whole.then_some(headers));
        }
        Ok(None)
    }

    /// Adds what one file holds.
    fn add(&mut self, path: PathBuf, mut source: Box<dyn ReadSeek + '_>) -> Result<()> {
        let is_safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
        let found = match is_safetensors {
            true => read_safetensors(&path, source.as_mut())?,
            false => pytorch::read_header(&path, source.as_mut())?,
        };
        let file = self.files.len();
        self.files.push(path);
        let found = found.into_iter().map(|(name, dtype, shape)| (name, TensorHeader { file, dtype, shape }));
        self.tensors.extend(found);
        Ok(())
    }

    /// Adds the shards that an index lists; false when one is not there.
    fn add_shards(&mut self, files: &dyn WeightFiles, index: &str, source: Box<dyn ReadSeek + '_>) -> Result<bool> {
        let problem = |problem: String| Error::File { file: files.path(index), problem, hint: None };
        let mut json = Vec::new();
        source.take(MAX_HEADER).read_to_end(&mut json).map_err(|error| problem(format!("cannot be read: {error}")))?;
        let json = serde_json::from_slice(&json).map_err(|error| problem(format!("is not JSON: {error}")))?;
        let listed = weight_map(&json).map_err(problem)?;
        for shard in listed.values().collect::<BTreeSet<_>>() {
            let Some(source) = files.open(shard)? else { return Ok(false) };
            self.add(files.path(shard), source)?;
        }
        for (name, shard) in listed {
            let file = files.path(shard);
            if self.tensors.get(name).is_none_or(|tensor| self.files[tensor.file] != file) {
                return Err(Error::not_in_shard(&file, name, index));
            }
        }
        Ok(true)
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// The bytes of the tensors in each dtype, under its name in safetensors, such as `F16`.
    pub fn bytes_by_dtype(&self) -> BTreeMap<String, u64> {
        let mut bytes = BTreeMap::new();
        for TensorHeader { dtype, shape, .. } in self.tensors.values() {
            let bits = shape.iter().map(|&size| size as u64).product::<u64>() * dtype.bitsize() as u64;
            *bytes.entry(format!("{dtype:?}")).or_default() += bits / 8;
        }
        bytes
    }

    /// Whether weights are stored in int8.
    pub fn is_int8(&self) -> bool {
        self.tensors.values().any(|tensor| tensor.dtype == Dtype::I8)
    }

    /// Checks the tensors against those that a config calls for, as loading would.
    pub(crate) fn check(&self, outline: &Outline) -> Result<()> {
        let first_file = || self.files.first().map_or(Path::new(WeightForm::NAMES[0].name()), PathBuf::as_path);
        let has_probe = |prefix: &&&str| self.tensors.contains_key(&format!("{prefix}{}", outline.probe));
        let Some(prefix) = outline.prefixes.iter().find(has_probe) else {
            let tensor = format!("{}{}", outline.prefixes[0], outline.probe);
            return Err(Error::missing_tensor(first_file(), tensor, NO_KNOWN_PREFIX));
        };
        let blocks = format!("{prefix}{}.", outline.blocks);
        let beyond = format!("{blocks}{}.", outline.num_layers);
        if let Some((name, tensor)) = self.tensors.range(beyond.clone()..).next()
            && name.starts_with(&beyond)
        {
            return Err(Error::extra_block(&self.files[tensor.file], name, outline.num_layers));
        }
        for (name, parameter) in outline.tensors(prefix) {
            let module = name.trim_end_matches(parameter.tensor).to_string();
            let dtype = self.find(name, &parameter.shape, |dtype| {
                is_float(dtype) || dtype == Dtype::I8 && parameter.role != Role::Vector
            })?;
            if dtype == Dtype::I8 {
                self.find(format!("{module}{ABSMAX}"), &parameter.shape[..1], |dtype| dtype == Dtype::F32)?;
            }
        }
        Ok(())
    }

    /// The dtype of the tensor of that name, which must have that shape, and a dtype that is allowed.
    fn find(&self, name: String, shape: &[usize], is_allowed: impl Fn(Dtype) -> bool) -> Result<Dtype> {
        let Some(tensor) = self.tensors.get(&name) else {
            let file = self.files.first().map_or(Path::new(WeightForm::NAMES[0].name()), PathBuf::as_path);
            return Err(Error::missing_tensor(file, name, NOT_FOUND));
        };
        let file = &self.files[tensor.file];
        if tensor.shape != shape {
            return Err(Error::wrong_shape(file, &name, &tensor.shape, shape));
        }
        if !is_allowed(tensor.dtype) {
            let wanted = if name.ends_with(ABSMAX) { "F32" } else { FLOATS };
            return Err(Error::wrong_dtype(file, &name, tensor.dtype, wanted));
        }
        Ok(tensor.dtype)
    }
}

/// The name, dtype and shape of a tensor.
pub(super) type Described = (String, Dtype, Vec<usize>);

/// What the header of a safetensors file says: 8 bytes of length, then JSON.
fn read_safetensors(path: &Path, source: &mut dyn ReadSeek) -> Result<Vec<Described>> {
    let damaged = |problem: String| Error::File {
        file: path.to_path_buf(),
        problem: format!("damaged or incomplete safetensors file: {problem}"),
        hint: Some("fetch the file again".to_string()),
    };
    let unreadable = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => damaged("it is too short".to_string()),
        _ => Error::File { file: path.to_path_buf(), problem: format!("cannot be read: {error}"), hint: None },
    };
    let len = source.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let mut header_len = [0; size_of::<u64>()];
    source.rewind().and_then(|()| source.read_exact(&mut header_len)).map_err(unreadable)?;
    let data_start = (header_len.len() as u64).saturating_add(u64::from_le_bytes(header_len));
    if data_start > len.min(MAX_HEADER) {
        return Err(damaged(format!("it has {len} bytes, but its header should end at {data_start}")));
    }
    let mut header = vec![0; data_start as usize - header_len.len()];
    source.read_exact(&mut header).map_err(unreadable)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| damaged(error.to_string()))?;
    let wanted = data_start.saturating_add(metadata.data_len() as u64);
    if wanted != len {
        return Err(damaged(format!("it has {len} bytes, but its header calls for {wanted}")));
    }
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, info.dtype, info.shape.clone())).collect())
}
