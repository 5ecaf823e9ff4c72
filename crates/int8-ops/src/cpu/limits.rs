//! What the machine can do at best, measured: what the speed of a model is a share of.
//!
//! A token costs one read of the weights, so decoding is bounded by how fast memory can be read; a prompt
//! costs its products, so prefill is bounded by how fast codes can be multiplied.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::Kernels;

/// Passes over the buffer; the fastest counts, as others share the machine's memory.
const READ_PASSES: usize = 10;
/// Runs of products; the fastest counts.
const DOT_RUNS: usize = 5;
/// Steps of every chain of products in a run: some milliseconds.
const DOT_STEPS: usize = 2_000_000;

/// A cache line of the buffer.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Line([u64; 8]);

/// Bytes a second that `threads` threads read from memory, each one part of a buffer of `bytes`, which must
/// be far larger than the caches.
pub fn read_bandwidth(threads: usize, bytes: usize) -> f64 {
    let lines = (bytes / size_of::<Line>() / threads).max(1);
    let fastest = fastest(threads, READ_PASSES, |thread| {
        // Each thread has memory of its own, which it writes first: zeros that nobody wrote are all one page.
        let part = vec![Line([thread as u64 + 1; 8]); lines];
        move || {
            black_box(sum(&part));
        }
    });
    (threads * lines * size_of::<Line>()) as f64 / fastest.as_secs_f64()
}

/// The sum of all numbers: as little work as will read them, so that memory is all it waits for.
fn sum(lines: &[Line]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the feature.
            return unsafe { avx512::sum(lines) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { avx2::sum(lines) };
        }
    }
    lines.iter().flat_map(|line| line.0).fold(0, u64::wrapping_add)
}

/// Sums in registers of one width: their type, the feature, the intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! sums {
    ($name:ident, $feature:literal, $register:ty, $load:ident, $add:ident) => {
        mod $name {
            use std::arch::x86_64::*;

            use super::Line;

            /// Parts of the lines that are read side by side, as a processor fetches ahead in several places.
            const STREAMS: usize = 4;
            /// Registers of a line.
            const PARTS: usize = size_of::<Line>() / size_of::<$register>();

            #[target_feature(enable = $feature)]
            pub(super) fn sum(lines: &[Line]) -> u64 {
                let len = lines.len() / STREAMS;
                let (whole, rest) = lines.split_at(STREAMS * len);
                let zero = [0u64; size_of::<$register>() / size_of::<u64>()];
                // SAFETY: the array is as large as the register.
                let mut sums = [[unsafe { $load(zero.as_ptr().cast()) }; PARTS]; STREAMS];
                for index in 0..len {
                    for (stream, sums) in sums.iter_mut().enumerate() {
                        let line = whole[stream * len + index].0.as_ptr().cast::<$register>();
                        for (part, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: the line has so many parts.
                            *sum = $add(*sum, unsafe { $load(line.add(part).cast()) });
                        }
                    }
                }
                let total = sums.as_flattened().iter().fold(0u64, |total, sum| {
                    // SAFETY: a register is so many numbers.
                    let lanes: [u64; size_of::<$register>() / size_of::<u64>()] = unsafe { std::mem::transmute(*sum) };
                    lanes.into_iter().fold(total, u64::wrapping_add)
                });
                rest.iter().flat_map(|line| line.0).fold(total, u64::wrapping_add)
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
sums!(avx512, "avx512f", __m512i, _mm512_loadu_si512, _mm512_add_epi64);
#[cfg(target_arch = "x86_64")]
sums!(avx2, "avx2", __m256i, _mm256_loadu_si256, _mm256_add_epi64);

/// Operations a second (a product of two codes and its addition are two) that `threads` threads do with the
/// dot instruction of the instruction set in use, on operands that stay in registers; `None` where it has
/// no such instruction.
pub fn int8_dot_peak(threads: usize) -> Option<f64> {
    let chains = dot_chains(Kernels::active())?;
    let fastest = fastest(threads, DOT_RUNS, |_| move || (chains.run)(DOT_STEPS));
    Some((2 * threads * DOT_STEPS * chains.products_per_step) as f64 / fastest.as_secs_f64())
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

/// The time of the fastest of `runs` runs, from when `threads` threads begin together to when the last one
/// ends; `prepare(thread)` makes what a thread runs.
fn fastest<R: FnMut()>(threads: usize, runs: usize, prepare: impl Fn(usize) -> R + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let work = |thread: usize| {
        let mut run = prepare(thread);
        let mut time = || {
            barrier.wait();
            let start = Instant::now();
            run();
            barrier.wait();
            start.elapsed()
        };
        // The first run finds the processor asleep.
        time();
        (0..runs).map(|_| time()).min().unwrap_or_default()
    };
    // Every thread waits for the last one, so one thread's clock does for all.
    std::thread::scope(|scope| {
        let work = &work;
        for thread in 1..threads {
            scope.spawn(move || work(thread));
        }
        work(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read() {
        for count in [0, 1, 5, 64, 1003] {
            let lines: Vec<Line> =
                (0..count).map(|line| Line(std::array::from_fn(|lane| line * 8 + lane as u64))).collect();
            assert_eq!(sum(&lines), (0..count * 8).sum::<u64>(), "{count}");
        }
    }

    #[test]
    fn limits_are_numbers_and_instruction_sets_without_dots_have_none() {
        let bandwidth = read_bandwidth(2, 1 << 20);
        assert!(bandwidth.is_finite() && bandwidth > 0.0);
        for kernels in Kernels::available() {
            assert_eq!(dot_chains(kernels).is_some(), kernels.name.contains("vnni"), "{}", kernels.name);
        }
        if let Some(peak) = int8_dot_peak(1) {
            assert!(peak.is_finite() && peak > 0.0);
        }
    }
}
