//! What a pass needs of the host, made and uploaded before it runs.

use super::Decoder;
use crate::Result;
use crate::batch::{JoinedPrefix, PackedBatch, Passes};
use crate::ops::Indices;
use crate::ops::attention::PlannedPass;
use crate::ops::backend::{Route, route};

impl Decoder {
    /// Uploads the indices of `passes` and the plans of their attention, one copy a pass; nothing on the CPU.
    /// Passes that were not prepared upload each list when it is read first, with the same result.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub(crate) fn prepare(&self, passes: &Passes, backward: bool) -> Result<()> {
        if route(&self.embedding) != Route::Kernel {
            return Ok(());
        }
        let given = passes.given.as_ref();
        self.prepare_batch(&passes.prefix_pass, given.map(|given| given.rows), backward)?;
        let prefix = Some(match given {
            None => passes.prefix_pass.prefix_rows,
            Some(given) if given.joined.is_empty() => given.rows,
            Some(given) => given.joined.iter().map(JoinedPrefix::rows).sum(),
        });
        passes.example_passes.iter().try_for_each(|batch| self.prepare_batch(batch, prefix, backward))
    }

    fn prepare_batch(&self, batch: &PackedBatch, prefix: Option<usize>, backward: bool) -> Result<()> {
        let pass = PlannedPass {
            segments: &batch.segments,
            target_segments: &batch.target_segments,
            rows: batch.ids.len(),
            targets: batch.target_rows.len(),
            prefix,
            layers: self.layers.len(),
            backward,
        };
        let plans = self.attention.plans(&pass, &self.embedding);
        let PackedBatch { ids, position_ids, target_rows, target_positions, labels, .. } = batch;
        let lists = [ids, position_ids, target_rows, target_positions, labels].into_iter();
        Indices::upload_together(lists.chain(pass.visible()).chain(plans.indices()), self.device())
    }
}
