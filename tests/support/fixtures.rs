//! The fixtures, and the folders that tests make of them.
#![allow(dead_code)] // each test binary uses its own part

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The fixtures; on a machine that has only the built tests, where `LLM8_FIXTURES` says.
pub fn fixtures() -> PathBuf {
    if let Some(folder) = std::env::var_os("LLM8_FIXTURES") {
        return folder.into();
    }
    // The workspace's members lie one or two folders below its root.
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let is_root = |folder: &&Path| folder.join("tests/fixtures").is_dir();
    crate_folder.ancestors().find(is_root).unwrap().join("tests/fixtures")
}

pub fn json(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(fixtures().join(path)).unwrap()).unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The folder of a model: a fixture, or an outlier twin put together from its overlay.
pub fn model(name: &str) -> PathBuf {
    let folder = fixtures().join(name);
    if folder.join("overlay.safetensors").exists() { outlier_twin(name) } else { folder }
}

/// A folder for what a test binary makes.
pub fn scratch(name: &str) -> PathBuf {
    let root = match std::env::var_os("LLM8_FIXTURES") {
        Some(_) => std::env::temp_dir(),
        None => env!("CARGO_TARGET_TMPDIR").into(),
    };
    let folder = root.join(env!("CARGO_CRATE_NAME")).join(name);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// The twin of a model with outlier features: its parent with the overlay's tensors and columns.
fn outlier_twin(name: &str) -> PathBuf {
    static WRITTEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut written = WRITTEN.lock().unwrap();
    let folder = scratch(name);
    if !written.insert(name.to_string()) {
        return folder;
    }
    let parent = name.strip_suffix("-outliers").unwrap();
    let weights = fs::read(fixtures().join(parent).join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let overlay = fs::read(fixtures().join(name).join("overlay.safetensors")).unwrap();
    let overlay = SafeTensors::deserialize(&overlay).unwrap();
    let columns = overlay.tensor("columns").unwrap();
    let columns: Vec<_> = columns.data().as_chunks::<8>().0.iter().map(|index| i64::from_le_bytes(*index)).collect();
    let merged = weights.tensors().into_iter().map(|(name, parent)| {
        let mut data = parent.data().to_vec();
        if let Ok(part) = overlay.tensor(&name) {
            if part.shape() == parent.shape() {
                data.copy_from_slice(part.data());
            } else {
                let width = parent.shape()[1];
                for (index, value) in part.data().chunks(2).enumerate() {
                    let (row, column) = (index / columns.len(), columns[index % columns.len()] as usize);
                    data[(row * width + column) * 2..][..2].copy_from_slice(value);
                }
            }
        }
        (name, Stored { dtype: parent.dtype(), shape: parent.shape().to_vec(), data })
    });
    safetensors::serialize_to_file(merged.collect::<Vec<_>>(), None, &folder.join("model.safetensors")).unwrap();
    for file in ["config.json", "generation_config.json"] {
        fs::copy(fixtures().join(name).join(file), folder.join(file)).unwrap();
    }
    folder
}

/// A tensor to write.
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl safetensors::View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data).into()
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// A copy of a fixture to break: the files of `name` in a folder of their own.
pub fn copy_of(name: &str, copy: &str) -> PathBuf {
    let folder = scratch(copy);
    for file in fs::read_dir(fixtures().join(name)).unwrap() {
        let file = file.unwrap().path();
        fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    folder
}

/// Changes the tensors of a folder's model.safetensors.
pub fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut Vec<(String, Stored)>)) {
    let file = folder.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let mut tensors: Vec<_> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, stored(&view)))
        .collect();
    edit(&mut tensors);
    safetensors::serialize_to_file(tensors, None, &file).unwrap();
}

fn stored(view: &TensorView) -> Stored {
    Stored { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() }
}

/// Changes one tensor of a folder's model.safetensors.
pub fn edit_tensor(folder: &Path, name: &str, edit: impl FnOnce(&mut Stored)) {
    edit_tensors(folder, |tensors| {
        let tensor = tensors.iter_mut().find(|(other, _)| other == name);
        edit(&mut tensor.unwrap_or_else(|| panic!("no tensor {name}")).1);
    });
}
