//! The headers of weight files on the Hub, read piece by piece: some kilobytes of a model of any size.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use int8_models::{Error, ReadSeek, WeightFiles};

use super::Listing;
use super::transfer::{RemoteFile, Transfer};

/// Bytes that are asked for at a time: most headers of published shards are shorter.
const BLOCK: u64 = 1 << 15;

/// The weight files of one revision of a model.
pub struct RemoteFiles {
    pub(super) id: String,
    pub(super) listing: Listing,
    pub(super) transfer: Transfer,
}

impl WeightFiles for RemoteFiles {
    fn path(&self, name: &str) -> PathBuf {
        Path::new(&self.id).join(name)
    }

    fn open(&self, name: &str) -> int8_models::Result<Option<Box<dyn ReadSeek + '_>>> {
        if !self.listing.files.contains(name) {
            return Ok(None);
        }
        let file = self.transfer.describe(&self.listing.commit, name).map_err(|error| Error::File {
            file: self.path(name),
            problem: format!("{error:#}"),
            hint: None,
        })?;
        Ok(Some(Box::new(RemoteReader { transfer: &self.transfer, file, position: 0, blocks: HashMap::new() })))
    }
}

/// A file read by ranges; what has come is kept.
struct RemoteReader<'a> {
    transfer: &'a Transfer,
    file: RemoteFile,
    position: u64,
    /// By their number.
    blocks: HashMap<u64, Vec<u8>>,
}

impl Read for RemoteReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.file.size {
            return Ok(0);
        }
        let (number, offset) = (self.position / BLOCK, (self.position % BLOCK) as usize);
        if !self.blocks.contains_key(&number) {
            let mut block = vec![0; BLOCK as usize];
            let len = self.transfer.read_range(&self.file, number * BLOCK, &mut block).map_err(io::Error::other)?;
            block.truncate(len);
            self.blocks.insert(number, block);
        }
        let rest = &self.blocks[&number][offset..];
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for RemoteReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.file.size.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::other("a seek before the start of the file"))?;
        Ok(self.position)
    }
}
