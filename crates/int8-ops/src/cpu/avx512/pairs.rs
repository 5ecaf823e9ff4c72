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
    next: Range<*const [C; 2]>,
) {
    let ahead = Ahead::new(b, next);
    let rows = sums.len() / width;
    let stride = a.len() / rows;
    // Where lanes lie apart, one row takes vector after vector, as memory likes it best.
    let are_apart = strides[1] > 16 && rows == 1;
    for row in (0..rows).step_by(6) {
        let a = &a[row * stride..];
        let mut lane = 0;
        while lane < lanes {
            let (b, sums) = (&b[lane / 16 * strides[1]..], &mut sums[row * width + lane..]);
            macro_rules! tile {
                ($rows:literal) => {
                    if lanes - lane >= 64 && !are_apart {
                        tile::<C, $rows, 4>(a, stride, depth, b, strides, sums, width, &ahead)
                    } else {
                        tile::<C, $rows, 1>(a, stride, depth, b, strides, sums, width, &ahead)
                    }
                };
            }
            lane += match rows - row {
                1 => tile!(1),
                2 => tile!(2),
                3 => tile!(3),
                4 => tile!(4),
                5 => tile!(5),
                _ => tile!(6),
            };
        }
    }
}

/// R rows by V vectors of 16 lanes; gives the number of lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[expect(clippy::too_many_arguments)]
fn tile<C: WidenPairs, const R: usize, const V: usize>(
    a: &[Pair],
    stride: usize,
    depth: usize,
    b: &[[C; 2]],
    strides: [usize; 2],
    sums: &mut [i32],
    width: usize,
    ahead: &Ahead<[C; 2]>,
) -> usize {
    assert!(depth > 0 && a.len() >= (R - 1) * stride + depth && sums.len() >= (R - 1) * width + V * 16);
    assert!(b.len() >= (depth - 1) * strides[0] + (V - 1) * strides[1] + 16);
    let mut acc = [[_mm512_setzero_si512(); V]; R];
    for k in 0..depth {
        let vectors: [__m512i; V] = std::array::from_fn(|v| {
            // SAFETY: V vectors of b[k] lie in the slice (asserted above).
            let place = unsafe { b.as_ptr().add(k * strides[0] + v * strides[1]) };
            if R == 1 && Ahead::<[C; 2]>::is_due(k * V + v) {
                ahead.prefetch(place);
            }
            // SAFETY: as above.
            unsafe { C::load(place) }
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
