//! The runs that are timed.

use std::fmt;
use std::time::{Duration, Instant};

use fastrand::Rng;
use int8_models::{CacheDtype, CausalLm, Error, KvCache};
use int8_ops::device::{peak_bytes, synchronize};

use super::limits::{Limits, median};
use crate::failure::Failure;
use crate::{device, interrupt, output};

/// Tokens that warm up before tokens are generated one by one.
const WARM_UP: usize = 4;

/// One thing to measure, of sequences of one length.
#[derive(Debug, Clone, Copy)]
pub enum Test {
    /// A prompt as a whole, up to the logits of the token after it.
    Prefill { batch: usize, prompt_len: usize },
    /// Tokens one by one after those in the cache.
    Decode { batch: usize, context: usize, gen_len: usize },
}

impl Test {
    pub fn batch(&self) -> usize {
        match *self {
            Self::Prefill { batch, .. } | Self::Decode { batch, .. } => batch,
        }
    }

    /// The tokens of each sequence at its end.
    pub fn tokens(&self) -> usize {
        match *self {
            Self::Prefill { prompt_len, .. } => prompt_len,
            Self::Decode { context, gen_len, .. } => context + gen_len,
        }
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Prefill { prompt_len, .. } => write!(f, "prompt of {prompt_len}")?,
            Self::Decode { gen_len, context: 0, .. } => write!(f, "{gen_len} tokens")?,
            Self::Decode { gen_len, context, .. } => write!(f, "{gen_len} tokens after {context}")?,
        }
        match self.batch() {
            1 => Ok(()),
            batch => write!(f, " x {batch}"),
        }
    }
}

/// What a test has taken.
#[derive(Debug)]
pub struct Figures {
    pub test: Test,
    pub cache_dtype: CacheDtype,
    /// Of each repetition.
    pub seconds: Vec<f64>,
    /// Those of the machine, measured before each repetition; of a CUDA device, before the test.
    pub limits: Limits,
    /// The process's largest memory while the test ran.
    pub peak_rss_bytes: Option<usize>,
    /// The most that was taken on a CUDA device while the test ran.
    pub peak_device_bytes: Option<usize>,
}

/// A figure of several repetitions.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    fn of(values: Vec<f64>) -> Self {
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(0.0, f64::max);
        Self { median: median(values), min, max }
    }
}

impl Figures {
    /// Tokens of all sequences together.
    pub fn tokens_per_second(&self) -> Spread {
        let per_sequence = match self.test {
            Test::Prefill { prompt_len, .. } => prompt_len,
            Test::Decode { gen_len, .. } => gen_len,
        };
        let tokens = (self.test.batch() * per_sequence) as f64;
        Spread::of(self.seconds.iter().map(|seconds| tokens / seconds).collect())
    }

    pub fn median_seconds(&self) -> f64 {
        median(self.seconds.clone())
    }
}

/// A loaded model to measure.
pub struct Bench<'a> {
    pub model: &'a dyn CausalLm,
    pub repetitions: usize,
    pub cache_dtype: CacheDtype,
}

impl Bench<'_> {
    /// Runs a test as often as asked for, after a run that warms up. Token ids are drawn at random, the same
    /// at every run.
    pub fn measure(&self, test: &Test) -> anyhow::Result<Figures> {
        let device = self.model.device();
        let mut limits = Vec::new();
        if !device.is_cpu() {
            // What is copied would count as the test's memory. Nothing else runs there, as on a CPU.
            limits.push(Limits::measure(self.model)?);
        }
        device::reset_peaks(device)?;
        let mut random = Rng::with_seed(0);
        let mut cache = self.empty_cache();
        let batch = test.batch();
        if let Test::Decode { context, .. } = *test
            && context > 0
        {
            self.step(&self.ids(batch * context, &mut random), batch, &mut cache)?;
        }
        self.run(test, &mut cache, WARM_UP, &mut random)?;
        let mut seconds = Vec::new();
        for _ in 0..self.repetitions {
            if device.is_cpu() {
                limits.push(Limits::measure(self.model)?);
            }
            seconds.push(self.run(test, &mut cache, usize::MAX, &mut random)?.as_secs_f64());
        }
        let peak_rss_bytes = output::peak_rss_bytes();
        let peak_device_bytes = peak_bytes(device);
        let limits = Limits::median(&limits);
        Ok(Figures { test: *test, cache_dtype: self.cache_dtype, seconds, limits, peak_rss_bytes, peak_device_bytes })
    }

    /// One repetition, of at most `tokens` tokens where they are generated.
    fn run(&self, test: &Test, cache: &mut KvCache, tokens: usize, random: &mut Rng) -> anyhow::Result<Duration> {
        let (batch, per_step, steps) = match *test {
            Test::Prefill { batch, prompt_len } => (batch, prompt_len, 1),
            Test::Decode { batch, gen_len, .. } => (batch, 1, gen_len.min(tokens)),
        };
        match *test {
            // Its room is part of a prompt's cost.
            Test::Prefill { .. } => *cache = self.empty_cache(),
            Test::Decode { context, .. } => cache.truncate(context),
        }
        let synchronize = || synchronize(self.model.device()).map_err(Error::from);
        synchronize()?;
        let start = Instant::now();
        for _ in 0..steps {
            self.step(&self.ids(batch * per_step, random), batch, cache)?;
        }
        synchronize()?;
        Ok(start.elapsed())
    }

    fn empty_cache(&self) -> KvCache {
        KvCache::with_dtype(self.model.num_layers(), self.cache_dtype)
    }

    /// One pass up to the logits, as generation does it.
    fn step(&self, ids: &[u32], batch: usize, cache: &mut KvCache) -> anyhow::Result<()> {
        let logits = self.model.next_logits(ids, batch, cache, interrupt::is_requested).map_err(Error::from)?;
        logits.map(drop).ok_or_else(|| Failure::interrupted("nothing was measured").into())
    }

    /// Token ids (batch * len).
    fn ids(&self, count: usize, random: &mut Rng) -> Vec<u32> {
        (0..count).map(|_| random.u32(..self.model.vocab_size() as u32)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_from_the_least_to_the_most() {
        let spread = Spread::of(vec![5.0, 1.0, 2.0, 3.0]);
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 5.0));
    }
}
