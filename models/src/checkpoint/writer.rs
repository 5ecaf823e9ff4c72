//! A checkpoint in safetensors, written tensor by tensor: names and shapes say beforehand where every
//! byte will be, so no more is in memory than what is being written.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};

/// Where the data of a file begins, and so, as in memory a file begins a page, where the tensors whose
/// bytes are a multiple of it begin: whole cache lines.
const ALIGNMENT: usize = 64;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct TensorSpec {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl TensorSpec {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// The files of a checkpoint: their names, headers and sizes.
#[derive(Debug)]
pub(crate) struct Layout {
    shards: Vec<ShardLayout>,
    /// Of a checkpoint of several files, what says which tensor is in which.
    index: Option<Vec<u8>>,
}

#[derive(Debug)]
struct ShardLayout {
    file: String,
    header: Vec<u8>,
    data_bytes: usize,
    /// Tensor name to where its data begins in the file.
    places: HashMap<String, u64>,
}

impl Layout {
    /// Of tensors in the order they will be written, in files that hold at most `shard_bytes` of
    /// them; a larger tensor has a file of its own.
    pub(crate) fn new(tensors: Vec<TensorSpec>, shard_bytes: usize) -> Self {
        let mut groups: Vec<Vec<TensorSpec>> = Vec::new();
        let (mut total, mut group_bytes) = (0, 0);
        for tensor in tensors {
            let bytes = tensor.bytes();
            total += bytes;
            group_bytes += bytes;
            match groups.last_mut() {
                Some(group) if group_bytes <= shard_bytes => group.push(tensor),
                _ => {
                    group_bytes = bytes;
                    groups.push(vec![tensor]);
                }
            }
        }
        let count = groups.len();
        let name = |shard: usize| match count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
        };
        let shards: Vec<_> =
            groups.into_iter().enumerate().map(|(index, group)| ShardLayout::new(name(index), group)).collect();
        let index = (count > 1).then(|| {
            let entries = shards.iter().flat_map(|shard| shard.places.keys().map(|name| (name, &shard.file)));
            let weight_map: BTreeMap<_, _> = entries.collect();
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            format!("{index:#}\n").into_bytes()
        });
        Self { shards, index }
    }

    /// The bytes of all files.
    pub(crate) fn file_bytes(&self) -> u64 {
        let shards = self.shards.iter().map(|shard| shard.header.len() + shard.data_bytes);
        (shards.sum::<usize>() + self.index.as_ref().map_or(0, Vec::len)) as u64
    }

    /// How many files hold tensors.
    pub(crate) fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Makes the files in `folder`, ready for their tensors.
    pub(crate) fn create(self, folder: &Path) -> io::Result<CheckpointWriter> {
        let (mut files, mut places) = (Vec::new(), HashMap::new());
        for shard in self.shards {
            let mut file = File::create_new(folder.join(&shard.file))?;
            file.write_all(&shard.header)?;
            file.set_len((shard.header.len() + shard.data_bytes) as u64)?;
            places.extend(shard.places.into_iter().map(|(name, start)| (name, (files.len(), start))));
            files.push(file);
        }
        if let Some(index) = self.index {
            let mut file = File::create_new(folder.join("model.safetensors.index.json"))?;
            file.write_all(&index)?;
            files.push(file);
        }
        Ok(CheckpointWriter { files, places })
    }
}

impl ShardLayout {
    fn new(file: String, mut tensors: Vec<TensorSpec>) -> Self {
        // Safetensors leaves no gaps. With those first whose bytes have the larger power of two as a
        // divisor, every tensor begins at a multiple of its own.
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.bytes().trailing_zeros().min(ALIGNMENT.ilog2())));
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_string(), json!({ "format": "pt" }));
        let mut offsets = Vec::new();
        let mut end = 0;
        for tensor in tensors {
            let start = end;
            end += tensor.bytes();
            let dtype = tensor.dtype.to_string();
            let entry = json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [start, end] });
            header.insert(tensor.name.clone(), entry);
            offsets.push((tensor.name, start));
        }
        let mut json = Value::Object(header).to_string();
        let padded = (size_of::<u64>() + json.len()).next_multiple_of(ALIGNMENT) - size_of::<u64>();
        json.extend(std::iter::repeat_n(' ', padded - json.len()));
        let header = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        let places = offsets.into_iter().map(|(name, start)| (name, (header.len() + start) as u64)).collect();
        Self { file, header, data_bytes: end, places }
    }
}

/// The files of a checkpoint, being written.
#[derive(Debug)]
pub(crate) struct CheckpointWriter {
    files: Vec<File>,
    /// Tensor name to its file and where its data begins there.
    places: HashMap<String, (usize, u64)>,
}

impl CheckpointWriter {
    /// Writes a part of a tensor's data, which begins `offset` bytes into it.
    pub(crate) fn write(&mut self, name: &str, offset: usize, data: &[u8]) -> io::Result<()> {
        let Some(&(file, start)) = self.places.get(name) else {
            return Err(io::Error::other(format!("tensor `{name}` has no place")));
        };
        let file = &mut self.files[file];
        file.seek(SeekFrom::Start(start + offset as u64))?;
        file.write_all(data)
    }

    /// Waits until everything is on the disk.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.files.iter().try_for_each(File::sync_all)
    }
}
