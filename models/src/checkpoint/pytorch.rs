//! One PyTorch checkpoint (`torch.save`), mapped into memory: a zip archive of a pickled dictionary
//! and one uncompressed entry for each storage.

use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use zip::read::ZipFileEntry;
use zip::{CompressionMethod, ZipArchive};

use super::RawTensor;
use super::headers::{Described, MAX_HEADER, ReadSeek};
use super::pickle::{self, PickledTensor};
use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::folder::ModelFolder;

/// A checkpoint whose tensors have been found in the file and checked against it.
#[derive(Debug)]
pub(super) struct PytorchFile {
    path: PathBuf,
    bytes: Arc<Bytes>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor's data is.
#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    range: Range<usize>,
}

/// How `torch.save` began a file before PyTorch 1.6: a pickled magic number.
const LEGACY_START: [u8; 4] = [0x80, 0x02, 0x8a, 0x0a];
const LEGACY: &str = "is in the form that PyTorch had before version 1.6: load it there and save it again";

/// The content of the entry `byteorder`, and what is said of another.
const LITTLE_ENDIAN: &[u8] = b"little";
const BIG_ENDIAN: &str = "is stored in big-endian byte order: save it again on a little-endian machine";

impl PytorchFile {
    pub(super) fn open(folder: &ModelFolder, name: &str) -> Result<Self> {
        let bytes = folder.map(name)?;
        let path = folder.file(name);
        let problem = |problem: String| folder.problem(name, problem);
        if bytes.starts_with(&LEGACY_START) {
            return Err(problem(LEGACY.to_string()));
        }
        let entries = stored_entries(&bytes).map_err(|error| damaged(&path, &error))?;
        let root = root(entries.keys()).map_err(problem)?;
        if let Some(order) = entries.get(&format!("{root}byteorder"))
            && &bytes[order.clone()] != LITTLE_ENDIAN
        {
            return Err(problem(BIG_ENDIAN.to_string()));
        }
        let pickle = &bytes[entries[&format!("{root}data.pkl")].clone()];
        let tensors = tensors(&path, root, pickle, &entries)?;
        Ok(Self { path, bytes: Arc::new(bytes), tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    pub(super) fn tensor<'a>(&'a self, name: &'a str) -> Option<RawTensor<'a>> {
        let Entry { dtype, shape, range } = self.tensors.get(name)?;
        Some(RawTensor { name, file: &self.path, dtype: *dtype, shape, bytes: &self.bytes, range: range.clone() })
    }
}

/// What a checkpoint says of its tensors: read are the archive's directory, and the pickle.
pub(super) fn read_header(path: &Path, source: &mut dyn ReadSeek) -> Result<Vec<Described>> {
    let problem = |problem: String| Error::File { file: path.to_path_buf(), problem, hint: None };
    let unreadable = |error: std::io::Error| problem(format!("cannot be read: {error}"));
    let mut start = [0; LEGACY_START.len()];
    // A shorter file is no archive, and refused as such.
    if source.read_exact(&mut start).is_ok() && start == LEGACY_START {
        return Err(problem(LEGACY.to_string()));
    }
    source.rewind().map_err(unreadable)?;
    let mut archive = ZipArchive::new(source).map_err(|error| damaged(path, &error.to_string()))?;
    let mut entries = HashMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_data(index).map_err(|error| damaged(path, &error.to_string()))?;
        let (name, len) = stored(&entry).map_err(|error| damaged(path, &error))?;
        // The data is not read: where it lies does not matter.
        entries.insert(name, 0..len);
    }
    let root = root(entries.keys()).map_err(problem)?;
    let mut read = |name: &str| -> Result<Vec<u8>> {
        let mut content = Vec::new();
        let entry = archive.by_name(name).map_err(|error| damaged(path, &error.to_string()))?;
        entry.take(MAX_HEADER).read_to_end(&mut content).map_err(unreadable)?;
        Ok(content)
    };
    let byteorder = format!("{root}byteorder");
    if entries.contains_key(&byteorder) && read(&byteorder)? != LITTLE_ENDIAN {
        return Err(problem(BIG_ENDIAN.to_string()));
    }
    let tensors = tensors(path, root, &read(&format!("{root}data.pkl"))?, &entries)?;
    Ok(tensors.into_iter().map(|(name, entry)| (name, entry.dtype, entry.shape)).collect())
}

fn damaged(path: &Path, error: &str) -> Error {
    Error::File {
        file: path.to_path_buf(),
        problem: format!("damaged or incomplete PyTorch checkpoint: {error}"),
        hint: Some("fetch the file again, or save it again with torch.save".to_string()),
    }
}

/// The archive's folder, with its slash: `NAME/` if the pickle is `NAME/data.pkl`, whatever the name.
fn root<'a>(entries: impl Iterator<Item = &'a String>) -> std::result::Result<&'a str, String> {
    let is_root = |root: &&str| root.is_empty() || root.find('/') == Some(root.len() - 1);
    let mut roots = entries.filter_map(|entry| entry.strip_suffix("data.pkl").filter(is_root));
    match (roots.next(), roots.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err("is a zip archive without data.pkl, and so no PyTorch checkpoint".to_string()),
        (Some(_), Some(_)) => Err("has more than one data.pkl".to_string()),
    }
}

/// The tensors of the pickle, each within its storage: an entry of the archive.
fn tensors(
    path: &Path,
    root: &str,
    pickle: &[u8],
    entries: &HashMap<String, Range<usize>>,
) -> Result<BTreeMap<String, Entry>> {
    let pickled = pickle::read_tensors(pickle).map_err(|error| Error::File {
        file: path.to_path_buf(),
        problem: format!("its pickle {error}"),
        hint: None,
    })?;
    let located = pickled.into_iter().map(|(tensor, pickled)| {
        let storage = entries.get(&format!("{root}data/{}", pickled.storage)).cloned();
        let tensor = tensor.to_string();
        match locate(pickled, storage) {
            Ok(entry) => Ok((tensor, entry)),
            Err(problem) => Err(Error::Tensor { file: path.to_path_buf(), tensor, problem, hint: None }),
        }
    });
    located.collect()
}

/// The name and length of an entry of the archive. PyTorch never compresses: an entry that is
/// compressed is refused, so nothing is ever unpacked.
fn stored(entry: &ZipFileEntry) -> std::result::Result<(String, usize), String> {
    let name = entry.name().map_err(|error| error.to_string())?.into_owned();
    if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
        return Err(format!("`{name}` is compressed or encrypted, as torch.save leaves nothing"));
    }
    match usize::try_from(entry.size()) {
        Ok(len) => Ok((name, len)),
        Err(_) => Err(beyond_the_end(&name)),
    }
}

fn beyond_the_end(entry: &str) -> String {
    format!("`{entry}` reaches beyond the end of the file")
}

/// Where in the file the content of every entry lies.
fn stored_entries(bytes: &[u8]) -> std::result::Result<HashMap<String, Range<usize>>, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|error| error.to_string())?;
    (0..archive.len())
        .map(|index| {
            let entry = archive.by_index_raw(index).map_err(|error| error.to_string())?;
            let (name, len) = stored(&entry.entry())?;
            let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
            match start.and_then(|start| Some(start..start.checked_add(len)?)) {
                Some(range) if range.end <= bytes.len() => Ok((name, range)),
                _ => Err(beyond_the_end(&name)),
            }
        })
        .collect()
}

/// The part of the file that a tensor is, if it lies within its storage and the storage within the
/// file; an error is a sentence about the tensor.
fn locate(tensor: PickledTensor, storage: Option<Range<usize>>) -> std::result::Result<Entry, String> {
    let PickledTensor { storage: name, dtype, storage_len, offset, shape, strides } = tensor;
    let Some(storage) = storage else { return Err(format!("its storage `{name}` is not in the file")) };
    let element = dtype.bitsize() / 8;
    let stored = storage.len() / element;
    if storage_len > stored {
        return Err(format!("its storage `{name}` holds {stored} elements, but should hold {storage_len}"));
    }
    if strides.len() != shape.len() {
        return Err(format!("has shape {shape:?}, but strides {strides:?}"));
    }
    let too_large = || {
        format!(
            "with shape {shape:?}, strides {strides:?} and offset {offset}, it reaches beyond its storage of {stored} elements"
        )
    };
    let mut row_major = 1usize;
    for (&size, &stride) in shape.iter().zip(&strides).rev() {
        let reach = size.saturating_sub(1).checked_mul(stride).ok_or_else(too_large)?;
        if reach >= stored.max(1) {
            return Err(too_large());
        }
        if size > 1 && stride != row_major {
            return Err(format!(
                "has shape {shape:?} with strides {strides:?}, wanted one row after the other: save it with .contiguous()"
            ));
        }
        row_major = row_major.checked_mul(size).ok_or_else(too_large)?;
    }
    let end = offset.checked_add(row_major).filter(|end| *end <= stored).ok_or_else(too_large)?;
    let range = storage.start + offset * element..storage.start + end * element;
    Ok(Entry { dtype, shape, range })
}
