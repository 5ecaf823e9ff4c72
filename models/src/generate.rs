//! The token loop: prompt in, tokens out, one at a time.

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::utils::apply_repeat_penalty;
use int8_ops::CacheDtype;

use crate::attention::KvCache;
use crate::causal_lm::CausalLm;
use crate::error::{Error, Result};

/// How tokens are chosen, and when to stop.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
    pub temperature: f64,
    /// Draw among this many of the likeliest tokens only.
    pub top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability, after `top_k`.
    pub top_p: Option<f64>,
    /// Above 1, tokens of the prompt and the output become less likely; 1 changes nothing.
    pub repetition_penalty: f32,
    /// The same seed draws the same tokens.
    pub seed: u64,
    /// What keys and values are cached in; `None` for what is best where the model runs.
    pub cache_dtype: Option<CacheDtype>,
    /// Ids that end the text; the one met is the last token.
    pub eos: Vec<u32>,
    /// Asked before every token and every block: whether to end at once.
    pub is_interrupted: fn() -> bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            seed: 0,
            cache_dtype: None,
            eos: Vec::new(),
            is_interrupted: || false,
        }
    }
}

impl GenerateOptions {
    /// The highest temperature: far above, every token is as likely as another.
    pub const MAX_TEMPERATURE: f64 = 100.0;
    /// The lowest probability for `top_p`: below, the likeliest token alone is left.
    pub const MIN_TOP_P: f64 = 1e-6;
    /// The range of the repetition penalty.
    pub const REPETITION_PENALTIES: std::ops::RangeInclusive<f32> = 0.01..=100.0;

    /// An error when an option is out of its range.
    fn check(&self) -> Result<()> {
        if !(0.0..=Self::MAX_TEMPERATURE).contains(&self.temperature) {
            let (found, max) = (self.temperature, Self::MAX_TEMPERATURE);
            return Err(Error::Option(format!("the temperature is {found}, wanted 0 to {max}")));
        }
        if self.top_p.is_some_and(|top_p| !(Self::MIN_TOP_P..=1.0).contains(&top_p)) {
            let (found, min) = (self.top_p.unwrap_or_default(), Self::MIN_TOP_P);
            return Err(Error::Option(format!("top-p is {found}, wanted {min} to 1")));
        }
        if !Self::REPETITION_PENALTIES.contains(&self.repetition_penalty) {
            let (found, (min, max)) = (self.repetition_penalty, Self::REPETITION_PENALTIES.into_inner());
            return Err(Error::Option(format!("the repetition penalty is {found}, wanted {min} to {max}")));
        }
        Ok(())
    }
}

/// Why no more tokens come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its text.
    Eos,
    /// As many tokens were made as were asked for, or as the model has positions for.
    Length,
    /// [`GenerateOptions::is_interrupted`] said so.
    Interrupted,
}

impl FinishReason {
    /// `eos`, `length` or `interrupted`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Length => "length",
            Self::Interrupted => "interrupted",
        }
    }
}

/// The tokens that follow a prompt: an iterator over their ids.
pub struct Generation<'a> {
    model: &'a dyn CausalLm,
    options: GenerateOptions,
    processor: LogitsProcessor,
    cache: KvCache,
    /// The prompt and what has been generated.
    ids: Vec<u32>,
    prompt_len: usize,
    finish_reason: Option<FinishReason>,
    has_failed: bool,
    prompt_duration: Duration,
    generation_duration: Duration,
}

/// Below this a temperature would only overflow: the likeliest token is taken.
const MIN_TEMPERATURE: f64 = 1e-5;

/// Starts generating after `prompt`; the prompt is run when the first token is asked for.
///
/// Errors when the prompt is empty, holds an id outside the vocabulary, or has more tokens than the
/// model has positions, and when an option is out of its range.
pub fn generate<'a>(model: &'a dyn CausalLm, prompt: &[u32], options: &GenerateOptions) -> Result<Generation<'a>> {
    options.check()?;
    if prompt.is_empty() {
        return Err(Error::Prompt("is empty, wanted at least one token".to_string()));
    }
    let vocab_size = model.vocab_size();
    if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab_size) {
        return Err(Error::Prompt(format!("has token id {id}, which is outside the vocabulary of {vocab_size}")));
    }
    if let Some(positions) = model.max_positions()
        && prompt.len() > positions
    {
        return Err(Error::PromptTooLong { tokens: prompt.len(), positions });
    }
    let sampling = match (options.temperature, options.top_p) {
        (temperature, _) if temperature < MIN_TEMPERATURE => Sampling::ArgMax,
        (temperature, Some(p)) => Sampling::TopP { p, temperature },
        (temperature, None) => Sampling::All { temperature },
    };
    // The last token is not run any more.
    let tokens = prompt.len().saturating_add(options.max_new_tokens.saturating_sub(1));
    let tokens = model.max_positions().map_or(tokens, |positions| tokens.min(positions));
    Ok(Generation {
        model,
        options: options.clone(),
        processor: LogitsProcessor::from_sampling(options.seed, sampling),
        cache: KvCache::with_dtype(model.num_layers(), options.cache_dtype).expecting(tokens),
        ids: prompt.to_vec(),
        prompt_len: prompt.len(),
        finish_reason: None,
        has_failed: false,
        prompt_duration: Duration::ZERO,
        generation_duration: Duration::ZERO,
    })
}

impl Generation<'_> {
    /// The ids generated so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids[self.prompt_len..]
    }

    /// Why the iterator has ended; `None` while it has not.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// How long the prompt took, up to the first token.
    pub fn prompt_duration(&self) -> Duration {
        self.prompt_duration
    }

    /// How long the tokens after the first took.
    pub fn generation_duration(&self) -> Duration {
        self.generation_duration
    }

    /// What keys and values are cached in; `None` before the first.
    pub fn cache_dtype(&self) -> Option<CacheDtype> {
        self.cache.dtype()
    }

    /// Bytes that are taken for keys and values, those of tokens to come included.
    pub fn kv_cache_bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Runs the tokens that are not in the cache yet, and chooses the next; none when interrupted.
    fn step(&mut self) -> Result<Option<u32>> {
        let new = &self.ids[self.cache.len()..];
        let tokens = Tensor::new(new, &Device::Cpu)?.unsqueeze(0)?;
        let Some(hidden) = self.model.hidden_states(&tokens, &mut self.cache, self.options.is_interrupted)? else {
            return Ok(None);
        };
        // The head runs on the last position only.
        let logits = self.model.head(&hidden.narrow(1, hidden.dim(1)? - 1, 1)?)?.flatten_all()?;
        let mut values = logits.to_vec1::<f32>()?;
        if let Some(bad) = values.iter().find(|logit| !logit.is_finite()) {
            return Err(Error::Output(format!("{bad}, not a finite number")));
        }
        // Logits are many: they are copied no more often than is needed.
        if self.options.repetition_penalty != 1.0 {
            values = apply_repeat_penalty(&logits, self.options.repetition_penalty, &self.ids)?.to_vec1()?;
        }
        if let (Some(top_k), true) = (self.options.top_k, self.options.temperature >= MIN_TEMPERATURE) {
            keep_top_k(&mut values, top_k);
        }
        let count = values.len();
        Ok(Some(self.processor.sample(&Tensor::from_vec(values, count, &Device::Cpu)?)?))
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finish_reason.is_some() || self.has_failed {
            return None;
        }
        let is_full = self.model.max_positions().is_some_and(|positions| self.ids.len() > positions);
        if self.ids().len() >= self.options.max_new_tokens || is_full {
            self.finish_reason = Some(FinishReason::Length);
            return None;
        }
        let start = Instant::now();
        let is_prompt = self.cache.is_empty();
        let id = match self.step() {
            Ok(Some(id)) => id,
            Ok(None) => {
                self.finish_reason = Some(FinishReason::Interrupted);
                return None;
            }
            Err(error) => {
                self.has_failed = true;
                return Some(Err(error));
            }
        };
        let duration = if is_prompt { &mut self.prompt_duration } else { &mut self.generation_duration };
        *duration += start.elapsed();
        self.ids.push(id);
        if self.options.eos.contains(&id) {
            self.finish_reason = Some(FinishReason::Eos);
        }
        Some(Ok(id))
    }
}

/// Makes all but the `top_k` largest logits (and those equal to the last of them) impossible: before
/// top-p, whose share is then of what is left.
fn keep_top_k(logits: &mut [f32], top_k: usize) {
    if top_k == 0 || top_k >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, last, _) = sorted.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
    let last = *last;
    logits.iter_mut().filter(|logit| **logit < last).for_each(|logit| *logit = f32::NEG_INFINITY);
}
