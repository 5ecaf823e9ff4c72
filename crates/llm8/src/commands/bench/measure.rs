//! The runs that are timed.

use std::fmt;
use std::time::{Duration, Instant};

use fastrand::Rng;
use int8_models::{CacheDtype, CausalLm, Error, KvCache};
use int8_ops::device::{peak_bytes, synchronize};
use int8_ops::profile::{self, Part, Profile};

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
    /// Where the time of each repetition went; of a CUDA device it is not known.
    pub profiles: Vec<Profile>,
    /// Those of the machine around each repetition; of a CUDA device those before the test, once.
    pub limits: Vec<Limits>,
    /// The process's largest memory while the test ran alone.
    pub peak_rss_bytes: Option<usize>,
    /// The most that was taken on a CUDA device while the test ran alone.
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
        Spread::of(self.rates().collect())
    }

    /// Tokens of all sequences a second, in each repetition.
    fn rates(&self) -> impl Iterator<Item = f64> {
        let per_sequence = match self.test {
            Test::Prefill { prompt_len, .. } => prompt_len,
            Test::Decode { gen_len, .. } => gen_len,
        };
        let tokens = (self.test.batch() * per_sequence) as f64;
        self.seconds.iter().map(move |seconds| tokens / seconds)
    }

    /// The median share of the tokens a second that the limits around a repetition allow, by `limit`.
    pub fn share(&self, limit: impl Fn(&Limits) -> Option<f64>) -> Option<f64> {
        self.shares(limit).filter(|shares| !shares.is_empty()).map(median)
    }

    /// The same share in the time of some parts alone.
    pub fn share_in(&self, parts: &[Part], limit: impl Fn(&Limits) -> Option<f64>) -> Option<f64> {
        let of_time = self.shares_of_time(parts);
        let shares: Vec<f64> = self.shares(limit)?.into_iter().zip(of_time).map(|(share, time)| share / time).collect();
        (!shares.is_empty()).then(|| median(shares))
    }

    /// Of each repetition.
    fn shares(&self, limit: impl Fn(&Limits) -> Option<f64>) -> Option<Vec<f64>> {
        // One serves all where there is one.
        let limits = self.limits.iter().cycle().map(limit);
        self.rates().zip(limits).map(|(rate, limit)| Some(rate / limit?)).collect()
    }

    /// The median share of a repetition's time that some parts have taken together; `None` where that is not known.
    pub fn share_of_time(&self, parts: &[Part]) -> Option<f64> {
        let shares: Vec<f64> = self.shares_of_time(parts).collect();
        (!shares.is_empty()).then(|| median(shares))
    }

    fn shares_of_time(&self, parts: &[Part]) -> impl Iterator<Item = f64> {
        let seconds = |profile: &Profile| parts.iter().map(|&part| profile.of(part).as_secs_f64()).sum::<f64>();
        self.profiles.iter().zip(&self.seconds).map(move |(profile, whole)| seconds(profile) / whole)
    }

    pub fn median_seconds(&self) -> f64 {
        median(self.seconds.clone())
    }
}

/// A test of a model under way.
struct Run<'a> {
    model: &'a dyn CausalLm,
    cache_dtype: CacheDtype,
    test: Test,
    random: Rng,
    cache: KvCache,
    limits: Vec<Limits>,
    /// Of each repetition.
    seconds: Vec<f64>,
    /// Of each repetition.
    profiles: Vec<Profile>,
}

/// How tests are run.
pub struct Bench {
    pub repetitions: usize,
    /// What keys and values are cached in: every test is run with each.
    pub caches: Vec<CacheDtype>,
}

impl Bench {
    /// Runs tests of the models, which are on one device, as often as asked for, in turns: what else the machine does
    /// meets them all alike. Before that each runs alone, which warms up and tells its memory. Token ids are drawn at
    /// random, the same at every call. `after_turn` is told how often all have run. The figures of each model.
    pub fn measure(
        &self,
        models: &[&dyn CausalLm],
        tests: &[Test],
        after_turn: impl Fn(usize),
    ) -> anyhow::Result<Vec<Vec<Figures>>> {
        let device = models[0].device();
        let mut runs = Vec::new();
        let mut peaks = Vec::new();
        // What may be compared with each other stands side by side: one test with all caches and models.
        let tests = tests.iter().flat_map(|test| self.caches.iter().map(move |cache_dtype| (test, cache_dtype)));
        for ((&test, &cache_dtype), &model) in tests.flat_map(|test| models.iter().map(move |model| (test, model))) {
            // Of the one before, which would count as this one's memory.
            runs.iter_mut().for_each(Run::empty_cache);
            let mut limits = Vec::new();
            if !device.is_cpu() {
                // What is copied would count as well. Nothing else runs there, as on a CPU.
                limits.push(Limits::measure(model)?);
            }
            device::reset_peaks(device)?;
            let (random, cache) = (Rng::with_seed(0), KvCache::new(0));
            let mut run =
                Run { model, cache_dtype, test, random, cache, limits, seconds: Vec::new(), profiles: Vec::new() };
            run.empty_cache();
            run.fill()?;
            run.time(usize::MAX)?;
            peaks.push((output::peak_rss_bytes(), peak_bytes(device)));
            runs.push(run);
        }
        // The last one's cache is there still.
        if let Some((_, others)) = runs.split_last_mut() {
            for run in others.iter_mut().filter(|run| matches!(run.test, Test::Decode { .. })) {
                run.fill()?;
                run.time(WARM_UP)?;
            }
        }
        for turn in 1..=self.repetitions {
            for run in &mut runs {
                let before = device.is_cpu().then(|| Limits::measure(run.model)).transpose()?;
                profile::take();
                let duration = run.time(usize::MAX)?;
                let profile = profile::take();
                if device.is_cpu() {
                    run.profiles.push(profile);
                }
                run.seconds.push(duration.as_secs_f64());
                if let Some(before) = before {
                    run.limits.push(Limits::around(&before, &Limits::measure(run.model)?));
                }
            }
            after_turn(turn);
        }
        let mut of_models: Vec<Vec<Figures>> = models.iter().map(|_| Vec::new()).collect();
        for (index, (run, (peak_rss_bytes, peak_device_bytes))) in runs.into_iter().zip(peaks).enumerate() {
            of_models[index % models.len()].push(Figures {
                test: run.test,
                cache_dtype: run.cache_dtype,
                seconds: run.seconds,
                profiles: run.profiles,
                limits: run.limits,
                peak_rss_bytes,
                peak_device_bytes,
            });
        }
        Ok(of_models)
    }
}

impl Run<'_> {
    /// Leaves a cache with room for all of a test's tokens to come, as generation has it.
    fn empty_cache(&mut self) {
        let cache = KvCache::with_dtype(self.model.num_layers(), self.cache_dtype);
        self.cache = cache.expecting(self.test.tokens());
    }

    /// Puts what comes before a test's tokens into its cache.
    fn fill(&mut self) -> anyhow::Result<()> {
        match self.test {
            Test::Decode { batch, context, .. } if context > 0 => self.step(batch, context),
            _ => Ok(()),
        }
    }

    /// One repetition, of at most `tokens` tokens where they are generated.
    fn time(&mut self, tokens: usize) -> anyhow::Result<Duration> {
        let (batch, per_step, steps) = match self.test {
            Test::Prefill { batch, prompt_len } => (batch, prompt_len, 1),
            Test::Decode { batch, context, gen_len } => {
                self.cache.truncate(context);
                (batch, 1, gen_len.min(tokens))
            }
        };
        let model = self.model;
        let synchronize = || synchronize(model.device()).map_err(Error::from);
        synchronize()?;
        let start = Instant::now();
        for _ in 0..steps {
            self.step(batch, per_step)?;
        }
        synchronize()?;
        let duration = start.elapsed();
        if let Test::Prefill { .. } = self.test {
            // Its room is part of a prompt's cost, and in no other test's way.
            self.empty_cache();
        }
        Ok(duration)
    }

    /// One pass of `len` random tokens a sequence up to the logits, as generation does it.
    fn step(&mut self, batch: usize, len: usize) -> anyhow::Result<()> {
        let vocab_size = self.model.vocab_size() as u32;
        let ids: Vec<u32> = (0..batch * len).map(|_| self.random.u32(..vocab_size)).collect();
        let logits = self.model.next_logits(&ids, batch, &mut self.cache, interrupt::is_requested);
        let logits = logits.map_err(Error::from)?;
        logits.map(drop).ok_or_else(|| Failure::interrupted("no table is written").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_the_median_of_what_each_repetition_reached_of_its_own_limit() {
        let limits = |bandwidths: &[f64]| {
            let limits = |&bandwidth| Limits { read_bandwidth: Some(bandwidth), ..Limits::NONE };
            bandwidths.iter().map(limits).collect()
        };
        let test = Test::Decode { batch: 2, context: 0, gen_len: 3 };
        // 6, 3 and 2 tokens a second.
        let seconds = vec![1.0, 2.0, 3.0];
        let mut figures = Figures {
            test,
            cache_dtype: CacheDtype::F32,
            seconds,
            profiles: Vec::new(),
            limits: limits(&[8.0, 6.0, 2.0]),
            peak_rss_bytes: None,
            peak_device_bytes: None,
        };
        assert_eq!(figures.share(|limits| limits.read_bandwidth), Some(0.75));
        assert_eq!(figures.share(|_| None), None);
        assert_eq!(figures.share_in(&[Part::Products], |limits| limits.read_bandwidth), None);
        figures.limits = limits(&[12.0]);
        assert_eq!(figures.share(|limits| limits.read_bandwidth), Some(0.25));
    }

    #[test]
    fn a_spread_is_from_the_least_to_the_most() {
        let spread = Spread::of(vec![5.0, 1.0, 2.0, 3.0]);
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 5.0));
    }
}
