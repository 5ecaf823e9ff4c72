//! Weights that a checkpoint holds in int8, as bitsandbytes saves them: `X.weight` in I8 (out, in),
//! `X.SCB` in F32 (out), the largest magnitude of each row, and `X.weight_format` in U8, 0 for rows.

use int8_ops::MAX_CODE;
use safetensors::Dtype;

use super::{Checkpoint, RawTensor};
use crate::error::{Error, NOT_FOUND, Result};

/// What the largest magnitudes of the rows of a module's weight are called.
pub(crate) const ABSMAX: &str = "SCB";
/// What tells how the codes of a module's weight are laid out.
pub(crate) const FORMAT: &str = "weight_format";
/// The only layout that is not for particular GPUs: row by row.
pub(crate) const ROWS: u8 = 0;

impl Checkpoint {
    /// The largest magnitude of each row of `weight`, which is in I8.
    pub(crate) fn stored_absmax(&self, weight: &RawTensor) -> Result<Vec<f32>> {
        let module = weight.name.trim_end_matches("weight");
        if let Some(format) = self.tensor(&format!("{module}{FORMAT}"))
            && format.data().iter().any(|&byte| byte != ROWS)
        {
            let hint = "save it again with a current bitsandbytes, which stores rows (weight_format 0)";
            let problem = format!("is {:?}, a layout for particular GPUs, wanted 0 (rows)", format.data());
            return Err(format.problem_with_hint(problem, Some(hint.to_string())));
        }
        let name = format!("{module}{ABSMAX}");
        let Some(absmax) = self.tensor(&name) else { return Err(self.missing(name, NOT_FOUND)) };
        let rows = weight.shape[0];
        if absmax.shape != [rows] {
            return Err(absmax.problem(format!("has shape {:?}, wanted {:?}", absmax.shape, [rows])));
        }
        if absmax.dtype != Dtype::F32 {
            return Err(Error::wrong_dtype(absmax.file, absmax.name, absmax.dtype, "F32"));
        }
        let mut values = vec![0f32; rows];
        absmax.widen(0, &mut values);
        absmax.check_finite(0, &values)?;
        absmax.bytes.give_back(&absmax.range);
        match values.iter().position(|value| *value < 0.0) {
            Some(row) => Err(absmax.problem(format!("value [{row}] is {}, wanted a magnitude", values[row]))),
            None => Ok(values),
        }
    }

    /// The scale of each row of `weight`, which is in I8.
    pub(crate) fn stored_scales(&self, weight: &RawTensor) -> Result<Vec<f32>> {
        let mut scales = self.stored_absmax(weight)?;
        scales.iter_mut().for_each(|absmax| *absmax /= MAX_CODE);
        Ok(scales)
    }
}
