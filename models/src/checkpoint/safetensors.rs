//! One safetensors file, mapped into memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::Metadata;

use super::RawTensor;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::folder::ModelFolder;

/// A safetensors file whose header has been read and checked against the file's size.
#[derive(Debug)]
pub(super) struct SafetensorsFile {
    path: PathBuf,
    bytes: Arc<Bytes>,
    metadata: Metadata,
    /// Where in the file the tensors begin; their offsets count from here.
    data_start: usize,
}

impl SafetensorsFile {
    pub(super) fn open(folder: &ModelFolder, name: &str) -> Result<Self> {
        let bytes = folder.map(name)?;
        let damaged = |error| {
            let problem = format!("damaged or incomplete safetensors file of {} bytes: {error}", bytes.len());
            folder.problem_with_hint(name, problem, "fetch the file again")
        };
        let (header_len, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        Ok(Self {
            path: folder.file(name),
            bytes: Arc::new(bytes),
            metadata,
            data_start: size_of::<u64>() + header_len,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the tensors, in the order of their data.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub(super) fn tensor<'a>(&'a self, name: &'a str) -> Option<RawTensor<'a>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        let range = self.data_start + start..self.data_start + end;
        Some(RawTensor { name, file: &self.path, dtype: info.dtype, shape: &info.shape, bytes: &self.bytes, range })
    }
}
