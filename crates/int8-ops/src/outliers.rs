//! Which feature columns of the activations are outliers.

use candle_core::{Result, Tensor, bail};

use crate::cpu::{Activations, Kernels, Values};

/// The magnitude from which a value is an outlier (LLM.int8() section 3.2; `|x| >= 6.0` as the
/// reference code tests it).
pub const OUTLIER_THRESHOLD: f32 = 6.0;

/// The outlier columns of each sequence of `x` (sequences, tokens, in) or (tokens, in), ascending:
/// every column where any token's `|x| >= threshold`.
///
/// Sequences are looked at one by one, so what shares a batch with a sequence never changes its
/// columns. A NaN counts as an outlier: it then reaches the output instead of becoming a code.
pub fn outlier_columns(x: &Tensor, threshold: f32) -> Result<Vec<Vec<u32>>> {
    check_threshold(Some(threshold))?;
    let values = Values::read(x)?;
    let activations = Activations::quantize(Kernels::active(), &values, Some(threshold));
    Ok(activations.sequences)
}

/// An error unless the threshold, if there is one, is above 0.
pub(crate) fn check_threshold(threshold: Option<f32>) -> Result<()> {
    match threshold {
        Some(threshold) if threshold.is_nan() || threshold <= 0.0 => {
            bail!("the outlier threshold must be above 0, found {threshold}")
        }
        _ => Ok(()),
    }
}
