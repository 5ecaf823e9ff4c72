//! Layers in the precision they were loaded in.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::Module;
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

/// The token embedding (vocabulary, width), which is the head too where the two are tied.
#[derive(Debug)]
pub(crate) enum Embedding {
    Float(Tensor),
    Int8 { matrix: Int8Matrix, threshold: Option<f32> },
}

impl Embedding {
    /// Reads the table once; gives its bytes.
    pub(crate) fn read(&self) -> Result<usize> {
        match self {
            Self::Float(table) => read_floats(table),
            Self::Int8 { matrix, .. } => matrix.read(),
        }
    }

    /// The rows (.., width) in `F32` of token ids (..) in `U32`.
    pub(crate) fn lookup(&self, tokens: &Tensor) -> Result<Tensor> {
        let ids = tokens.flatten_all()?;
        let rows = match self {
            Self::Float(table) => table.index_select(&ids, 0)?.to_dtype(DType::F32)?,
            Self::Int8 { matrix, .. } => matrix.dequantize_rows(&ids, DType::F32)?,
        };
        let mut dims = tokens.dims().to_vec();
        dims.push(rows.dim(1)?);
        rows.reshape(dims)
    }

    /// The logits (.., vocabulary) of hidden states (.., width): their products with every row.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match self {
            Self::Float(table) => float_matmul(hidden, table, None),
            Self::Int8 { matrix, threshold } => int8_matmul(hidden, matrix, None, *threshold),
        }
    }
}
