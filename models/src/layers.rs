//! Layers in the precision they were loaded in.

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::Module;
use int8_ops::profile::{self, Part};
use int8_ops::{
    FloatLinear, Fused, Int8Linear, Int8LinearGroup, Int8Matrix, LayerNorm, float_matmul, int8_matmul, read_floats,
};

/// A linear layer in the precision it was loaded in.
#[derive(Debug)]
pub(crate) enum Linear {
    Float(FloatLinear),
    Int8(Int8Linear),
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Float(layer) => layer.forward(x),
            Self::Int8(layer) => layer.forward(x),
        }
    }
}

impl Linear {
    /// The layer between its neighbours.
    pub(crate) fn forward_fused(&self, x: &Tensor, fused: &Fused) -> Result<Tensor> {
        match self {
            Self::Float(layer) => layer.forward_fused(x, fused),
            Self::Int8(layer) => layer.forward_fused(x, fused),
        }
    }

    /// Reads the weight once; gives its bytes.
    pub(crate) fn read(&self) -> Result<usize> {
        match self {
            Self::Float(layer) => read_floats(layer.weight()),
            Self::Int8(layer) => layer.weight().read(),
        }
    }
}

/// Linear layers that take the same input; their outputs come side by side.
#[derive(Debug)]
pub(crate) enum Linears {
    Int8(Int8LinearGroup),
    Apart(Vec<Linear>),
}

impl Linears {
    /// Reads the weights once; gives their bytes.
    pub(crate) fn read(&self) -> Result<usize> {
        match self {
            Self::Int8(layers) => layers.layers().iter().map(|layer| layer.weight().read()).sum(),
            Self::Apart(layers) => layers.iter().map(Linear::read).sum(),
        }
    }

    /// The outputs for x, after a norm where there is one.
    pub(crate) fn forward(&self, x: &Tensor, norm: Option<&LayerNorm>) -> Result<Tensor> {
        match self {
            Self::Int8(layers) => layers.forward_fused(x, &Fused { norm, ..Fused::default() }),
            Self::Apart(layers) => {
                let normed = norm.map(|norm| norm.forward(x)).transpose()?;
                let x = normed.as_ref().unwrap_or(x);
                let outputs = layers.iter().map(|layer| layer.forward(x)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&outputs, D::Minus1)
            }
        }
    }
}

/// The token embedding (vocabulary, width), which is the head too where the two are tied; or a table of positions.
#[derive(Debug)]
pub(crate) struct Embedding {
    table: Table,
    /// What rows are looked up in.
    activation_dtype: DType,
}

/// The rows of an embedding.
#[derive(Debug)]
pub(crate) enum Table {
    Float(Tensor),
    Int8 { matrix: Int8Matrix, threshold: Option<f32> },
}

impl Embedding {
    pub(crate) fn new(table: Table, activation_dtype: DType) -> Self {
        Self { table, activation_dtype }
    }

    /// The device that the table is on.
    pub(crate) fn device(&self) -> &Device {
        match &self.table {
            Table::Float(table) => table.device(),
            Table::Int8 { matrix, .. } => matrix.device(),
        }
    }

    /// What rows are looked up in, and the model computes in between its layers.
    pub(crate) fn activation_dtype(&self) -> DType {
        self.activation_dtype
    }

    /// Reads the table once; gives its bytes.
    pub(crate) fn read(&self) -> Result<usize> {
        match &self.table {
            Table::Float(table) => read_floats(table),
            Table::Int8 { matrix, .. } => matrix.read(),
        }
    }

    /// The rows (.., width), in the dtype of activations and where the table is, of token ids (..) in `U32` on
    /// the CPU.
    pub(crate) fn lookup(&self, tokens: &Tensor) -> Result<Tensor> {
        let ids = tokens.flatten_all()?;
        let rows = match &self.table {
            Table::Float(table) => {
                check_ids(&ids, table.dim(0)?)?;
                table.index_select(&ids.to_device(table.device())?, 0)?.to_dtype(self.activation_dtype)?
            }
            Table::Int8 { matrix, .. } => matrix.dequantize_rows(&ids, self.activation_dtype)?,
        };
        let mut dims = tokens.dims().to_vec();
        dims.push(rows.dim(1)?);
        rows.reshape(dims)
    }

    /// The logits (.., vocabulary), in `F32` on the CPU, of hidden states (.., width): their products with every
    /// row.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = profile::time(Part::Head, || match &self.table {
            Table::Float(table) => float_matmul(hidden, table, None),
            Table::Int8 { matrix, threshold } => int8_matmul(hidden, matrix, None, *threshold),
        });
        // Widened where they are used: 16 bits are half of the way.
        logits?.to_device(&Device::Cpu)?.to_dtype(DType::F32)
    }
}

/// An error when an id is of none of `rows` rows: not every device looks.
fn check_ids(ids: &Tensor, rows: usize) -> Result<()> {
    match ids.to_vec1::<u32>()?.iter().find(|&&id| id as usize >= rows) {
        Some(id) => bail!("an embedding has no row {id} among {rows}"),
        None => Ok(()),
    }
}
