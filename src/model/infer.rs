//! The forward pass while generating: without a tape, its keys and values go into a cache.

use super::granite::Granite;
use super::kv_cache::KvCache;
use super::pass::Rows;
use crate::Result;
use crate::batch::PackedBatch;
use crate::device::{self, Work};
use crate::ops::attention::{AttentionShape, Qkv};
use crate::ops::embed;
use crate::ops::gpu::{self, Route};
use crate::ops::rope;
use candle_core::Tensor;

impl Granite {
    /// Runs a batch without a tape: its keys and values go into `cache`, whose rows the batch's segments name.
    /// Returns the hidden states of the target rows behind the last norm, [targets, C].
    ///
    /// # Errors
    /// Shapes that do not fit; the device's.
    pub fn infer(&self, batch: &PackedBatch, prompts: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        device::before(Work::Pass, batch.ids.len())?;
        self.on_pool(|| self.infer_on_this_thread(batch, prompts, cache))
    }

    fn infer_on_this_thread(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        cache: &mut KvCache,
    ) -> Result<Tensor> {
        let rows = Rows::new(self, batch)?;
        let mut x = embed::forward(&self.embedding, prompts, &self.lookup(batch))?;
        let mut delta = None;
        for (i, block) in self.blocks.iter().enumerate() {
            let last = i + 1 == self.blocks.len();
            let normed = block.attention_norm.forward(&x, self.add(delta.as_ref()), self.inputs)?;
            let q = match gpu::route(&normed.normed) {
                Route::Kernel => self.queries_by_kernel(i, &rows, &normed.normed, cache)?,
                Route::Cpu | Route::Reference => self.queries(i, &rows, &normed.normed, cache)?,
            };
            let qkv = Qkv::Split { q, kv: cache.layer(i).clone() };
            let attended = self.attention.forward(self.attention_inputs(batch, &qkv, None, last))?;
            let stream = if last { rows.of_targets(&normed.residual)? } else { normed.residual };
            let (mlp, gate_up) = self.behind_attention(block, &attended.out, &stream)?;
            (x, delta) = self.down(block, &gate_up, mlp.residual)?;
        }
        Ok(self.norm.forward(&x, self.add(delta.as_ref()), self.dtype())?.normed)
    }

    /// Queries of block `i`, whose keys and values are written to the cache.
    fn queries(&self, i: usize, rows: &Rows, normed: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let qkv = self.qkv(&self.blocks[i], rows, normed, i + 1 == self.blocks.len())?;
        let (kv, kv_width) = (qkv.keys_values(), self.attention.kv_width());
        cache.write(i, &kv.narrow(1, kv.dims()[1] - kv_width, kv_width)?)?;
        Ok(qkv.queries().narrow(1, 0, self.attention.q_width())?.contiguous()?)
    }

    /// The same by one kernel, which rotates on the way.
    fn queries_by_kernel(&self, i: usize, rows: &Rows, normed: &Tensor, cache: &KvCache) -> Result<Tensor> {
        let write = |qkv: &Tensor, shape: &AttentionShape| {
            let positions = (&rows.batch.position_ids).into();
            rope::forward_to_cache(rows.rope.as_deref(), qkv, shape, positions, cache.rows(i))
        };
        if i + 1 < self.blocks.len() {
            return write(&self.blocks[i].qkv.forward_in(normed, self.inputs)?, &self.attention);
        }
        let (q, kv) = &self.last_qkv;
        write(&kv.forward_in(normed, self.inputs)?, &AttentionShape { heads: 0, ..self.attention })?;
        let q = q.forward_in(&rows.of_targets(normed)?, self.inputs)?;
        rows.rotate(q, self.attention.heads, (&rows.batch.target_positions).into(), false)
    }
}
