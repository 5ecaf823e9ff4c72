//! A model with random weights, from its config.json alone: for measuring speed and memory, which do not
//! depend on what the weights are.
//!
//! Values are drawn straight into the precision that a layer holds them in, the same ones at every run and
//! with any number of threads. They are such that activations stay of a size, as a trained model's do, and a
//! few columns of every norm are larger by far, so that there are outlier columns.

use std::path::PathBuf;
use std::sync::Arc;

use bytemuck::Pod;
use candle_core::{DType, Device, Tensor};
use fastrand::Rng;
use half::{bf16, f16};
use int8_ops::{Int8Matrix, MAX_CODE};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::bytes;
use crate::checkpoint::rows::Float;
use crate::config::Config;
use crate::error::{Error, Result, first_line};
use crate::folder::ModelFolder;
use crate::footprint::Footprint;
use crate::load::{LoadOptions, Loaded, load_from};
use crate::source::{Source, SourceTensor};

/// The columns that hold outliers, the same in every norm of a block: as many as Dettmers et al. 2022
/// (section 4) find in a model of 6.7 billion parameters.
const OUTLIER_COLUMNS: usize = 6;
/// What the norms multiply those columns by; the others by 1. Almost every token then has outliers there,
/// of the magnitudes that are found in trained models.
const OUTLIER_WEIGHT: f32 = 20.0;

/// BLOOM's norm behind the embedding, whose outliers would add up with those of every block's norm.
const EMBEDDING_NORM: &str = "word_embeddings_layernorm.weight";

/// Biases have magnitudes from 2^-5 on: small beside activations of about 1.
const BIAS_EXPONENT: i32 = -5;

/// Bytes that one seed is for: the work of a task.
const CHUNK: usize = 1 << 16;

/// Makes the model that config.json in `folder` describes, of which nothing else is read, with random
/// weights; see the [published models](crate::published()) for folders without a disk.
///
/// The progress is that of loading a checkpoint in 16 bits. Errors as [`load`](crate::load()) does when
/// the config makes no sense or there is no memory.
pub fn load_dummy(folder: &ModelFolder, options: &LoadOptions) -> Result<Loaded> {
    load_from(folder, options, || {
        let stored_bytes = Footprint::of(folder)?.bytes_at_16_bits() as usize;
        Ok(DummyWeights { config_file: folder.file(Config::FILE), stored_bytes })
    })
}

/// Every tensor that is asked for, as if it were stored in F16.
struct DummyWeights {
    config_file: PathBuf,
    stored_bytes: usize,
}

impl Source for DummyWeights {
    fn find_prefix<'p>(&self, prefixes: &[&'p str], _probe: &str) -> Result<&'p str> {
        Ok(prefixes[0])
    }

    fn check_blocks_end(&self, _path: &str, _count: usize) -> Result<()> {
        Ok(())
    }

    fn find_tensor<'a>(&'a self, name: &str, shape: &[usize]) -> Result<Box<dyn SourceTensor + 'a>> {
        Ok(Box::new(DummyTensor { source: self, name: name.to_string(), shape: shape.to_vec() }))
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }

    fn is_as_config_says(&self) -> bool {
        false
    }

    fn has_bf16(&self) -> bool {
        false
    }
}

/// A tensor that is yet to be drawn.
struct DummyTensor<'a> {
    source: &'a DummyWeights,
    name: String,
    shape: Vec<usize>,
}

impl SourceTensor for DummyTensor<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn dtype(&self) -> Dtype {
        Dtype::F16
    }

    fn stored_bytes(&self) -> usize {
        self.values() * size_of::<f16>()
    }

    /// A norm's weight, which is the only vector of that name, is 1 but for the outlier columns of a block's;
    /// biases are small.
    fn vector(&self, dtype: DType) -> Result<Tensor> {
        let len = self.values();
        let mut values = vec![1f32; len];
        if !self.name.ends_with(".weight") {
            self.draw(&mut values, BIAS_EXPONENT);
        } else if !self.name.ends_with(EMBEDDING_NORM) {
            for index in 0..OUTLIER_COLUMNS {
                values[(2 * index + 1) * len / (2 * OUTLIER_COLUMNS)] = OUTLIER_WEIGHT;
            }
        }
        Ok(Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(dtype)?)
    }

    /// Codes are drawn as bytes; the scale is one for all rows, such that values reach as far as the floats.
    fn int8_matrix(&self, device: &Device) -> Result<Int8Matrix> {
        let (rows, cols) = (self.shape[0], self.shape[1]);
        let no_memory = |_| self.no_memory(rows * cols);
        let mut codes = bytes::zeros(rows * cols).map_err(no_memory)?;
        self.draw::<i8>(bytemuck::cast_slice_mut(&mut codes), self.exponent());
        let scales = vec![2f32.powi(self.exponent() + 1) / MAX_CODE; rows];
        let scales = Tensor::from_vec(scales, rows, device)?;
        let matrix = match device.is_cpu() {
            true => Int8Matrix::from_shared(Arc::new(codes), cols, scales),
            false => Int8Matrix::new(Tensor::from_slice(&codes, (rows, cols), device)?, scales),
        };
        matrix.map_err(|error| self.problem(first_line(&error)))
    }

    fn float_matrix(&self, dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F16 => self.float_tensor::<f16>(),
            DType::BF16 => self.float_tensor::<bf16>(),
            _ => self.float_tensor::<f32>(),
        }
    }
}

impl DummyTensor<'_> {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// The power of two that magnitudes begin with, up to twice as much, so that the sums of products of
    /// `cols` values with activations of about 1, a few of them outliers, are well below the threshold: no
    /// layer but those behind a norm has outliers.
    fn exponent(&self) -> i32 {
        let cols = self.shape.last().copied().unwrap_or(1);
        -(((cols as f32).log2() / 2.0).round() as i32) - 3
    }

    fn float_tensor<T: Float + Drawn>(&self) -> Result<Tensor> {
        let mut matrix = T::try_zeros(self.values()).map_err(|bytes| self.no_memory(bytes))?;
        self.draw(&mut matrix, self.exponent());
        Ok(Tensor::from_vec(matrix, self.shape.as_slice(), &Device::Cpu)?)
    }

    /// Draws values by the tensor's name and their place alone.
    fn draw<T: Drawn>(&self, values: &mut [T], exponent: i32) {
        // FNV-1a.
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let seed = self.name.bytes().fold(0xcbf2_9ce4_8422_2325, hash);
        values.par_chunks_mut(CHUNK / size_of::<T>()).enumerate().for_each(|(index, chunk)| {
            // The generator hashes a counter that begins with its seed: seeds must be far apart.
            let place = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Rng::with_seed(seed ^ place).fill(bytemuck::cast_slice_mut(chunk));
            chunk.iter_mut().for_each(|value| *value = value.drawn(exponent));
        });
    }

    fn problem(&self, problem: String) -> Error {
        Error::Tensor { file: self.source.config_file.clone(), tensor: self.name.clone(), problem, hint: None }
    }

    fn no_memory(&self, bytes: usize) -> Error {
        Error::no_memory(&self.source.config_file, &self.name, bytes)
    }
}

/// What can be drawn as random bits.
trait Drawn: Pod + Send {
    /// Makes a value of random bits one of either sign with a magnitude from 2^exponent to twice that; a code
    /// becomes any other than -128, which quantised weights never are.
    fn drawn(self, exponent: i32) -> Self;
}

impl Drawn for i8 {
    fn drawn(self, _exponent: i32) -> Self {
        if self == i8::MIN { 0 } else { self }
    }
}

impl Drawn for f32 {
    fn drawn(self, exponent: i32) -> Self {
        Self::from_bits(self.to_bits() & 0x807f_ffff | ((127 + exponent) as u32) << 23)
    }
}

impl Drawn for f16 {
    fn drawn(self, exponent: i32) -> Self {
        Self::from_bits(self.to_bits() & 0x83ff | ((15 + exponent) as u16) << 10)
    }
}

impl Drawn for bf16 {
    fn drawn(self, exponent: i32) -> Self {
        Self::from_bits(self.to_bits() & 0x807f | ((127 + exponent) as u16) << 7)
    }
}
