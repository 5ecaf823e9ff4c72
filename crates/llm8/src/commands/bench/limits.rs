//! The limits of this machine, with the threads and kernels that the model runs with.

use std::time::Instant;

use int8_models::{CausalLm, Error};
use int8_ops::cpu::limits::int8_dot_peak;

/// What the machine can do at best.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes a second.
    pub read_bandwidth: f64,
    /// Operations a second; `None` where the kernels' instruction set has no dot product of codes.
    pub int8_dot_peak: Option<f64>,
}

impl Limits {
    /// What the machine gives at this moment. Memory is read where the model's weights are: other work on the
    /// machine, and what pages a program has been given, make twice as much or half of it.
    pub fn measure(model: &dyn CausalLm) -> Result<Self, Error> {
        let start = Instant::now();
        let bytes = model.read_weights()?;
        let read_bandwidth = bytes as f64 / start.elapsed().as_secs_f64();
        Ok(Self { read_bandwidth, int8_dot_peak: int8_dot_peak(rayon::current_num_threads()) })
    }

    /// The median of each.
    pub fn median(all: &[Self]) -> Self {
        let dot_peaks: Vec<f64> = all.iter().filter_map(|limits| limits.int8_dot_peak).collect();
        Self {
            read_bandwidth: median(all.iter().map(|limits| limits.read_bandwidth).collect()),
            int8_dot_peak: (!dot_peaks.is_empty()).then(|| median(dot_peaks)),
        }
    }
}

/// The middle of at least one value, or between the two that are in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (middle, last) = (values.len() / 2, values.len() - 1);
    (values[middle] + values[last - middle]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        for (values, expected) in [(vec![3.0], 3.0), (vec![4.0, 1.0], 2.5), (vec![9.0, 1.0, 2.0], 2.0)] {
            assert_eq!(median(values), expected);
        }
    }
}
