//! The headers of weight files on the Hub, read piece by piece: some kilobytes of each file.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use int8_models::{ReadSeek, WeightFiles, WeightForm};

use super::listing::Listing;
use super::transfer::{RemoteFile, Transfer};

/// Bytes of the pieces that files are kept in: most headers of published shards are shorter.
const BLOCK: usize = 1 << 13;
/// Pieces that are asked for at once when one follows another: a long header is being read.
const BLOCKS_AHEAD: usize = 8;

/// The weight files of one revision of a model.
pub struct RemoteFiles {
    id: String,
    transfer: Transfer,
    files: HashMap<String, Mutex<RemoteBlocks>>,
}

/// A file, and what has come of it.
struct RemoteBlocks {
    file: RemoteFile,
    /// By their number.
    blocks: HashMap<usize, Vec<u8>>,
}

impl RemoteFiles {
    /// Describes the files that weights may be in, and reads how each begins, several at once.
    pub(super) fn new(id: &str, listing: &Listing, transfer: Transfer) -> anyhow::Result<Self> {
        let Some(form) = WeightForm::choose(|name| listing.files.contains(name)) else {
            return Ok(Self { id: id.to_string(), transfer, files: HashMap::new() });
        };
        let is_shard = |name: &str| match form {
            WeightForm::Single(_) => false,
            // `model.safetensors.index.json` lists `model-00001-of-00002.safetensors` and so on.
            WeightForm::Sharded(index) => {
                let mut parts = index.split('.');
                let (stem, extension) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                !name.contains('/') && name.starts_with(stem) && name.ends_with(&format!(".{extension}"))
            }
        };
        let names: Vec<_> = listing.files.iter().filter(|name| *name == form.name() || is_shard(name)).collect();
        let begin = |name: &&String| {
            let file = transfer.describe(&listing.commit, name)?;
            let mut blocks = RemoteBlocks { file, blocks: HashMap::new() };
            blocks.read(&transfer, 0)?;
            Ok((name.to_string(), Mutex::new(blocks)))
        };
        let files = super::at_once(&names, begin, || transfer.stop())?.into_iter().collect();
        Ok(Self { id: id.to_string(), transfer, files })
    }
}

impl RemoteBlocks {
    /// Reads the block of this number, and those after it when the one before it was read too.
    fn read(&mut self, transfer: &Transfer, number: usize) -> anyhow::Result<()> {
        let count = if number > 0 && self.blocks.contains_key(&(number - 1)) { BLOCKS_AHEAD } else { 1 };
        let mut buffer = vec![0; count * BLOCK];
        let len = transfer.read_range(&self.file, (number * BLOCK) as u64, &mut buffer)?;
        for (index, block) in buffer[..len].chunks(BLOCK).enumerate() {
            self.blocks.entry(number + index).or_insert_with(|| block.to_vec());
        }
        Ok(())
    }
}

impl WeightFiles for RemoteFiles {
    fn path(&self, name: &str) -> PathBuf {
        Path::new(&self.id).join(name)
    }

    fn open(&self, name: &str) -> int8_models::Result<Option<Box<dyn ReadSeek + '_>>> {
        let Some(blocks) = self.files.get(name) else { return Ok(None) };
        Ok(Some(Box::new(RemoteReader { transfer: &self.transfer, blocks, position: 0 })))
    }
}

/// A file that is read piece by piece.
struct RemoteReader<'a> {
    transfer: &'a Transfer,
    blocks: &'a Mutex<RemoteBlocks>,
    position: u64,
}

impl Read for RemoteReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if self.position >= blocks.file.size {
            return Ok(0);
        }
        let number = (self.position / BLOCK as u64) as usize;
        if !blocks.blocks.contains_key(&number) {
            blocks.read(self.transfer, number).map_err(io::Error::other)?;
        }
        let offset = (self.position % BLOCK as u64) as usize;
        let rest = blocks.blocks.get(&number).and_then(|block| block.get(offset..)).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for RemoteReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let size = self.blocks.lock().unwrap_or_else(PoisonError::into_inner).file.size;
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => size.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::other("a seek before the start of the file"))?;
        Ok(self.position)
    }
}
