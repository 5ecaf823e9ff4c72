//! Keys and values cached as floats: products in f32.

use half::f16;

use super::{Cache, Head, KEYS_PER_BLOCK, LANES, RunningSoftmax, padded};
use crate::cpu::{Kernels, OuterSum};

/// Queries from which a block of keys and values is worth widening once for all of them.
const MANY_QUERIES: usize = 12;

/// A layer's keys and values.
#[derive(Clone, Copy)]
pub(crate) struct FloatCache<'a, T> {
    /// (batch, heads, capacity / LANES, head_dim, LANES).
    pub(crate) keys: &'a [T],
    /// (batch, heads, capacity, padded head_dim), the padding zero.
    pub(crate) values: &'a [T],
    pub(crate) capacity: usize,
}

/// What floats keys and values are cached in.
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

/// Room for the queries of a head.
#[derive(Default)]
pub(crate) struct FloatRoom {
    /// (queries, 64).
    scores: Vec<f32>,
    /// (queries).
    softmaxes: Vec<RunningSoftmax>,
    /// A block of keys or values.
    widened: Vec<f32>,
}

impl<T: CacheValue> Cache for FloatCache<'_, T> {
    type Room = FloatRoom;

    fn attend(&self, kernels: &Kernels, head: &Head, contexts: &mut Vec<f32>, room: &mut FloatRoom) {
        let &Head { head_dim, slope, .. } = head;
        let (count, width) = (head.count(), padded(head_dim));
        let keys = &self.keys[head.row * self.capacity * head_dim..][..self.capacity * head_dim];
        let values = &self.values[head.row * self.capacity * width..][..self.capacity * width];
        let FloatRoom { scores, softmaxes, widened } = room;
        scores.resize(count * KEYS_PER_BLOCK, 0.0);
        softmaxes.clear();
        softmaxes.resize(count, RunningSoftmax::EMPTY);
        contexts.clear();
        contexts.resize(count * width, 0.0);
        let last = head.position + count - 1;
        for first_key in (0..=last).step_by(KEYS_PER_BLOCK) {
            // Queries before the block see nothing of it.
            let skipped = first_key.saturating_sub(head.position);
            let scores = &mut scores[skipped * KEYS_PER_BLOCK..];
            let keys = &keys[first_key * head_dim..][..KEYS_PER_BLOCK * head_dim];
            scores.fill(0.0);
            let (queries, strides) = (&head.queries[skipped * head_dim..], [LANES, LANES * head_dim]);
            outer_sum(kernels, queries, head_dim, keys, strides, scores, KEYS_PER_BLOCK, widened);
            for (query, scores) in (skipped..).zip(scores.chunks_mut(KEYS_PER_BLOCK)) {
                let seen = (head.position + query + 1 - first_key).min(KEYS_PER_BLOCK);
                let shrink = (kernels.softmax_block)(scores, seen, slope, first_key, &mut softmaxes[query]);
                let context = &mut contexts[query * width..][..width];
                if shrink != 1.0 {
                    context.iter_mut().for_each(|value| *value *= shrink);
                }
            }
            let depth = (last + 1 - first_key).min(KEYS_PER_BLOCK);
            let values = &values[first_key * width..][..depth * width];
            let contexts = &mut contexts[skipped * width..];
            outer_sum(kernels, scores, depth, values, [width, LANES], contexts, width, widened);
        }
        for (context, softmax) in contexts.chunks_mut(width).zip(&*softmaxes) {
            context.iter_mut().for_each(|value| *value /= softmax.sum);
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
