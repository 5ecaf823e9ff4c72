//! Custom Candle ops for 8-bit linear algebra: the mixed-precision product of LLM.int8()
//! (Dettmers et al. 2022, <https://arxiv.org/abs/2208.07339>).
//!
//! The method, for activations `x` (tokens, in) of one sequence and a weight `W` (out, in):
//!
//! 1. Once, at load, every weight row becomes int8 codes and one scale: [`Int8Matrix`].
//! 2. A column of `x` that holds any `|x| >= 6` is an outlier column: [`outlier_columns`].
//! 3. Every token's other values become int8 codes and one scale: [`quantize_activations`].
//! 4. Codes times codes are summed exactly in 32-bit integers and both scales are multiplied back in.
//! 5. The few outlier columns are multiplied in float with the same columns of the dequantised `W`.
//! 6. The sum of both, plus the bias, is rounded once to the activations' dtype.
//!
//! [`int8_matmul`] does steps 2 to 6 as one Candle custom op; [`Int8Linear`] is that op as a layer.
//! [`float_matmul`] multiplies float activations by a 16- or 32-bit weight without widening it in
//! memory: the language-model head, and the models in float that int8 is compared with.
//! [`attention()`] and [`LayerNorm`] are the rest of a block. [`Fused`] puts the neighbours of a linear layer,
//! which [`add`] and [`Activation`] do on their own, into its launches, or its pass over the outputs on the CPU.
//!
//! Candle has no int8 dtype: codes are the bits of `i8` in a `U8` tensor. A scale is always the
//! multiplier that turns a code back into a float, `absmax / 127`.

mod attention;
pub mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub mod device;
mod elementwise;
mod float;
mod fused;
mod layer_norm;
mod linear;
mod matmul;
mod matrix;
mod outliers;
pub mod profile;
mod quantize;

pub use attention::{AttentionCache, CacheDtype, attention, attention_with};
pub use elementwise::{Activation, add};
pub use float::{FloatLinear, float_matmul, float_matmul_with, read_floats};
pub use fused::Fused;
pub use layer_norm::LayerNorm;
pub use linear::{Int8Linear, Int8LinearGroup};
pub use matmul::{WeightAndBias, int8_matmul, int8_matmul_fused, int8_matmul_with};
pub use matrix::{Int8Matrix, SharedBytes, quantize_row};
pub use outliers::{OUTLIER_THRESHOLD, outlier_columns};
pub use quantize::{Granularity, ZeroPointMatrix, quantize_absmax, quantize_activations, quantize_zero_point};

/// The largest int8 code the method uses; the range is symmetric, -127 to 127.
pub const MAX_CODE: f32 = 127.0;
