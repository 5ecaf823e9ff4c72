//! The walk over a block of outputs that every vector kernel shares, and asking memory for what comes next.

use std::ops::Range;

/// Calls `tile::<T, R>(x, weight, cols, sums, stride)` so as to fill sums (tokens, weight rows) from
/// x (tokens, cols) and a weight (rows, cols): T tokens by R rows while there are as many, then
/// single rows, and single tokens at the end.
///
/// A sum is made the same way in every tile, so it does not depend on what else is in the block.
/// A macro, because a function pointer or a closure would keep the tile out of its caller's
/// instruction set.
macro_rules! for_each_tile {
    ($tile:ident::<$tokens:literal, $rows:literal $(, $weight_type:ident)?>($x:ident, $weight:ident, $cols:ident, $sums:ident)) => {
        let stride = $weight.len() / $cols;
        for (x, sums) in $x.chunks($tokens * $cols).zip($sums.chunks_mut($tokens * stride)) {
            let full = x.len() == $tokens * $cols;
            let mut row = 0;
            while row < stride {
                let weight = &$weight[row * $cols..];
                let many = stride - row >= $rows;
                if full && many {
                    $tile::<$tokens, $rows $(, $weight_type)?>(x, weight, $cols, &mut sums[row..], stride);
                } else if full {
                    $tile::<$tokens, 1 $(, $weight_type)?>(x, weight, $cols, &mut sums[row..], stride);
                } else {
                    for (x, sums) in x.chunks($cols).zip(sums.chunks_mut(stride)) {
                        if many {
                            $tile::<1, $rows $(, $weight_type)?>(x, weight, $cols, &mut sums[row..], stride);
                        } else {
                            $tile::<1, 1 $(, $weight_type)?>(x, weight, $cols, &mut sums[row..], stride);
                        }
                    }
                }
                row += if many { $rows } else { 1 };
            }
        }
    };
}

pub(super) use for_each_tile;

/// Tokens from which a layer costs its products and no longer the reading of its weight. With fewer, the
/// weight is read where it lies, a row or few at a time, as memory likes it best.
pub(super) const MANY_TOKENS: usize = 12;
/// How far ahead of its use a weight is brought to the second cache, in bytes.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8192;

/// Asks for the weight some way after `weight` to be brought to the second cache.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn prefetch_after<T>(weight: *const T) {
    prefetch(weight.cast::<i8>().wrapping_add(AHEAD));
}

/// What is brought to the caches while a piece of memory is walked along: the rest of it, and then the next pieces.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused))]
pub(super) struct Ahead<'a, T> {
    end: *const T,
    next: &'a [Range<*const T>],
}

#[cfg_attr(not(target_arch = "x86_64"), allow(unused))]
impl<'a, T> Ahead<'a, T> {
    /// Bytes to be ahead: as much as is on its way from memory at a time, and while there is something else to do.
    const BYTES: usize = 6144;

    /// The pieces in `next` need not exist.
    pub(super) fn new(piece: &[T], next: &'a [Range<*const T>]) -> Self {
        Self { end: piece.as_ptr_range().end, next }
    }

    /// Asks for what comes some way after the first `count` from `place` on: to the second cache, and, as a processor
    /// that has enough on its way takes no notice of a hint, once more to the nearest one when it is closer.
    #[inline(always)]
    pub(super) fn prefetch(&self, place: *const T, count: usize) {
        let lines = (0..count * size_of::<T>()).step_by(64);
        let (far, near) = (self.after(place, Self::BYTES), self.after(place, Self::BYTES / 2));
        lines.clone().for_each(|byte| prefetch(far.wrapping_byte_add(byte)));
        lines.for_each(|byte| prefetch_near(near.wrapping_byte_add(byte)));
    }

    /// What comes so many bytes after `place`, in this piece or the next ones; `place` where that is not known.
    #[inline(always)]
    fn after(&self, place: *const T, bytes: usize) -> *const T {
        let after = place.wrapping_byte_add(bytes);
        let mut beyond = (after as usize).wrapping_sub(self.end as usize) as isize;
        if beyond < 0 {
            return after;
        }
        for next in self.next {
            let len = (next.end as usize).wrapping_sub(next.start as usize) as isize;
            if beyond < len {
                return next.start.wrapping_byte_offset(beyond);
            }
            beyond -= len;
        }
        place
    }
}

/// Asks for the cache line at `place` to be brought to the second cache, where the machine can be asked.
#[inline(always)]
pub(super) fn prefetch<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint reads and writes nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// The same to the nearest cache.
#[inline(always)]
pub(crate) fn prefetch_near<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint reads and writes nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// `Σ codes * weight` by a plain loop: over the columns after a row's last whole vector.
#[inline(always)]
pub(super) fn int8_tail(codes: &[i8], weight: &[i8]) -> i32 {
    codes.iter().zip(weight).map(|(&code, &weight)| i32::from(code) * i32::from(weight)).sum()
}

/// `Σ x * weight` over the columns after a row's last whole vector.
#[inline(always)]
pub(super) fn float_tail<W: Copy + Into<f32>>(x: &[f32], weight: &[W]) -> f32 {
    x.iter().zip(weight).map(|(&x, &weight)| x * weight.into()).sum()
}
