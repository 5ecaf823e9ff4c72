use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};
use int8_ops::{AttentionCache, CacheDtype, attention};
use kernels_on_host::Arg;

use super::support::{Float, floats, launch, tensor};

/// What is asked of attention: queries of `tokens` after `past` others.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    heads: usize,
    head_dim: usize,
    past: usize,
    tokens: usize,
    has_slopes: bool,
    seed: u32,
}

const CASE: Case = Case { batch: 1, heads: 1, head_dim: 16, past: 0, tokens: 1, has_slopes: true, seed: 7 };

impl Case {
    fn total(&self) -> usize {
        self.past + self.tokens
    }

    /// More than is held: what follows it must not be looked at.
    fn capacity(&self) -> usize {
        self.total() + 3
    }

    /// From one batch entry, head and token to the next in BLOOM's (batch, tokens, heads, 3, head_dim).
    fn strides(&self) -> [usize; 3] {
        let token = self.heads * 3 * self.head_dim;
        [self.total() * token, 3 * self.head_dim, token]
    }

    fn slopes(&self) -> Option<Vec<f32>> {
        self.has_slopes.then(|| (0..self.heads).map(|head| 0.3 / (1 + head) as f32).collect())
    }

    fn qkv<T: Float>(&self, largest: f32) -> Vec<T> {
        let mut state = self.seed;
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * largest
        };
        floats(&(0..self.batch * self.strides()[0]).map(|_| value()).collect::<Vec<_>>())
    }
}

/// Writes all tokens to caches full of NaN, by the kernel: the past ones, then the new ones.
fn written<T: Float, C: Float>(case: &Case, qkv: &[T]) -> [Vec<C>; 2] {
    let mut caches = [0, 1].map(|_| vec![C::of(f32::NAN); case.batch * case.heads * case.capacity() * case.head_dim]);
    let [batch_stride, head_stride, token_stride] = case.strides();
    let [keys, values] = &mut caches;
    for (past, tokens) in [(0, case.past), (case.past, case.tokens)] {
        if tokens == 0 {
            continue;
        }
        let new = &qkv[past * token_stride..];
        let args = [
            new[case.head_dim..].into(),
            new[2 * case.head_dim..].into(),
            keys.as_mut_slice().into(),
            values.as_mut_slice().into(),
            case.heads.into(),
            tokens.into(),
            case.head_dim.into(),
            case.capacity().into(),
            past.into(),
            (batch_stride as i64).into(),
            (head_stride as i64).into(),
            (token_stride as i64).into(),
        ];
        let blocks = (tokens * case.heads * case.head_dim.div_ceil(8)).div_ceil(256);
        let name = format!("attention_write_{}_{}", T::SUFFIX, C::SUFFIX);
        launch(&name, [blocks, case.batch, 1], 256, 0, case.seed, &args);
    }
    caches
}

/// What the CPU makes of the case: (batch, tokens, heads * head_dim).
fn wanted<T: Float, C: Float>(case: &Case, qkv: &[T]) -> Result<Vec<f32>> {
    let qkv = tensor(qkv, &[case.batch, case.total(), case.heads, 3, case.head_dim])?;
    let part = |index: usize| qkv.narrow(3, index, 1)?.squeeze(3)?.transpose(1, 2);
    let (queries, keys, values): (Tensor, Tensor, Tensor) = (part(0)?, part(1)?, part(2)?);
    let dtype = if C::DTYPE == DType::F16 { CacheDtype::F16 } else { CacheDtype::F32 };
    let cache = AttentionCache::new(&queries, case.total(), dtype)?;
    cache.write(0, &keys, &values)?;
    let queries = queries.narrow(2, case.past, case.tokens)?;
    attention(&queries, &cache, case.past, case.slopes().as_deref())?.flatten_all()?.to_vec1()
}

/// Runs the kernel `name` of `grid` blocks; `workspace` is what follows the output among its arguments.
fn run<T: Float, C: Float>(name: &str, grid: [usize; 3], case: &Case, qkv: &[T], workspace: Option<Arg>) -> Vec<T> {
    let [keys, values] = written::<T, C>(case, qkv);
    let [batch_stride, head_stride, token_stride] = case.strides();
    let slopes = case.slopes();
    let mut out = vec![T::of(f32::NAN); case.batch * case.tokens * case.heads * case.head_dim];
    let mut args = vec![
        qkv[case.past * token_stride..].into(),
        keys.as_slice().into(),
        values.as_slice().into(),
        slopes.as_deref().map_or(Arg::NULL, Arg::from),
        out.as_mut_slice().into(),
    ];
    args.extend(workspace);
    args.extend([case.heads, case.tokens, case.head_dim, case.capacity(), case.past].map(Arg::from));
    args.push((1.0 / (case.head_dim as f32).sqrt()).into());
    args.extend([batch_stride, head_stride, token_stride].map(|stride| Arg::from(stride as i64)));
    launch(&format!("{name}_{}_{}", T::SUFFIX, C::SUFFIX), grid, 128, 0, case.seed, &args);
    out
}

/// Differences are looked at beside the largest value, and half a unit in the last place of `T` is allowed too.
fn assert_near<T: Float>(found: &[T], wanted: &[f32], tolerance: f32, case: &Case) {
    let largest = wanted.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let rounding = [("f32", 0.0), ("f16", 2f32.powi(-11)), ("bf16", 2f32.powi(-8))];
    let rounding = rounding.iter().find(|(suffix, _)| *suffix == T::SUFFIX).expect("a float").1;
    assert_eq!(found.len(), wanted.len());
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let difference = (found.float() - wanted).abs();
        let allowed = tolerance * largest + rounding * wanted.abs();
        assert!(difference <= allowed, "{case:?}: {} for {wanted} at {index} in {}", found.float(), T::SUFFIX);
    }
}

fn check_step<T: Float, C: Float>(case: &Case, splits: usize) -> Result<()> {
    let qkv = case.qkv::<T>(2.0);
    let grid = [case.batch * case.heads, splits, case.tokens.div_ceil(4)];
    let rows = case.batch * case.tokens * case.heads;
    let mut workspace = vec![f32::NAN; rows * splits * (case.head_dim + 2)];
    let given = if splits == 1 { Arg::NULL } else { workspace.as_mut_slice().into() };
    let mut out = run::<T, C>("attention_step", grid, case, &qkv, Some(given));
    if splits > 1 {
        assert!(out.iter().all(|value| value.float().is_nan()), "parts are no output");
        let args = [workspace.as_slice().into(), out.as_mut_slice().into(), case.head_dim.into(), splits.into()];
        launch(&format!("attention_combine_{}", T::SUFFIX), [rows, 1, 1], 128, 0, case.seed, &args);
    }
    assert_near(&out, &wanted::<T, C>(case, &qkv)?, 1e-5, case);
    Ok(())
}

fn check_step_of_all(case: &Case, splits: usize) -> Result<()> {
    check_step::<f32, f32>(case, splits)?;
    check_step::<f32, f16>(case, splits)?;
    check_step::<f16, f16>(case, splits)?;
    check_step::<f16, f32>(case, splits)?;
    check_step::<bf16, f16>(case, splits)?;
    check_step::<bf16, f32>(case, splits)
}

#[test]
fn a_step_over_the_cache_is_that_of_the_cpu() -> Result<()> {
    check_step_of_all(&CASE, 1)?;
    check_step_of_all(&Case { batch: 2, heads: 3, head_dim: 64, past: 70, has_slopes: false, ..CASE }, 1)?;
    check_step_of_all(&Case { batch: 2, heads: 2, head_dim: 80, past: 149, ..CASE }, 1)
}

#[test]
fn a_step_can_be_split_over_keys() -> Result<()> {
    check_step_of_all(&Case { batch: 2, heads: 2, head_dim: 128, past: 90, ..CASE }, 3)?;
    // More parts than keys: some have none.
    check_step_of_all(&Case { heads: 2, head_dim: 8, past: 4, tokens: 2, ..CASE }, 7)?;
    check_step_of_all(&Case { head_dim: 20, past: 40, tokens: 3, ..CASE }, 2)
}

#[test]
fn a_step_of_several_queries_is_causal() -> Result<()> {
    for tokens in [2, 4, 7, 8] {
        check_step::<f16, f16>(&Case { batch: 2, heads: 2, head_dim: 32, tokens, ..CASE }, 1)?;
        check_step::<f32, f32>(&Case { heads: 2, head_dim: 24, past: 45, tokens, has_slopes: false, ..CASE }, 2)?;
    }
    check_step_of_all(&Case { heads: 2, head_dim: 64, past: 9, tokens: 6, ..CASE }, 1)
}

#[test]
fn any_head_has_its_step() -> Result<()> {
    for head_dim in [1, 5, 8, 16, 20, 100, 256, 264, 300] {
        check_step::<f16, f16>(&Case { batch: 2, head_dim, past: 18, ..CASE }, 1)?;
        check_step::<f32, f32>(&Case { head_dim, past: 18, tokens: 5, ..CASE }, 2)?;
    }
    Ok(())
}

#[test]
fn a_step_does_for_a_whole_prompt() -> Result<()> {
    check_step::<f32, f32>(&Case { heads: 2, head_dim: 16, past: 9, tokens: 70, ..CASE }, 1)?;
    check_step::<bf16, f16>(&Case { heads: 2, head_dim: 20, tokens: 33, ..CASE }, 1)
}

fn check_prompt<T: Float>(case: &Case, width: usize) -> Result<()> {
    let qkv = case.qkv::<T>(1.5);
    let grid = [case.batch * case.heads, case.tokens.div_ceil(64), 1];
    let out = run::<T, f16>(&format!("attention_prompt_{width}"), grid, case, &qkv, None);
    assert_near(&out, &wanted::<T, f16>(case, &qkv)?, 2e-3, case);
    Ok(())
}

#[test]
fn a_prompt_by_tensor_cores_is_that_of_the_cpu() -> Result<()> {
    // Several tiles of queries and keys, with a tail.
    check_prompt::<f16>(&Case { batch: 2, heads: 2, head_dim: 32, tokens: 150, ..CASE }, 32)?;
    check_prompt::<f32>(&Case { heads: 2, head_dim: 64, past: 37, tokens: 70, ..CASE }, 64)?;
    check_prompt::<bf16>(&Case { head_dim: 80, past: 64, tokens: 65, ..CASE }, 80)?;
    check_prompt::<f16>(&Case { head_dim: 128, past: 5, tokens: 100, has_slopes: false, ..CASE }, 128)
}

#[test]
fn a_prompt_of_any_length_after_any_other_is_right() -> Result<()> {
    for (past, tokens) in [(0, 1), (0, 16), (0, 64), (1, 63), (63, 2), (64, 17), (100, 28), (127, 1), (129, 9)] {
        check_prompt::<f16>(&Case { past, tokens, seed: tokens as u32, ..CASE }, 32)?;
    }
    Ok(())
}

#[test]
fn heads_narrower_than_a_tile_are_filled_with_zeros() -> Result<()> {
    for (head_dim, width) in [(8, 32), (24, 32), (40, 64), (48, 64), (72, 80), (88, 128), (120, 128)] {
        check_prompt::<f32>(&Case { head_dim, past: 3, tokens: 20, batch: 2, ..CASE }, width)?;
    }
    Ok(())
}

fn check_written<T: Float, C: Float>(case: &Case) {
    let mut qkv = case.qkv::<T>(3.0);
    let planted = [7e4, -1e5, f32::NAN, f32::INFINITY, 65504.0, -65519.0, 0.0, -0.0, 6e-8];
    for (index, value) in planted.iter().enumerate() {
        let place = index * 131 % qkv.len();
        qkv[place] = T::of(*value);
    }
    let caches = written::<T, C>(case, &qkv);
    let [batch_stride, head_stride, token_stride] = case.strides();
    for (part, cache) in (1..).zip(&caches) {
        for (row, cache) in cache.chunks(case.capacity() * case.head_dim).enumerate() {
            let start = row / case.heads * batch_stride + row % case.heads * head_stride + part * case.head_dim;
            for (index, found) in cache.iter().enumerate() {
                let (token, feature) = (index / case.head_dim, index % case.head_dim);
                let wanted = if token >= case.total() {
                    f32::NAN
                } else {
                    let value = qkv[start + token * token_stride + feature].float();
                    let end = if C::SUFFIX == "f16" { 65504.0 } else { f32::INFINITY };
                    C::of(if value.is_nan() { value } else { value.clamp(-end, end) }).float()
                };
                let found = found.float();
                assert!(
                    found.to_bits() == wanted.to_bits() || found.is_nan() && wanted.is_nan(),
                    "{found} for {wanted}"
                );
            }
        }
    }
}

#[test]
fn the_cache_takes_new_tokens_wherever_they_lie() {
    for head_dim in [8, 20, 64, 3] {
        let case = Case { batch: 2, heads: 3, head_dim, past: 4, tokens: 7, ..CASE };
        check_written::<f32, f32>(&case);
        check_written::<f32, f16>(&case);
        check_written::<f16, f16>(&case);
        check_written::<f16, f32>(&case);
        check_written::<bf16, f16>(&case);
        check_written::<bf16, f32>(&case);
    }
}
