//! The batches of a configuration's first epoch.

use gneiss::batch::{Example, Packing, Passes, PrefixGroup};
use gneiss::config::{Config, PromptKind};
use serde::Serialize;

/// Rows that run through the model in the optimizer steps of the first epoch.
#[derive(Serialize)]
pub(super) struct Batches {
    pub(super) mean_rows: f64,
    pub(super) max_rows: usize,
    /// The same batches padded to their longest example, with the virtual tokens before each.
    pub(super) mean_padded_rows: f64,
    pub(super) max_padded_rows: usize,
    /// Rows of each step, in order.
    pub(super) rows: Vec<usize>,
    /// Rows and target rows that are in memory at once in the largest step.
    #[serde(skip)]
    pub(super) largest: (usize, usize),
    /// Target rows as a share of all rows.
    #[serde(skip)]
    pub(super) target_share: f64,
}

impl Batches {
    /// The batches of the first epoch, in the trainer's order.
    pub(super) fn count(config: &Config, train: &[Example], virtual_tokens: usize, packing: Packing) -> Self {
        let options = &config.train;
        let order = gneiss::tune::epoch_order(train.len(), options, 1);
        let (mut rows, mut padded) = (Vec::new(), Vec::new());
        let (mut largest, mut targets) = ((0, 0), 0);
        for step in order.chunks(options.batch_size * options.accumulate_steps) {
            let group = PrefixGroup::new(0..virtual_tokens as u32, step.iter().map(|i| &train[*i]));
            // The vocabulary size numbers the virtual tokens, and doesn't matter here.
            let passes = match config.prompt.kind {
                PromptKind::Embeddings => Passes::packed(&[group], packing),
                PromptKind::Prefix => Passes::after_given(&[group], packing.max_rows, packing.long_above),
            };
            let rest = passes
                .example_passes
                .iter()
                .map(|b| (b.ids.len(), b.target_rows.len()))
                .max()
                .unwrap_or((0, 0));
            let alive =
                (passes.prefix_pass.ids.len() + rest.0, passes.prefix_pass.target_rows.len() + rest.1);
            largest = largest.max(alive);
            targets += passes.target_tokens();
            rows.push(passes.rows());
            let padded_batch = |batch: &[usize]| {
                let longest = batch.iter().map(|i| train[*i].input.len() + train[*i].target.len()).max();
                batch.len() * (virtual_tokens + longest.unwrap_or(0))
            };
            padded.push(step.chunks(options.batch_size).map(padded_batch).sum::<usize>());
        }
        let mean = |all: &[usize]| all.iter().sum::<usize>() as f64 / all.len() as f64;
        let max = |all: &[usize]| all.iter().copied().max().unwrap_or(0);
        Self {
            mean_rows: mean(&rows),
            max_rows: max(&rows),
            mean_padded_rows: mean(&padded),
            max_padded_rows: max(&padded),
            largest,
            target_share: targets as f64 / rows.iter().sum::<usize>() as f64,
            rows,
        }
    }
}
