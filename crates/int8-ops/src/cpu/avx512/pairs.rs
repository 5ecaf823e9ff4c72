//! Sums of products of pairs of codes, in 16 bits, 32 products an instruction: rows by vectors of lanes in registers.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::cpu::Pair;
use crate::cpu::tiles::Ahead;

/// A code of which 16 pairs are loaded, and widened where they are narrow, at a time.
pub(super) trait WidenPairs: Copy {
    /// # Safety
    /// 16 pairs must be readable.
    unsafe fn load(pairs: *const [Self; 2]) -> __m512i;
}

impl WidenPairs for i16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(pairs: *const Pair) -> __m512i {
        // SAFETY: the caller vouches for the memory.
        unsafe { _mm512_loadu_si512(pairs.cast()) }
    }
}

impl WidenPairs for i8 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load(pairs: *const [i8; 2]) -> __m512i {
        // SAFETY: the caller vouches for the memory: 16 pairs of 8 bits.
        _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(pairs.cast()) })
    }
}

/// Rows of a tile: with 4 or 5 vectors 16 or 20 sums in registers, which keep the multipliers busy. With 24, of 6 rows,
/// the same products take a quarter longer.
const ROWS: usize = 4;

/// [`PairSums`](crate::cpu::PairSums).
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[expect(clippy::too_many_arguments)]
pub(super) fn pair_sums<C: WidenPairs>(
    a: &[Pair],
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
    lanes: usize,
    next: &[Range<*const [C; 2]>],
) {
    let rows = sums.len() / width;
    if rows == 1 {
        return row_sums(a, depth, b, strides, &mut sums[..lanes], &Ahead::new(b, next));
    }
    let stride = a.len() / rows;
    for row in (0..rows).step_by(ROWS) {
        let a = &a[row * stride..];
        let mut lane = 0;
        while lane < lanes {
            let (b, sums) = (&b[lane / 16 * strides[1]..], &mut sums[row * width + lane..]);
            macro_rules! tile {
                ($rows:tt) => {
                    match (lanes - lane) / 16 {
                        1 => tile::<C, $rows, 1>(a, stride, depth, b, strides, sums, width),
                        2 => tile::<C, $rows, 2>(a, stride, depth, b, strides, sums, width),
                        3 => tile::<C, $rows, 3>(a, stride, depth, b, strides, sums, width),
                        5 => tile::<C, $rows, 5>(a, stride, depth, b, strides, sums, width),
                        _ => tile::<C, $rows, 4>(a, stride, depth, b, strides, sums, width),
                    }
                };
            }
            lane += match rows - row {
                1 => tile!(1),
                2 => tile!(2),
                3 => tile!(3),
                _ => tile!(ROWS),
            };
        }
    }
}

/// One row costs the reading of `b`, which is walked along as it lies in memory: 16 lanes at every depth and then the
/// next 16 where lanes lie apart, else all lanes there are, or 128, at one depth and then at the next.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn row_sums<C: WidenPairs>(
    a: &[Pair],
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    ahead: &Ahead<[C; 2]>,
) {
    let are_apart = strides[1] > strides[0];
    let mut vector = 0;
    while vector < sums.len() / 16 {
        let (b, sums) = (&b[vector * strides[1]..], &mut sums[vector * 16..]);
        vector += match sums.len() / 16 {
            _ if are_apart => walk::<C, 1, 4>(a, depth, b, strides, sums, ahead),
            // No published model has wider heads.
            8.. => walk::<C, 8, 1>(a, depth, b, strides, sums, ahead),
            7 => walk::<C, 7, 1>(a, depth, b, strides, sums, ahead),
            6 => walk::<C, 6, 2>(a, depth, b, strides, sums, ahead),
            5 => walk::<C, 5, 2>(a, depth, b, strides, sums, ahead),
            4 => walk::<C, 4, 2>(a, depth, b, strides, sums, ahead),
            3 => walk::<C, 3, 2>(a, depth, b, strides, sums, ahead),
            2 => walk::<C, 2, 4>(a, depth, b, strides, sums, ahead),
            _ => walk::<C, 1, 4>(a, depth, b, strides, sums, ahead),
        };
    }
}

/// V vectors of 16 lanes of one row, with a sum of their own for each of U depths side by side, so that none waits for
/// the one before; gives V.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn walk<C: WidenPairs, const V: usize, const U: usize>(
    a: &[Pair],
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    ahead: &Ahead<[C; 2]>,
) -> usize {
    assert!(depth > 0 && a.len() >= depth && sums.len() >= V * 16);
    assert!(b.len() >= (depth - 1) * strides[0] + (V - 1) * strides[1] + 16);
    let mut acc = [[_mm512_setzero_si512(); V]; U];
    let add = |acc: &mut [__m512i; V], k: usize| {
        // SAFETY: a[k] lies in the slice (asserted above); a pair is 32 bits.
        let a = _mm512_set1_epi32(unsafe { a.as_ptr().add(k).cast::<i32>().read_unaligned() });
        for (v, acc) in acc.iter_mut().enumerate() {
            // SAFETY: V vectors of b[k] lie in the slice (asserted above).
            *acc = _mm512_dpwssd_epi32(*acc, a, unsafe { C::load(b.as_ptr().add(k * strides[0] + v * strides[1])) });
        }
    };
    let whole = depth / U * U;
    for k in (0..whole).step_by(U) {
        ahead.prefetch(b[k * strides[0]..].as_ptr(), U * V * 16);
        acc.iter_mut().enumerate().for_each(|(u, acc)| add(acc, k + u));
    }
    for k in whole..depth {
        add(&mut acc[0], k);
    }
    for v in 0..V {
        let sum = acc.iter().fold(_mm512_setzero_si512(), |sum, acc| _mm512_add_epi32(sum, acc[v]));
        // SAFETY: the sums lie in the slice (asserted above).
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(v * 16).cast(), sum) };
    }
    V
}

/// R rows by V vectors of 16 lanes; gives the number of lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn tile<C: WidenPairs, const R: usize, const V: usize>(
    a: &[Pair],
    stride: usize,
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
) -> usize {
    assert!(depth > 0 && a.len() >= (R - 1) * stride + depth && sums.len() >= (R - 1) * width + V * 16);
    assert!(b.len() >= (depth - 1) * strides[0] + (V - 1) * strides[1] + 16);
    let mut acc = [[_mm512_setzero_si512(); V]; R];
    for k in 0..depth {
        let vectors: [__m512i; V] = std::array::from_fn(|v| {
            // SAFETY: V vectors of b[k] lie in the slice (asserted above).
            unsafe { C::load(b.as_ptr().add(k * strides[0] + v * strides[1])) }
        });
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: a[r, k] lies in the slice (asserted above); a pair is 32 bits.
            let a = _mm512_set1_epi32(unsafe { a.as_ptr().add(r * stride + k).cast::<i32>().read_unaligned() });
            for (acc, vector) in acc.iter_mut().zip(vectors) {
                *acc = _mm512_dpwssd_epi32(*acc, a, vector);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: the sums lie in the slice (asserted above).
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(r * width + v * 16).cast(), acc) };
        }
    }
    V * 16
}
