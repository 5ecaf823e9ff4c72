//! What the machine can do at best, measured: what the speed of a model is a share of.
//!
//! A token costs one read of the weights, so decoding is bounded by how fast memory can be read; a prompt
//! costs its products, so prefill is bounded by how fast codes can be multiplied.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::{Kernels, team, tiles};

/// Steps of every chain of products in a run: some milliseconds.
const DOT_STEPS: usize = 2_000_000;

/// The fewest bytes that a thread is given at a time.
const BYTES_PER_PART: usize = 1 << 15;

/// Reads all the bytes, shared among the threads as a layer's weight is, and does as little with them as will
/// read them, so that memory is all that is waited for. Gives how many they are.
pub(crate) fn read(bytes: &[u8]) -> usize {
    team::for_each_range(bytes.len(), BYTES_PER_PART, |range| {
        black_box(sum(&bytes[range]));
    });
    bytes.len()
}

/// The sum, modulo 2^64, of the whole 64-bit numbers that the bytes are.
fn sum(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the feature.
            return unsafe { sum_avx512(bytes) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { sum_avx2(bytes) };
        }
    }
    sum_portable(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(bytes: &[u8]) -> u64 {
    sum_portable(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(bytes: &[u8]) -> u64 {
    sum_portable(bytes)
}

/// A plain loop, which is vectorised for what it is compiled for.
#[inline(always)]
fn sum_portable(bytes: &[u8]) -> u64 {
    /// Sums side by side: four of the widest vectors.
    const LANES: usize = 32;
    /// How far ahead they are asked for, in numbers: what has been the fastest.
    const AHEAD: usize = 512;
    let (numbers, _) = bytes.as_chunks::<8>();
    let (blocks, rest) = numbers.as_chunks::<LANES>();
    let mut sums = [0u64; LANES];
    for block in blocks {
        // A block is four cache lines, which are asked for one by one.
        block.chunks(8).for_each(|line| tiles::prefetch(line.as_ptr().wrapping_add(AHEAD)));
        sums.iter_mut().zip(block).for_each(|(sum, number)| *sum = sum.wrapping_add(u64::from_ne_bytes(*number)));
    }
    let rest = rest.iter().map(|number| u64::from_ne_bytes(*number));
    sums.into_iter().chain(rest).fold(0, u64::wrapping_add)
}

/// Operations a second (a product of two codes and its addition are two) that `threads` threads do with the
/// dot instruction of the instruction set in use, on operands that stay in registers; `None` where it has
/// no such instruction.
pub fn int8_dot_peak(threads: usize) -> Option<f64> {
    let chains = dot_chains(Kernels::active())?;
    let duration = slowest(threads, || (chains.run)(DOT_STEPS));
    Some((2 * threads * DOT_STEPS * chains.products_per_step) as f64 / duration.as_secs_f64())
}

/// Chains of the dot instruction that do not wait for each other.
#[derive(Clone, Copy)]
struct DotChains {
    /// Does so many steps of every chain.
    run: fn(steps: usize),
    /// Products of codes in one step of all chains.
    products_per_step: usize,
}

#[allow(clippy::undocumented_unsafe_blocks)]
fn dot_chains(kernels: &Kernels) -> Option<DotChains> {
    // SAFETY (of all): kernels are handed out only where the features they need were found.
    match kernels.name {
        #[cfg(target_arch = "x86_64")]
        "avx512-vnni" => Some(DotChains { run: |steps| unsafe { zmm::run(steps) }, products_per_step: zmm::PRODUCTS }),
        #[cfg(target_arch = "x86_64")]
        "avx512-vnni-256" => {
            Some(DotChains { run: |steps| unsafe { ymm_evex::run(steps) }, products_per_step: ymm_evex::PRODUCTS })
        }
        #[cfg(target_arch = "x86_64")]
        "avx-vnni" => {
            Some(DotChains { run: |steps| unsafe { ymm_vex::run(steps) }, products_per_step: ymm_vex::PRODUCTS })
        }
        _ => None,
    }
}

/// Chains of `vpdpbusd` in one width and encoding: the type of a register, the features, the intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! dot_chains {
    ($name:ident, $features:literal, $register:ty, $set1:ident, $dot:ident) => {
        mod $name {
            use std::arch::x86_64::*;
            use std::hint::black_box;

            /// As many as hide the latency of the instruction on two ports, and leave registers for operands.
            const CHAINS: usize = 12;
            pub(super) const PRODUCTS: usize = CHAINS * size_of::<$register>();

            #[target_feature(enable = $features)]
            pub(super) fn run(steps: usize) {
                let (x, weight) = (black_box($set1(3)), black_box($set1(5)));
                let mut sums = [$set1(0); CHAINS];
                for _ in 0..steps {
                    sums.iter_mut().for_each(|sum| *sum = $dot(*sum, x, weight));
                }
                black_box(sums);
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
dot_chains!(zmm, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8, _mm512_dpbusd_epi32);
#[cfg(target_arch = "x86_64")]
dot_chains!(ymm_evex, "avx2,avx512vl,avx512vnni", __m256i, _mm256_set1_epi8, _mm256_dpbusd_epi32);
#[cfg(target_arch = "x86_64")]
dot_chains!(ymm_vex, "avx2,avxvnni", __m256i, _mm256_set1_epi8, _mm256_dpbusd_avx_epi32);

/// The time from when `threads` threads begin with `run` together to when the last one ends.
fn slowest(threads: usize, run: impl Fn() + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let time = || {
        // The first run finds the processor asleep.
        run();
        barrier.wait();
        let start = Instant::now();
        run();
        barrier.wait();
        start.elapsed()
    };
    // Every thread waits for the last one, so one thread's clock does for all.
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(time);
        }
        time()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read() {
        for count in [0, 1, 5, 64, 1003] {
            let numbers: Vec<u64> = (0..count).map(|number| number * number).collect();
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
            assert_eq!(sum(&bytes), numbers.iter().sum::<u64>(), "{count}");
            assert_eq!(read(&bytes), bytes.len());
        }
    }

    #[test]
    fn the_dot_peak_is_a_number_and_instruction_sets_without_dots_have_none() {
        for kernels in Kernels::available() {
            assert_eq!(dot_chains(kernels).is_some(), kernels.name.contains("vnni"), "{}", kernels.name);
        }
        if let Some(peak) = int8_dot_peak(1) {
            assert!(peak.is_finite() && peak > 0.0);
        }
    }
}
