//! One PyTorch checkpoint (`torch.save`), mapped into memory: a zip archive of a pickled dictionary
//! and one uncompressed entry for each storage.

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use super::RawTensor;
use super::pickle::{self, PickledTensor};
use crate::error::{Error, Result};
use crate::folder::{Bytes, ModelFolder};

/// A checkpoint whose tensors have been found in the file and checked against it.
#[derive(Debug)]
pub(super) struct PytorchFile {
    path: PathBuf,
    bytes: Bytes,
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

impl PytorchFile {
    pub(super) fn open(folder: &ModelFolder, name: &str) -> Result<Self> {
        let bytes = folder.map(name)?;
        let problem = |problem: String| folder.problem(name, problem);
        if bytes.starts_with(&LEGACY_START) {
            let form = "is in the form that PyTorch had before version 1.6: load it there and save it again";
            return Err(problem(form.to_string()));
        }
        let entries = stored_entries(&bytes).map_err(|error| {
            folder.problem_with_hint(
                name,
                format!("damaged or incomplete PyTorch checkpoint: {error}"),
                "fetch the file again, or save it again with torch.save",
            )
        })?;
        // `NAME/data.pkl`, whatever the name.
        let is_root = |root: &&str| root.is_empty() || root.find('/') == Some(root.len() - 1);
        let mut pickles = entries
            .iter()
            .filter_map(|(entry, range)| Some((entry.strip_suffix("data.pkl").filter(is_root)?, range.clone())));
        let (root, pickle) = match (pickles.next(), pickles.next()) {
            (Some(only), None) => only,
            (None, _) => {
                return Err(problem("is a zip archive without data.pkl, and so no PyTorch checkpoint".to_string()));
            }
            (Some(_), Some(_)) => return Err(problem("has more than one data.pkl".to_string())),
        };
        if let Some(order) = entries.get(&format!("{root}byteorder"))
            && &bytes[order.clone()] != b"little"
        {
            return Err(problem(
                "is stored in big-endian byte order: save it again on a little-endian machine".to_string(),
            ));
        }
        let pickled = pickle::read_tensors(&bytes[pickle]).map_err(|error| problem(format!("its pickle {error}")))?;
        let mut tensors = BTreeMap::new();
        for (tensor, pickled) in pickled {
            let storage = entries.get(&format!("{root}data/{}", pickled.storage)).cloned();
            let entry = locate(pickled, storage).map_err(|problem| Error::Tensor {
                file: folder.file(name),
                tensor: tensor.to_string(),
                problem,
                hint: None,
            })?;
            tensors.insert(tensor.to_string(), entry);
        }
        Ok(Self { path: folder.file(name), bytes, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    pub(super) fn tensor<'a>(&'a self, name: &'a str) -> Option<RawTensor<'a>> {
        let Entry { dtype, shape, range } = self.tensors.get(name)?;
        let data = self.bytes.get(range.clone())?;
        Some(RawTensor { name, file: &self.path, dtype: *dtype, shape, data })
    }
}

/// Where in the file the content of every entry lies. PyTorch never compresses: an entry that is
/// compressed is refused, so nothing is ever unpacked.
fn stored_entries(bytes: &[u8]) -> std::result::Result<HashMap<String, Range<usize>>, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|error| error.to_string())?;
    (0..archive.len())
        .map(|index| {
            let entry = archive.by_index_raw(index).map_err(|error| error.to_string())?;
            let name = entry.name().map_err(|error| error.to_string())?.into_owned();
            if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
                return Err(format!("`{name}` is compressed or encrypted, as torch.save leaves nothing"));
            }
            let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
            let len = usize::try_from(entry.size()).ok();
            match start.zip(len).and_then(|(start, len)| Some(start..start.checked_add(len)?)) {
                Some(range) if range.end <= bytes.len() => Ok((name, range)),
                _ => Err(format!("`{name}` reaches beyond the end of the file")),
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
