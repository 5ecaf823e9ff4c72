//! Keys and values cached as integers with a scale for each head's key and value: products in integers, twice
//! as many an instruction as in f32, and the same bit for bit on every instruction set.
//!
//! A sum of products must fit 32 bits, so codes are bounded by what a sum of them can be. Queries and
//! keys have a norm of 32,767, so that their product is at most 2^30. In a block of 64 keys the weights
//! have a norm of 32,767 and a value's codes are at most 8,191: a sum is at most 32,767 * 8,191 * 8, just
//! below 2^31. For 64 normally distributed features that is a third (keys) and a half (values) of the
//! rounding error of f16. Errors are of the size of the largest feature, in keys of all: where one is ten
//! times the others, those are as exact as in f16, and beyond that less. Codes of 8 bits are at most 127; they
//! are widened as they are read, and queries and weights are in 16 bits with them too.

use std::f32::consts::LOG2_E;
use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;

use super::{Cache, Head, KEYS_PER_BLOCK, LANES, padded};
use crate::MAX_CODE;
use crate::cpu::tiles::prefetch;
use crate::cpu::{Kernels, PairSums};

/// Codes of two features of a key or query, or of one feature of two values that follow one another: what
/// an instruction multiplies and sums.
pub type Pair = [i16; 2];

/// What codes are bounded by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// A norm of 32,767: queries, and keys in 16 bits.
    Norm,
    /// A magnitude of 8,191: values in 16 bits.
    Magnitude,
    /// A magnitude of 127: keys and values in 8 bits.
    Byte,
}

/// A code of a cached key or value.
pub(crate) trait CacheCode: Pod + Sync {
    /// What the codes of a key are bounded by.
    const KEY: Bound;
    /// What the codes of a value are bounded by.
    const VALUE: Bound;

    /// The code, which is within its bound.
    fn of(code: i16) -> Self;

    /// The largest norm of the codes of a key.
    fn key_norm(head_dim: usize) -> f32;

    /// The kernel that works on pairs of it.
    fn pair_sums(kernels: &Kernels) -> PairSums<Self>;
}

impl CacheCode for i16 {
    const KEY: Bound = Bound::Norm;
    const VALUE: Bound = Bound::Magnitude;

    fn of(code: i16) -> Self {
        code
    }

    fn key_norm(_head_dim: usize) -> f32 {
        CODE_NORM
    }

    fn pair_sums(kernels: &Kernels) -> PairSums<Self> {
        kernels.pair_sums
    }
}

impl CacheCode for i8 {
    const KEY: Bound = Bound::Byte;
    const VALUE: Bound = Bound::Byte;

    fn of(code: i16) -> Self {
        code as i8
    }

    fn key_norm(head_dim: usize) -> f32 {
        MAX_CODE * (head_dim as f32).sqrt()
    }

    fn pair_sums(kernels: &Kernels) -> PairSums<Self> {
        kernels.byte_pair_sums
    }
}

/// The norm of a key's, a query's or a block of weights' codes.
pub(crate) const CODE_NORM: f32 = 32_767.0;
/// The largest code of a value.
pub(crate) const LARGEST_VALUE_CODE: f32 = 8_191.0;
/// Keys, values and queries beyond it count as it, far from where squares overflow.
pub(crate) const LARGEST: f32 = 16_777_216.0;

/// A layer's keys and values in codes of one width. Those of 64 tokens are a record: the 64 scales, as the bits of
/// f32, and then pairs of codes.
#[derive(Clone, Copy)]
pub(crate) struct IntegerCache<'a, C> {
    /// (batch, heads, blocks) records (4, pairs of features, 16 keys).
    keys: &'a [u32],
    /// (batch, heads, blocks) records (32 pairs of values, padded head_dim).
    values: &'a [u32],
    blocks: usize,
    code: PhantomData<C>,
}

impl<'a, C> IntegerCache<'a, C> {
    pub(crate) fn new(keys: &'a [u32], values: &'a [u32], blocks: usize) -> Self {
        Self { keys, values, blocks, code: PhantomData }
    }
}

impl<C: CacheCode> IntegerCache<'_, C> {
    /// Where the codes of the first `count` keys of a block lie, in whole groups, and those of their values, in whole
    /// pairs; there may be no such block.
    fn codes_of(&self, index: usize, count: usize, head_dim: usize) -> [Range<*const [C; 2]>; 2] {
        let codes = |records: &[u32], record: usize, pairs: usize| {
            let start = records.as_ptr().wrapping_add(index * record + KEYS_PER_BLOCK).cast::<[C; 2]>();
            start..start.wrapping_add(pairs)
        };
        let keys = count.next_multiple_of(LANES) * head_dim.div_ceil(2);
        let values = count.div_ceil(2) * padded(head_dim);
        [codes(self.keys, key_record::<C>(head_dim), keys), codes(self.values, value_record::<C>(head_dim), values)]
    }
}

/// The length of a record of keys.
pub(crate) fn key_record<C: CacheCode>(head_dim: usize) -> usize {
    KEYS_PER_BLOCK + KEYS_PER_BLOCK * head_dim.div_ceil(2) * size_of::<[C; 2]>() / size_of::<u32>()
}

/// The length of a record of values.
pub(crate) fn value_record<C: CacheCode>(head_dim: usize) -> usize {
    KEYS_PER_BLOCK + KEYS_PER_BLOCK / 2 * padded(head_dim) * size_of::<[C; 2]>() / size_of::<u32>()
}

/// A record's scales and pairs.
fn parts<C: CacheCode>(record: &[u32]) -> (&[f32; KEYS_PER_BLOCK], &[[C; 2]]) {
    let (scales, pairs) = record.split_at(KEYS_PER_BLOCK);
    let scales = bytemuck::cast_slice(scales).first_chunk().expect("64 scales");
    (scales, bytemuck::cast_slice::<u32, C>(pairs).as_chunks().0)
}

/// A record's scales, as bits, and pairs.
fn parts_mut<C: CacheCode>(record: &mut [u32]) -> (&mut [u32], &mut [[C; 2]]) {
    let (scales, pairs) = record.split_at_mut(KEYS_PER_BLOCK);
    (scales, bytemuck::cast_slice_mut::<u32, C>(pairs).as_chunks_mut().0)
}

/// Asks for the scales that lie before a record's codes to be brought to the cache; there may be none.
fn prefetch_scales<T>(codes: *const T) {
    (1..=KEYS_PER_BLOCK / LANES).for_each(|line| prefetch(codes.wrapping_byte_sub(64 * line)));
}

/// Writes a key (head_dim) as one of its block's, the `index`-th, to the block's record; `codes` is room
/// for as many, in pairs. Gives where in the record its codes lie, spread over it.
pub(crate) fn write_key<C: CacheCode>(
    kernels: &Kernels,
    key: &[f32],
    index: usize,
    record: &mut [u32],
    codes: &mut [Pair],
) -> Range<usize> {
    let (scales, pairs) = parts_mut::<C>(record);
    scales[index] = (kernels.int16_codes)(key, C::KEY, &mut codes.as_flattened_mut()[..key.len()]).to_bits();
    let first = index / LANES * codes.len() * LANES;
    let places = pairs[first + index % LANES..].iter_mut().step_by(LANES);
    for (pair, place) in codes.iter().zip(places) {
        *place = pair.map(C::of);
    }
    place_in_record::<C>(first..first + codes.len() * LANES)
}

/// Where pairs lie in their record.
fn place_in_record<C>(pairs: Range<usize>) -> Range<usize> {
    let place = |pair: usize| KEYS_PER_BLOCK + pair * size_of::<[C; 2]>() / size_of::<u32>();
    place(pairs.start)..place(pairs.end)
}

/// Writes a value (head_dim) as one of its block's, the `index`-th, to the block's record; `codes` is room
/// for as many, in pairs. Gives where in the record its codes lie.
pub(crate) fn write_value<C: CacheCode>(
    kernels: &Kernels,
    value: &[f32],
    index: usize,
    record: &mut [u32],
    codes: &mut [Pair],
) -> Range<usize> {
    let (scales, pairs) = parts_mut::<C>(record);
    let codes = &mut codes.as_flattened_mut()[..value.len()];
    scales[index] = (kernels.int16_codes)(value, C::VALUE, codes).to_bits();
    let first = index / 2 * padded(value.len());
    for (pair, code) in pairs[first..].iter_mut().zip(codes) {
        pair[index % 2] = C::of(*code);
    }
    place_in_record::<C>(first..first + padded(value.len()))
}

/// What a block's codes are multiplied by.
#[derive(Debug, Clone, Copy)]
pub struct BlockScales<'a> {
    /// (64): the keys' scales.
    pub keys: &'a [f32; KEYS_PER_BLOCK],
    /// (64): the values' scales, times a power of two that keeps squares of weights from underflow.
    pub values: &'a [f32; KEYS_PER_BLOCK],
    /// (64): ALiBi's slope, times log2 e, by the number of keys that come before in the block.
    pub biases: &'a [f32; KEYS_PER_BLOCK],
}

/// A query on its way through the blocks.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    /// What turns the query's codes back into floats, times log2 e: weights are powers of two.
    pub scale: f32,
    /// What the logarithm of a weight may be below that of the largest and still count.
    pub negligible: f32,
    /// The largest score so far.
    pub max: f32,
    /// The sum of the weights so far, yet to be added up.
    pub sums: [f32; LANES],
    /// ALiBi's slope, times log2 e, by the position of the block's first key less that of the query.
    pub bias: f32,
    /// How many of the block's keys the query sees.
    pub seen: usize,
    /// What the sums of earlier blocks are to be multiplied by.
    pub shrink: f32,
    /// What turns the codes of the block's weights back into floats.
    pub code_scale: f32,
}

/// 2^40: values' scales times it are squared together with weights down to 1e-16.
const LIFT: f32 = (1u64 << 40) as f32;

/// Weights that are together below 2^-28 of the largest are lost in the rounding of a sum of weights in f32, and
/// their values in that of the cache unless they are some thousand times as large.
const NEGLIGIBLE: f32 = -28.0;

impl Query {
    /// One that sees so many keys.
    fn new(scale: f32, keys: usize) -> Self {
        let negligible = NEGLIGIBLE - (keys as f32).log2();
        Self {
            scale,
            negligible,
            max: f32::NEG_INFINITY,
            sums: [0.0; LANES],
            bias: 0.0,
            seen: 0,
            shrink: 1.0,
            code_scale: 0.0,
        }
    }

    /// Whether none of a block's weights can make a difference: by the Cauchy-Schwarz inequality a score is at most
    /// the product of the norms, and ALiBi's part at most that of the block's first key and `largest_bias`.
    fn can_skip(&self, longest_key: f32, largest_bias: f32) -> bool {
        let largest = self.scale * CODE_NORM * longest_key + (self.bias + largest_bias);
        largest - self.max < self.negligible
    }
}

/// Room for the queries of a head.
#[derive(Default)]
pub(crate) struct IntegerRoom {
    /// (queries, pairs of features): the other half of an odd head's last pair stays zero.
    codes: Vec<Pair>,
    /// (queries).
    queries: Vec<Query>,
    /// (queries, 64) for a block of keys, (queries, padded head_dim) for one of values.
    sums: Vec<i32>,
    /// (queries, 64).
    weights: Vec<[f32; KEYS_PER_BLOCK]>,
    /// (queries, 64).
    weight_codes: Vec<[i16; KEYS_PER_BLOCK]>,
}

impl<C: CacheCode> Cache for IntegerCache<'_, C> {
    type Room = IntegerRoom;

    /// The nearest block comes first: with ALiBi the others often need not be read.
    fn attend(&self, kernels: &Kernels, head: &Head, contexts: &mut Vec<f32>, room: &mut IntegerRoom) {
        let (count, width, depth) = (head.count(), padded(head.head_dim), head.head_dim.div_ceil(2));
        let slope = head.slope * LOG2_E;
        let IntegerRoom { codes, queries, sums, weights, weight_codes } = room;
        codes.resize(count * depth, Pair::default());
        queries.clear();
        let values = head.queries.chunks(head.head_dim).zip(codes.chunks_mut(depth));
        for (position, (query, codes)) in (head.position..).zip(values) {
            let codes = &mut bytemuck::cast_slice_mut(codes)[..query.len()];
            let scale = (kernels.int16_codes)(query, Bound::Norm, codes) * LOG2_E;
            queries.push(Query::new(scale, position + 1));
        }
        let biases = &std::array::from_fn(|key| slope * key as f32);
        let largest_bias = biases[0].max(biases[KEYS_PER_BLOCK - 1]);
        sums.resize(count * KEYS_PER_BLOCK.max(width), 0);
        weights.resize(count, [0.0; KEYS_PER_BLOCK]);
        weight_codes.resize(count, [0; KEYS_PER_BLOCK]);
        contexts.clear();
        contexts.resize(count * width, 0.0);
        let pair_sums = C::pair_sums(kernels);
        let last = head.position + count - 1;
        let last_block = last / KEYS_PER_BLOCK;
        // Of a record and its block: the block before comes next, and after the first one, where there is one token, the
        // last of the next head.
        let following = |(index, block): (usize, usize)| match block {
            0 => (index + self.blocks + last_block, last_block),
            _ => (index - 1, block - 1),
        };
        let pieces_of = |(index, block): (usize, usize)| {
            let count = if block == last_block { last % KEYS_PER_BLOCK + 1 } else { KEYS_PER_BLOCK };
            self.codes_of(index, count, head.head_dim)
        };
        for block in (0..=last_block).rev() {
            let (first_key, index) = (block * KEYS_PER_BLOCK, head.row * self.blocks + block);
            let (key_record, value_record) = (key_record::<C>(head.head_dim), value_record::<C>(head.head_dim));
            let (key_scales, keys) = parts::<C>(&self.keys[index * key_record..][..key_record]);
            // NaN comes out as itself, and is never skipped.
            let longest_key = (kernels.absmax)(key_scales, None) * C::key_norm(head.head_dim);
            for (position, query) in (head.position..).zip(&mut *queries) {
                query.bias = slope * (first_key as i32 - position as i32) as f32;
                query.seen = (position + 1).saturating_sub(first_key).min(KEYS_PER_BLOCK);
                // Never its own block, which comes first; all keys of those before are written, so it is the same
                // who asks when.
                if query.can_skip(longest_key, largest_bias) {
                    query.seen = 0;
                }
            }
            let Some(first) = queries.iter().position(|query| query.seen > 0) else { continue };
            let end = queries.iter().rposition(|query| query.seen > 0).map_or(count, |last| last + 1);
            let (queries, codes) = (&mut queries[first..end], &codes[first * depth..end * depth]);
            let most_seen = queries.iter().map(|query| query.seen).max().unwrap_or_default();
            let scores = &mut sums[..queries.len() * KEYS_PER_BLOCK];
            // What one token reads next: pieces may be shorter than it asks ahead.
            let (here, then) = ((index, block), following((index, block)));
            let ([_, here_values], [then_keys, then_values]) = (pieces_of(here), pieces_of(then));
            prefetch_scales(then_keys.start);
            prefetch_scales(then_values.start);
            let [keys_after, _] = pieces_of(following(then));
            let next = [here_values, then_keys, then_values, keys_after];
            let (lanes, pairs) = (most_seen.next_multiple_of(LANES), most_seen.div_ceil(2));
            let (value_scales, values) = parts::<C>(&self.values[index * value_record..][..value_record]);
            let (keys, values) = (&keys[..lanes * depth], &values[..pairs * width]);
            let strides = [LANES, LANES * depth];
            pair_sums(codes, depth, keys, strides, scores, KEYS_PER_BLOCK, lanes, &next[..3]);
            let scales = BlockScales { keys: key_scales, values: &value_scales.map(|scale| scale * LIFT), biases };
            let weight_codes = &mut weight_codes[..queries.len()];
            (kernels.softmax_codes)(scores.as_chunks().0, &scales, queries, weights, weight_codes);
            let weight_codes: &[Pair] = bytemuck::cast_slice(weight_codes);
            let sums = &mut sums[..queries.len() * width];
            pair_sums(weight_codes, pairs, values, [width, LANES], sums, width, width, &next[1..]);
            for ((context, sums), query) in
                contexts[first * width..].chunks_mut(width).zip(sums.chunks(width)).zip(queries)
            {
                (kernels.shrink_and_add)(context, query.shrink, sums, query.code_scale / LIFT);
            }
        }
        for (context, query) in contexts.chunks_mut(width).zip(&*queries) {
            let sum: f32 = query.sums.iter().sum();
            context.iter_mut().for_each(|value| *value /= sum);
        }
    }
}
