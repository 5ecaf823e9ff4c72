//! Attention of queries over cached keys and values, without a matrix of scores in memory.
//!
//! Keys are looked at in blocks of 64 at fixed positions; a query keeps the largest score so far, the
//! sum of its weights and their sum of values, and rescales the last two when the largest grows
//! (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135). What a query
//! gets is the same bit for bit whatever other queries are worked on beside it.

mod float;
mod integer;

pub(crate) use float::{CacheValue, FloatCache};
pub use integer::{BlockScales, Bound, Pair, Query};
pub(super) use integer::{CODE_NORM, LARGEST, LARGEST_VALUE_CODE};
pub(crate) use integer::{CacheCode, IntegerCache, key_record, value_record, write_key, write_value};

use std::mem::MaybeUninit;
use std::ops::Range;

use super::places::Places;
use super::{Kernels, team};

/// Keys whose scores are worked on at a time.
pub const KEYS_PER_BLOCK: usize = 64;
/// The lanes of the widest vector.
pub(crate) const LANES: usize = 16;
/// Queries of one head that a thread works on at a time, so that a block of keys and values serves
/// several while it is in the nearest cache.
const QUERIES_PER_UNIT: usize = 48;
/// Products below which work is not worth sharing with another thread.
const PRODUCTS_PER_PART: usize = 1 << 15;

/// Queries (batch, heads, tokens, head_dim) that lie as `strides` say, each head's values side by side.
pub(crate) struct Queries<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) tokens: usize,
    pub(crate) head_dim: usize,
    /// From one batch entry, head and token to the next.
    pub(crate) strides: [usize; 3],
}

/// The keys and values that a layer has cached, in one of the forms that they are cached in.
pub(crate) trait Cache: Copy + Sync {
    /// What it works in, from one head to the next.
    type Room: Default;

    /// softmax(q k^T + slope * key position) v over the keys up to each query's own position becomes `contexts`
    /// (queries, padded head_dim).
    fn attend(&self, kernels: &Kernels, head: &Head, contexts: &mut Vec<f32>, room: &mut Self::Room);
}

/// Some queries of one head that follow one another.
pub(crate) struct Head<'a> {
    /// Which of the cache's (batch, heads).
    pub(crate) row: usize,
    /// (queries, head_dim), times what scores are scaled by.
    pub(crate) queries: &'a [f32],
    pub(crate) head_dim: usize,
    /// Of the first query: the number of keys before its own.
    pub(crate) position: usize,
    /// ALiBi's; 0 without.
    pub(crate) slope: f32,
}

impl Head<'_> {
    fn count(&self) -> usize {
        self.queries.len() / self.head_dim
    }
}

/// A softmax that sees its scores block by block.
#[derive(Debug, Clone, Copy)]
pub struct RunningSoftmax {
    /// The largest score so far.
    pub max: f32,
    /// The sum of the weights so far, `exp(score - max)` each.
    pub sum: f32,
}

impl RunningSoftmax {
    /// Of no scores yet.
    pub const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

/// The length of a value in the cache: whole vectors.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// softmax(scale * q k^T + slope * key position) v over the keys up to each query's own position, into
/// `out` (batch, tokens, heads, head_dim), all of which it writes; `past` tokens come before the first
/// query. ALiBi comes by a slope for each head: what is constant over the keys changes no softmax, so the
/// key's absolute position serves every query.
pub(crate) fn attend(
    kernels: &Kernels,
    queries: &Queries,
    cache: impl Cache,
    past: usize,
    scale: f32,
    slopes: Option<&[f32]>,
    out: &mut [MaybeUninit<f32>],
) {
    let &Queries { heads, tokens, head_dim, .. } = queries;
    assert_eq!(out.len(), queries.batch * tokens * heads * head_dim);
    let units_per_head = tokens.div_ceil(QUERIES_PER_UNIT);
    let products = 2 * QUERIES_PER_UNIT.min(tokens) * (past + tokens) * head_dim;
    let units_per_part = (PRODUCTS_PER_PART / products.max(1)).max(1);
    let out = Places::new(out);
    team::for_each_range(queries.batch * heads * units_per_head, units_per_part, |units| {
        let (mut scaled, mut contexts, mut room) = (Vec::new(), Vec::new(), Default::default());
        for unit in units {
            let (row, first) = (unit / units_per_head, unit % units_per_head * QUERIES_PER_UNIT);
            let (sequence, head) = (row / heads, row % heads);
            let of_unit = first..tokens.min(first + QUERIES_PER_UNIT);
            queries.scale(row, of_unit.clone(), scale, &mut scaled);
            let slope = slopes.map_or(0.0, |slopes| slopes[head]);
            cache.attend(
                kernels,
                &Head { row, queries: &scaled, head_dim, position: past + first, slope },
                &mut contexts,
                &mut room,
            );
            assert_eq!(contexts.len(), of_unit.len() * padded(head_dim));
            for (token, context) in of_unit.zip(contexts.chunks(padded(head_dim))) {
                let place = ((sequence * tokens + token) * heads + head) * head_dim;
                // SAFETY: a head's place for a token belongs to one unit.
                unsafe { out.take(place..place + head_dim) }.write_copy_of_slice(&context[..head_dim]);
            }
        }
    });
}

impl Queries<'_> {
    /// Puts the queries (tokens, head_dim) of one of (batch, heads), times `scale`, into `scaled`.
    fn scale(&self, row: usize, tokens: Range<usize>, scale: f32, scaled: &mut Vec<f32>) {
        let start = row / self.heads * self.strides[0] + row % self.heads * self.strides[1];
        scaled.clear();
        for token in tokens {
            let query = &self.values[start + token * self.strides[2]..][..self.head_dim];
            scaled.extend(query.iter().map(|value| value * scale));
        }
    }
}
