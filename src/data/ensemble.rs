//! What the prompts of an ensemble answer together (Lester and others, 2021, section 6).

/// The probabilities of labels by their log-likelihoods, nats, relative to each other.
pub fn probabilities(log_likelihoods: &[f64]) -> Vec<f64> {
    let most = log_likelihoods.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = log_likelihoods.iter().map(|value| (value - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// The labels of a text by several prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelEnsemble {
    /// Mean probability of each label.
    pub means: Vec<f64>,
    /// Prompts that find each label the likeliest.
    pub votes: Vec<usize>,
}

impl LabelEnsemble {
    /// From the [`probabilities`] of the labels after each prompt.
    pub fn new(prompts: &[&[f64]]) -> Self {
        let labels = prompts.first().map_or(0, |probabilities| probabilities.len());
        let mean = |label: usize| prompts.iter().map(|p| p[label]).sum::<f64>() / prompts.len() as f64;
        let mut votes = vec![0; labels];
        prompts.iter().for_each(|probabilities| votes[largest(probabilities)] += 1);
        Self { means: (0..labels).map(mean).collect(), votes }
    }

    /// The label of the highest mean probability.
    pub fn mean_likelihood(&self) -> usize {
        largest(&self.means)
    }

    /// The label with the most votes; of labels with the same number the one of the higher mean probability.
    pub fn vote(&self) -> usize {
        // A mean probability is at most 1, so that half of it only decides between equal numbers of votes.
        let values = self.votes.iter().zip(&self.means).map(|(votes, mean)| *votes as f64 + 0.5 * mean);
        largest(&values.collect::<Vec<f64>>())
    }
}

/// Index of the largest value, the first of several.
pub fn largest(values: &[f64]) -> usize {
    (0..values.len()).reduce(|a, b| if values[b] > values[a] { b } else { a }).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_and_mean_probabilities_are_different_answers() {
        // Two weak votes for the first label against a sure one for the second.
        let found = LabelEnsemble::new(&[&[0.5, 0.4, 0.1], &[0.5, 0.4, 0.1], &[0.0, 1.0, 0.0]]);
        assert_eq!((found.vote(), found.mean_likelihood()), (0, 1));
        assert_eq!(found.votes, [2, 1, 0]);
        // A vote each: the mean decides.
        let found = LabelEnsemble::new(&[&[0.4, 0.3, 0.3], &[0.3, 0.4, 0.3], &[0.1, 0.1, 0.8]]);
        assert_eq!((found.vote(), found.mean_likelihood()), (2, 2));
    }

    #[test]
    fn probabilities_are_relative_to_each_other() {
        let found = probabilities(&[-1000.0, -1000.0 - 3f64.ln(), f64::NEG_INFINITY]);
        assert!((found[0] - 0.75).abs() < 1e-12 && (found[1] - 0.25).abs() < 1e-12 && found[2] == 0.0);
    }
}
