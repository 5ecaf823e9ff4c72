//! All figures of `llm8 compare`; serialised, it is what `--json` writes.

use int8_models::Agreement;
use serde::Serialize;

use crate::commands::report::Report as Run;

#[derive(Debug, Serialize)]
pub struct Report {
    /// The run that int8 is compared with, by the name of 16 bits whatever its precision is.
    pub f16: Run,
    pub int8: Run,
    /// How many times smaller int8's weights are than with 16 bits each, as `footprint` tells it.
    pub ratio: f64,
    /// The index of the first generated token that differs; null where the texts are the same.
    pub first_difference: Option<usize>,
    /// Over the prompt's positions: the share at which both find the same token likeliest.
    pub top1_agreement: f64,
    /// The divergence of int8's distribution from the other's, in nats.
    pub mean_kl: f64,
    pub mean_logit_difference: f64,
    pub max_logit_difference: f32,
}

impl Report {
    pub fn new(f16: Run, int8: Run, agreement: &Agreement) -> Self {
        let ratio = int8.memory.weight_bytes_f16 as f64 / int8.memory.weight_bytes as f64;
        let shared = f16.ids.iter().zip(&int8.ids).take_while(|(one, other)| one == other).count();
        let first_difference = (shared < f16.ids.len().max(int8.ids.len())).then_some(shared);
        Self {
            f16,
            int8,
            ratio,
            first_difference,
            top1_agreement: agreement.top1(),
            mean_kl: agreement.mean_kl(),
            mean_logit_difference: agreement.mean_logit_difference(),
            max_logit_difference: agreement.max_logit_difference(),
        }
    }

    /// What is compared, line by line: its name, and how it is with 16 bits and with int8.
    pub fn lines(&self) -> Vec<(&'static str, [String; 2])> {
        let both = |figure: &dyn Fn(&Run) -> String| [figure(&self.f16), figure(&self.int8)];
        let bytes = |bytes: usize| crate::output::bytes(bytes);
        let mut lines = vec![
            ("weights", both(&|run| bytes(run.memory.weight_bytes))),
            (
                "smaller",
                both(&|run| format!("{:.2}x", self.f16.memory.weight_bytes as f64 / run.memory.weight_bytes as f64)),
            ),
            ("peak memory", both(&|run| run.memory.peak_rss_bytes.map_or("unknown".to_string(), bytes))),
            ("load", both(&|run| format!("{:.2} s", run.timings.load_seconds))),
            ("prompt", both(&|run| format!("{:.1} tokens/s", run.timings.prompt_tokens_per_second))),
            ("generation", both(&|run| format!("{:.1} tokens/s", run.timings.generation_tokens_per_second))),
        ];
        if self.f16.memory.peak_device_bytes.is_some() {
            let peak = both(&|run| run.memory.peak_device_bytes.map_or("unknown".to_string(), bytes));
            lines.insert(3, ("peak device memory", peak));
        }
        lines
    }

    /// How far the two agree, line by line.
    pub fn agreement(&self) -> Vec<(&'static str, String)> {
        let tokens = self.f16.ids.len().max(self.int8.ids.len());
        let texts = match self.first_difference {
            None => format!("the same, {tokens} tokens"),
            Some(index) => format!("the same for {index} of {tokens} tokens"),
        };
        let positions = self.f16.prompt_ids.len();
        vec![
            ("texts", texts),
            (
                "likeliest token",
                format!("the same at {:.1} % of the prompt's {positions} positions", self.top1_agreement * 100.0),
            ),
            ("KL divergence", format!("{:.2e} nats on average", self.mean_kl)),
            (
                "logits",
                format!(
                    "{:.2e} apart on average, {:.2e} at most",
                    self.mean_logit_difference, self.max_logit_difference
                ),
            ),
        ]
    }
}
