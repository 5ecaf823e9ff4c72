//! PyTorch checkpoints as `torch.save` writes them, whole ones and ones to refuse.
#![allow(dead_code)] // each test binary uses its own part

use std::fs::File;
use std::io::Write;
use std::path::Path;

use zip::write::{SimpleFileOptions, ZipWriter};

/// What a pickle says of one tensor, true or not.
#[derive(Clone)]
pub struct Pickled {
    pub name: String,
    /// Such as `HalfStorage`.
    pub class: &'static str,
    pub key: String,
    pub storage_len: i32,
    pub offset: i32,
    pub shape: Vec<i32>,
    pub strides: Vec<i32>,
}

impl Pickled {
    /// A tensor that fills the storage `key`, row by row.
    pub fn whole(name: &str, class: &'static str, key: &str, shape: &[usize]) -> Self {
        let shape: Vec<i32> = shape.iter().map(|&size| size as i32).collect();
        let strides = (0..shape.len()).map(|dim| shape[dim + 1..].iter().product()).collect();
        let storage_len = shape.iter().product();
        Self { name: name.to_string(), class, key: key.to_string(), storage_len, offset: 0, shape, strides }
    }
}

/// The pickle of a dictionary of tensors, in protocol 2.
pub fn pickle(tensors: &[Pickled]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{}\n", tensor.class).bytes());
        text(&mut out, &tensor.key);
        text(&mut out, "cpu");
        int(&mut out, tensor.storage_len);
        out.extend(b"tQ");
        int(&mut out, tensor.offset);
        for sizes in [&tensor.shape, &tensor.strides] {
            out.push(b'(');
            sizes.iter().for_each(|&size| int(&mut out, size));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn int(out: &mut Vec<u8>, value: i32) {
    out.push(b'J');
    out.extend(value.to_le_bytes());
}

/// Writes the archive: the pickle, and the bytes of every storage under its key.
pub fn write_archive(file: &Path, pickle: &[u8], storages: &[(String, Vec<u8>)]) {
    let mut archive = ZipWriter::new(File::create(file).unwrap());
    let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut entry = |name: &str, content: &[u8]| {
        archive.start_file(format!("archive/{name}"), stored).unwrap();
        archive.write_all(content).unwrap();
    };
    entry("data.pkl", pickle);
    entry("version", b"3\n");
    entry("byteorder", b"little");
    for (key, content) in storages {
        entry(&format!("data/{key}"), content);
    }
    archive.finish().unwrap();
}
