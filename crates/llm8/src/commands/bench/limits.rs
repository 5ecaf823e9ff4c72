//! The limits of this machine, with the threads and kernels that the model runs with, or of a CUDA device.

use std::ops::RangeInclusive;
use std::time::Instant;

use int8_models::{CausalLm, Device, Error};
use int8_ops::cpu::limits::int8_dot_peak;
use int8_ops::device;

/// What the machine can do at best.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of the weights that are read a second; `None` on a CUDA device.
    pub read_bandwidth: Option<f64>,
    /// Bytes that a copy in a CUDA device's memory reads and writes a second; `None` on the CPU, and where the
    /// device has too little room to copy.
    pub copy_bandwidth: Option<f64>,
    /// Operations a second; `None` where the kernels' instruction set has no dot product of codes, and on a CUDA
    /// device.
    pub int8_dot_peak: Option<f64>,
    /// Operations a second of NVIDIA's libraries with large matrices; `None` on the CPU, and where the device has
    /// too little room.
    pub int8_matmul_peak: Option<f64>,
    /// The same in f16.
    pub f16_matmul_peak: Option<f64>,
}

/// Bytes that are copied on a CUDA device, from the least that tells something: more than its cache holds, and
/// than starting a copy costs.
const COPY_BYTES: RangeInclusive<usize> = 1 << 28..=1 << 30;

impl Limits {
    pub const NONE: Self = Self {
        read_bandwidth: None,
        copy_bandwidth: None,
        int8_dot_peak: None,
        int8_matmul_peak: None,
        f16_matmul_peak: None,
    };

    /// What the machine gives at this moment. Memory is read where the model's weights are: other work on the
    /// machine, and what pages a program has been given, make twice as much or half of it.
    pub fn measure(model: &dyn CausalLm) -> Result<Self, Error> {
        if !model.device().is_cpu() {
            return Self::of_device(model.device());
        }
        let start = Instant::now();
        let bytes = model.read_weights()?;
        let read_bandwidth = Some(bytes as f64 / start.elapsed().as_secs_f64());
        let int8_dot_peak = int8_dot_peak(rayon::current_num_threads());
        Ok(Self { read_bandwidth, int8_dot_peak, ..Self::NONE })
    }

    fn of_device(device: &Device) -> Result<Self, Error> {
        let free = device::memory(device)?.map_or(0, |memory| memory.free);
        // The copy takes twice its bytes, and must leave some.
        let bytes = (free / 4).min(*COPY_BYTES.end());
        let has_room = COPY_BYTES.contains(&bytes);
        let copy_bandwidth = if has_room { device::copy_bandwidth(device, bytes)? } else { None };
        let peaks = device::matmul_peaks(device)?;
        Ok(Self {
            copy_bandwidth,
            int8_matmul_peak: peaks.map(|peaks| peaks.int8),
            f16_matmul_peak: peaks.map(|peaks| peaks.f16),
            ..Self::NONE
        })
    }

    /// What limits the reading of weights, and the bytes a second.
    pub fn bandwidth(&self) -> Option<(&'static str, f64)> {
        let read = self.read_bandwidth.map(|bytes| ("read_bandwidth", bytes));
        read.or(self.copy_bandwidth.map(|bytes| ("copy_bandwidth", bytes)))
    }

    /// What limits the products of a prompt at int8, and the operations a second.
    pub fn int8_peak(&self) -> Option<(&'static str, f64)> {
        let dots = self.int8_dot_peak.map(|operations| ("int8_dot_peak", operations));
        dots.or(self.int8_matmul_peak.map(|operations| ("int8_matmul_peak", operations)))
    }

    /// What was measured before and after something: the mean of each.
    pub fn around(before: &Self, after: &Self) -> Self {
        // The median of two is between them.
        Self::median(&[*before, *after])
    }

    /// The median of each.
    pub fn median(all: &[Self]) -> Self {
        let of = |limit: fn(&Self) -> Option<f64>| {
            let values: Vec<f64> = all.iter().filter_map(limit).collect();
            (!values.is_empty()).then(|| median(values))
        };
        Self {
            read_bandwidth: of(|limits| limits.read_bandwidth),
            copy_bandwidth: of(|limits| limits.copy_bandwidth),
            int8_dot_peak: of(|limits| limits.int8_dot_peak),
            int8_matmul_peak: of(|limits| limits.int8_matmul_peak),
            f16_matmul_peak: of(|limits| limits.f16_matmul_peak),
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
