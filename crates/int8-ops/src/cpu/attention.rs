//! Attention of queries over cached keys and values, without a matrix of scores in memory.
//!
//! Keys are looked at in blocks of 64 at fixed positions; a query keeps the largest score so far, the
//! sum of its weights and their sum of values, and rescales the last two when the largest grows
//! (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135). What a query
//! gets is the same bit for bit whatever other queries are worked on beside it.

use half::f16;

use super::{Kernels, OuterSum, team};

/// Keys whose scores are worked on at a time.
pub(crate) const KEYS_PER_BLOCK: usize = 64;
/// Keys that lie side by side in the cache: the lanes of the widest vector.
pub(crate) const LANES: usize = 16;
/// Queries of one head that a thread works on at a time, so that a block of keys and values serves
/// several while it is in the nearest cache.
const QUERIES_PER_UNIT: usize = 48;
/// Queries from which a block of keys and values is worth widening once for all of them.
const MANY_QUERIES: usize = 12;
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

/// The keys and values that a layer has cached.
#[derive(Clone, Copy)]
pub(crate) struct Cached<'a, T> {
    /// (batch, heads, capacity / LANES, head_dim, LANES).
    pub(crate) keys: &'a [T],
    /// (batch, heads, capacity, padded head_dim), the padding zero.
    pub(crate) values: &'a [T],
    pub(crate) capacity: usize,
    /// Tokens before the first query.
    pub(crate) past: usize,
}

/// What keys and values are cached in.
pub(crate) trait CacheValue: Copy + Send + Sync {
    /// The kernel that works on it.
    fn outer(kernels: &Kernels) -> OuterSum<Self>;

    /// The values in f32, written to `room` where they are narrower.
    fn widened<'a>(kernels: &Kernels, values: &'a [Self], room: &'a mut Vec<f32>) -> &'a [f32];

    /// Writes f32 values as this.
    fn narrow(kernels: &Kernels, values: &[f32], out: &mut [Self]);
}

impl CacheValue for f32 {
    fn outer(kernels: &Kernels) -> OuterSum<Self> {
        kernels.f32_outer
    }

    fn widened<'a>(_kernels: &Kernels, values: &'a [Self], _room: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }

    fn narrow(_kernels: &Kernels, values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }
}

impl CacheValue for f16 {
    fn outer(kernels: &Kernels) -> OuterSum<Self> {
        kernels.f16_outer
    }

    fn widened<'a>(kernels: &Kernels, values: &'a [Self], room: &'a mut Vec<f32>) -> &'a [f32] {
        room.resize(values.len(), 0.0);
        (kernels.widen)(values, room);
        room
    }

    fn narrow(kernels: &Kernels, values: &[f32], out: &mut [Self]) {
        (kernels.narrow)(values, out);
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
/// `out` (batch, tokens, heads, head_dim). ALiBi comes by a slope for each head: what is constant over
/// the keys changes no softmax, so the key's absolute position serves every query.
pub(crate) fn attend<T: CacheValue>(
    kernels: &Kernels,
    queries: &Queries,
    cached: Cached<T>,
    scale: f32,
    slopes: Option<&[f32]>,
    out: &mut [f32],
) {
    let &Queries { heads, tokens, head_dim, .. } = queries;
    let units_per_head = tokens.div_ceil(QUERIES_PER_UNIT);
    let mut units: Vec<Unit> = (0..queries.batch * heads * units_per_head)
        .map(|index| {
            let (row, first) = (index / units_per_head, index % units_per_head * QUERIES_PER_UNIT);
            Unit { batch: row / heads, head: row % heads, first, outputs: Vec::new() }
        })
        .collect();
    for (index, output) in out.chunks_mut(head_dim).enumerate() {
        let (token, head) = (index / heads, index % heads);
        let row = token / tokens * heads + head;
        units[row * units_per_head + token % tokens / QUERIES_PER_UNIT].outputs.push(output);
    }
    let products = 2 * QUERIES_PER_UNIT.min(tokens) * (cached.past + tokens) * head_dim;
    let units_per_part = (PRODUCTS_PER_PART / products.max(1)).max(1);
    let mut parts = Vec::new();
    let mut units = units.into_iter().peekable();
    while units.peek().is_some() {
        parts.push(units.by_ref().take(units_per_part).collect::<Vec<_>>());
    }
    team::for_each(parts, |units| {
        for unit in units {
            let slope = slopes.map_or(0.0, |slopes| slopes[unit.head]);
            unit.attend(kernels, queries, cached, scale, slope);
        }
    });
}

/// Some queries of one head.
struct Unit<'a> {
    batch: usize,
    head: usize,
    /// The first query's token.
    first: usize,
    /// (queries) of (head_dim).
    outputs: Vec<&'a mut [f32]>,
}

impl Unit<'_> {
    fn attend<T: CacheValue>(self, kernels: &Kernels, queries: &Queries, cached: Cached<T>, scale: f32, slope: f32) {
        let (count, head_dim) = (self.outputs.len(), queries.head_dim);
        let width = padded(head_dim);
        let row = self.batch * queries.heads + self.head;
        let keys = &cached.keys[row * cached.capacity * head_dim..][..cached.capacity * head_dim];
        let values = &cached.values[row * cached.capacity * width..][..cached.capacity * width];
        let mut scaled = vec![0f32; count * head_dim];
        let start = self.batch * queries.strides[0] + self.head * queries.strides[1];
        for (query, scaled) in scaled.chunks_mut(head_dim).enumerate() {
            let values = &queries.values[start + (self.first + query) * queries.strides[2]..][..head_dim];
            scaled.iter_mut().zip(values).for_each(|(scaled, value)| *scaled = value * scale);
        }
        let mut scores = vec![0f32; count * KEYS_PER_BLOCK];
        let mut contexts = vec![0f32; count * width];
        let mut widened = Vec::new();
        let mut softmaxes = vec![RunningSoftmax::EMPTY; count];
        let position = |query: usize| cached.past + self.first + query;
        for first_key in (0..=position(count - 1)).step_by(KEYS_PER_BLOCK) {
            // Queries before the block see nothing of it.
            let skipped = first_key.saturating_sub(position(0)).min(count - 1);
            let scores = &mut scores[skipped * KEYS_PER_BLOCK..];
            let keys = &keys[first_key * head_dim..][..KEYS_PER_BLOCK * head_dim];
            scores.fill(0.0);
            let (scaled, strides) = (&scaled[skipped * head_dim..], [LANES, LANES * head_dim]);
            outer_sum(kernels, scaled, head_dim, keys, strides, scores, KEYS_PER_BLOCK, &mut widened);
            for (query, scores) in (skipped..).zip(scores.chunks_mut(KEYS_PER_BLOCK)) {
                let seen = (position(query) + 1 - first_key).min(KEYS_PER_BLOCK);
                let shrink = (kernels.softmax_block)(scores, seen, slope, first_key, &mut softmaxes[query]);
                let context = &mut contexts[query * width..][..width];
                if shrink != 1.0 {
                    context.iter_mut().for_each(|value| *value *= shrink);
                }
            }
            let depth = (position(count - 1) + 1 - first_key).min(KEYS_PER_BLOCK);
            let values = &values[first_key * width..][..depth * width];
            let contexts = &mut contexts[skipped * width..];
            outer_sum(kernels, scores, depth, values, [width, LANES], contexts, width, &mut widened);
        }
        for ((output, context), softmax) in self.outputs.into_iter().zip(contexts.chunks(width)).zip(softmaxes) {
            output.iter_mut().zip(context).for_each(|(output, value)| *output = value / softmax.sum);
        }
    }
}

/// [`OuterSum`] with cached keys or values `b`, which are widened once where there are many rows.
#[allow(clippy::too_many_arguments)]
fn outer_sum<T: CacheValue>(
    kernels: &Kernels,
    a: &[f32],
    depth: usize,
    b: &[T],
    strides: [usize; 2],
    sums: &mut [f32],
    width: usize,
    room: &mut Vec<f32>,
) {
    match sums.len() / width {
        ..MANY_QUERIES => T::outer(kernels)(a, depth, b, strides, sums, width),
        _ => (kernels.f32_outer)(a, depth, T::widened(kernels, b, room), strides, sums, width),
    }
}
