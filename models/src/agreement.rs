//! How far one model's logits agree with another's.

/// The agreement of two models over several positions, each a row of logits.
#[derive(Debug, Clone, Default)]
pub struct Agreement {
    positions: usize,
    same_top: usize,
    divergence: f64,
    difference: f64,
    values: usize,
    max_difference: f32,
}

impl Agreement {
    /// Adds one position: the logits (vocabulary) of the model that is compared with, and of the one
    /// that is compared.
    ///
    /// Panics when the two have different lengths.
    pub fn add(&mut self, reference: &[f32], logits: &[f32]) {
        assert_eq!(reference.len(), logits.len(), "the two models have different vocabularies");
        self.positions += 1;
        self.same_top += usize::from(top(reference) == top(logits));
        let (reference_log_sum, log_sum) = (log_sum_exp(reference), log_sum_exp(logits));
        for (&reference, &logit) in reference.iter().zip(logits) {
            let log_probability = f64::from(reference) - reference_log_sum;
            self.divergence += log_probability.exp() * (log_probability - (f64::from(logit) - log_sum));
            let difference = (reference - logit).abs();
            self.difference += f64::from(difference);
            if difference.is_nan() || difference > self.max_difference {
                self.max_difference = difference;
            }
        }
        self.values += reference.len();
    }

    /// How many positions were added.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The share of positions at which both find the same token likeliest.
    pub fn top1(&self) -> f64 {
        self.same_top as f64 / self.positions.max(1) as f64
    }

    /// The Kullback-Leibler divergence of the compared distribution from the one compared with, in
    /// nats, on average over the positions.
    pub fn mean_kl(&self) -> f64 {
        let mean = self.divergence / self.positions.max(1) as f64;
        // Rounding may leave a little less than nothing; what is no number stays so.
        if mean < 0.0 { 0.0 } else { mean }
    }

    /// The average difference of two logits.
    pub fn mean_logit_difference(&self) -> f64 {
        self.difference / self.values.max(1) as f64
    }

    /// The largest difference of two logits.
    pub fn max_logit_difference(&self) -> f32 {
        self.max_difference
    }
}

/// The index of the largest logit, the first of several.
fn top(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).reduce(|best, index| if logits[index] > logits[best] { index } else { best })
}

/// `ln Σ exp(logit)`.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_agree_in_everything() {
        let mut agreement = Agreement::default();
        agreement.add(&[1.0, 3.0, -2.0], &[1.0, 3.0, -2.0]);
        assert_eq!((agreement.positions(), agreement.top1()), (1, 1.0));
        assert_eq!(
            (agreement.mean_kl(), agreement.mean_logit_difference(), agreement.max_logit_difference()),
            (0.0, 0.0, 0.0)
        );
    }

    #[test]
    fn divergence_is_that_of_the_probabilities() {
        let mut agreement = Agreement::default();
        // Probabilities 1/2, 1/2 against 3/4, 1/4; a shift of all logits changes none of them.
        agreement.add(&[0.0, 0.0], &[3f32.ln() + 7.0, 7.0]);
        let expected = 0.5 * (0.5f64 / 0.75).ln() + 0.5 * (0.5f64 / 0.25).ln();
        assert!((agreement.mean_kl() - expected).abs() < 1e-6);
        assert!((agreement.max_logit_difference() - (3f32.ln() + 7.0)).abs() < 1e-6);
        assert!((agreement.mean_logit_difference() - (3f64.ln() / 2.0 + 7.0)).abs() < 1e-6);
        agreement.add(&[0.0, 1.0], &[1.0, 0.0]);
        assert_eq!(agreement.top1(), 0.5);
    }
}
