//! The limits of this machine, with the threads and kernels that the model runs with.

use int8_ops::cpu::limits::{int8_dot_peak, read_bandwidth};

use crate::machine;

/// Bytes that are read to measure memory: far more than caches hold.
const BUFFER: u64 = 1 << 29;

/// What the machine can do at best.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes a second.
    pub read_bandwidth: f64,
    /// Operations a second; `None` where the kernels' instruction set has no dot product of codes.
    pub int8_dot_peak: Option<f64>,
}

impl Limits {
    pub fn measure() -> Self {
        let threads = rayon::current_num_threads();
        let buffer = machine::memory().map_or(BUFFER, |memory| BUFFER.min(memory.available / 4));
        Self { read_bandwidth: read_bandwidth(threads, buffer as usize), int8_dot_peak: int8_dot_peak(threads) }
    }

    /// The higher of both, each by itself.
    pub fn best(self, other: Self) -> Self {
        Self {
            read_bandwidth: self.read_bandwidth.max(other.read_bandwidth),
            int8_dot_peak: self.int8_dot_peak.zip(other.int8_dot_peak).map(|(one, other)| one.max(other)),
        }
    }
}
