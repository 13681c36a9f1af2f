//! The forward pass over a packed batch with its tape, and the backward pass down to the prompts.
//!
//! No weight gets a gradient, so the inputs of linear layers are not kept. Of each block the tape holds the
//! residual stream at its two norms with the reciprocal RMS, q/k/v behind the rotation, the attention's
//! log-sum-exp, on a GPU its output too, and gate/up; or the block's input alone ([`super::tape`]). The last block runs
//! its queries, output and MLP for target rows only; the first block's backward makes what reaches the prefix
//! rows only.
//!
//! On a CPU that multiplies bf16, the residual stream, all sums and what is between products are f32; q/k/v, the
//! attention's output and gate/up are kept in bf16, as the products read them.

use super::granite::{Block, Granite};
use super::tape::{BlockTape, NormTape, Saved, Tape, own_keys_values};
use crate::Result;
use crate::batch::PackedBatch;
use crate::device::{self, Work};
use crate::ops::attention::{Inputs, Needs, Qkv, Rotation};
use crate::ops::cross_entropy::{self, Softmax};
use crate::ops::embed::{self, Lookup};
use crate::ops::gpu::{self, Route};
use crate::ops::rms_norm::{Add, Normed};
use crate::ops::{IndexView, Indices, Linear, RopeTable, cpu, rows, swiglu};
use candle_core::{DType, DeviceLocation, Tensor};
use std::sync::Arc;

/// Rows whose logits exist at a time: on the CPU 64, which of 100,352 are 26 MB in f32; a GPU's product needs more
/// rows to be fast, and 512 are 103 MB in bf16.
pub(super) fn head_rows(device: DeviceLocation) -> usize {
    if device == DeviceLocation::Cpu { 64 } else { 512 }
}

/// Rows of a pass that fill a GPU: a product of so many rows does 4,096 operations for each value of the weight, seven
/// times what an H100 does in bf16 while it reads one (989 TFLOP/s at 3.35 TB/s: 590). By arithmetic, not measured.
pub(crate) const GPU_FULL_ROWS: usize = 2048;

/// Rows that a prefix pass should have at least, in passes of at most `max_rows` ([`crate::batch::Packing`]). A GPU reads
/// all weights for it, forward and backward, and launches as much as for a full pass, so it takes some sequences too: up
/// to 1,024 rows, and a quarter of what passes have beyond [`GPU_FULL_ROWS`]. Its tape stays while the example passes
/// run: if memory is short, so that passes are not larger than that, it would cost more in recomputed blocks than it
/// saves (by arithmetic 5 % and 1 % of a step of 8b on a 24 GB card). A CPU takes as long for the prefixes as for as many
/// other rows.
pub(super) fn prefix_pass_rows(on_cpu: bool, max_rows: usize) -> usize {
    // What the emulator runs is small.
    #[cfg(test)]
    if gpu::emulated::is_on() {
        return max_rows / 4;
    }
    if on_cpu { 0 } else { (max_rows.saturating_sub(GPU_FULL_ROWS) / 4).min(1024) }
}

impl Granite {
    /// Rows whose logits exist at a time.
    pub(crate) fn head_rows(&self) -> usize {
        head_rows(self.device().location())
    }

    /// Rows that a prefix pass should have at least, in passes of at most `max_rows`.
    pub(crate) fn prefix_pass_rows(&self, max_rows: usize) -> usize {
        prefix_pass_rows(gpu::route(&self.embedding) == Route::Cpu, max_rows)
    }
}

/// Result of [`Granite::prefix_pass`].
pub struct PrefixPass {
    /// Per block a matrix whose last 2K D columns are keys and values of the prefix rows.
    pub keys_values: Vec<Tensor>,
    /// The hidden states of the target rows behind the last norm, [targets, C].
    pub hidden: Tensor,
}

/// Result of [`Granite::backward`].
pub struct Backward {
    /// Gradient of the prompts [rows, C]; `None` where the prefixes are in another pass.
    pub prompts: Option<Tensor>,
    /// Gradient of the keys and values of the prefixes in another pass, per block, [P, 2K D].
    pub prefixes: Option<Vec<Tensor>>,
}

/// Losses of the target rows, and the gradient of their hidden states.
pub struct HeadLoss {
    /// Negative log-likelihood of each label, nats: f64 `[targets]` on the CPU, f32 on a GPU, where it may still be
    /// on its way.
    pub nll: Tensor,
    /// [targets, C]; `None` where no gradient was asked for.
    pub dhidden: Option<Tensor>,
}

/// What stays the same over the blocks of a pass.
pub(super) struct Rows<'a> {
    pub(super) batch: &'a PackedBatch,
    pub(super) rope: Option<Arc<RopeTable>>,
    /// dtype that products read.
    inputs: DType,
}

impl<'a> Rows<'a> {
    pub(super) fn new(model: &Granite, batch: &'a PackedBatch) -> Result<Self> {
        let positions = batch.position_ids.iter().max().map_or(0, |p| *p as usize + 1);
        Ok(Self { batch, rope: model.rope(positions)?, inputs: model.inputs })
    }

    fn targets(&self) -> IndexView<'_> {
        (&self.batch.target_rows).into()
    }

    /// The target rows of `x`, a row each of the batch.
    pub(super) fn of_targets(&self, x: &Tensor) -> Result<Tensor> {
        rows::forward(x, self.targets())
    }

    /// `x` rotated, forwards or backwards, in the dtype that products read.
    pub(super) fn rotate(
        &self,
        x: Tensor,
        heads: usize,
        positions: IndexView,
        backward: bool,
    ) -> Result<Tensor> {
        match &self.rope {
            None => cpu::stored("rope", &x, self.inputs),
            Some(rope) if backward => rope.backward(x, heads, positions, self.inputs),
            Some(rope) => rope.forward(x, heads, positions, self.inputs),
        }
    }
}

impl Rows<'_> {
    /// The rotation of a block's queries and keys; the last block's queries are those of target rows.
    fn rotation(&self, last: bool) -> Option<Rotation<'_>> {
        let keys = IndexView::from(&self.batch.position_ids);
        let queries = if last { (&self.batch.target_positions).into() } else { keys };
        self.rope.as_deref().map(|table| Rotation { table, queries, keys })
    }
}

impl Granite {
    pub(super) fn lookup<'a>(&self, batch: &'a PackedBatch) -> Lookup<'a> {
        Lookup { ids: (&batch.ids).into(), multiplier: self.config.embedding_multiplier }
    }

    /// Runs a batch and keeps what [`Granite::backward`] needs. `prompts` [n, C] holds the virtual tokens of
    /// all groups; `prefix` is [`Tape::keys_values`] of the pass that holds the prefixes, where it is not this one.
    /// Of the first `recompute` blocks, at most all but the last, only the input is kept: the backward pass runs
    /// them again, with the same gradient.
    ///
    /// # Errors
    /// Shapes that do not fit; the device's.
    pub fn forward(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        prefix: Option<&[Tensor]>,
        recompute: usize,
    ) -> Result<Tape> {
        let recompute = recompute.min(self.blocks.len().saturating_sub(1));
        let shares = batch.shares_prefixes || batch.examples == 0;
        let shared_rows = shares.then_some(batch.prefix_rows);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        let last = self.run(batch, prompts, prefix, |i, tape| {
            let kv_width = self.attention.kv_width();
            blocks.push(if i >= recompute { Saved::Whole(tape) } else { tape.input(kv_width, shared_rows)? });
            Ok(())
        })?;
        Ok(Tape { blocks, prefix_rows: batch.prefix_rows, last })
    }

    /// Runs a batch without a tape: the hidden states of the target rows behind the last norm, [targets, C].
    /// `prompts` and `prefix` are as in [`Granite::forward`].
    ///
    /// # Errors
    /// Shapes that do not fit; the device's.
    pub fn hidden(&self, batch: &PackedBatch, prompts: &Tensor, prefix: Option<&[Tensor]>) -> Result<Tensor> {
        Ok(self.run(batch, prompts, prefix, |_, _| Ok(()))?.normed)
    }

    /// Runs a batch that holds its prefixes, without a tape, for others that see these prefixes.
    ///
    /// # Errors
    /// Shapes that do not fit; the device's.
    pub fn prefix_pass(&self, batch: &PackedBatch, prompts: &Tensor) -> Result<PrefixPass> {
        let mut keys_values = Vec::with_capacity(self.blocks.len());
        let last = self.run(batch, prompts, None, |_, tape| {
            keys_values.push(match batch.examples {
                0 => tape.qkv.keys_values().narrow(0, 0, batch.prefix_rows)?,
                _ => own_keys_values(&tape.qkv, batch.prefix_rows, self.attention.kv_width())?,
            });
            Ok(())
        })?;
        Ok(PrefixPass { keys_values, hidden: last.normed })
    }

    /// Runs a batch; `keep` is given the tape of each block, and frees what it does not keep of it.
    fn run(
        &self,
        batch: &PackedBatch,
        prompts: &Tensor,
        prefix: Option<&[Tensor]>,
        mut keep: impl FnMut(usize, BlockTape) -> Result<()> + Send,
    ) -> Result<Normed> {
        device::before(Work::Pass, batch.ids.len())?;
        self.on_pool(|| {
            let rows = Rows::new(self, batch)?;
            let mut x = embed::forward(&self.embedding, prompts, &self.lookup(batch))?;
            let mut delta = None;
            for (i, block) in self.blocks.iter().enumerate() {
                let normed = block.attention_norm.forward(&x, self.add(delta.as_ref()), self.inputs)?;
                let tape = self.block(i, &rows, normed, prefix)?;
                (x, delta) = self.down(block, &tape.gate_up, tape.mlp.residual.clone())?;
                keep(i, tape)?;
            }
            self.norm.forward(&x, self.add(delta.as_ref()), self.dtype())
        })
    }

    /// Runs `f` where the loops of the CPU's ops begin at once.
    pub(super) fn on_pool<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        if gpu::route(&self.embedding) == Route::Cpu { cpu::on_pool(f) } else { f() }
    }

    /// Block `i` from what its attention norm made up to gate and up.
    fn block(&self, i: usize, rows: &Rows, normed: Normed, prefix: Option<&[Tensor]>) -> Result<BlockTape> {
        let (block, last) = (&self.blocks[i], i + 1 == self.blocks.len());
        let Normed { residual, normed, rstd } = normed;
        let qkv = self.qkv(block, rows, &normed, last)?;
        drop(normed);
        let attended =
            self.attention.forward(self.attention_inputs(rows.batch, &qkv, prefix.map(|p| &p[i]), last))?;
        let stream = if last { rows.of_targets(&residual)? } else { residual.clone() };
        let (mlp, gate_up) = self.behind_attention(block, &attended.out, &stream)?;
        let attended = attended.kept();
        Ok(BlockTape { attention: NormTape { residual, rstd }, qkv, attended, mlp, gate_up })
    }

    pub(super) fn attention_inputs<'a>(
        &self,
        batch: &'a PackedBatch,
        qkv: &'a Qkv,
        prefix: Option<&'a Tensor>,
        last: bool,
    ) -> Inputs<'a> {
        let segments = if last { &batch.target_segments } else { &batch.segments };
        Inputs { segments, qkv, prefix }
    }

    pub(super) fn add<'a>(&self, delta: Option<&'a Tensor>) -> Option<Add<'a>> {
        delta.map(|delta| Add { delta, multiplier: self.config.residual_multiplier })
    }

    pub(super) fn qkv(&self, block: &Block, rows: &Rows, normed: &Tensor, last: bool) -> Result<Qkv> {
        let (h, k) = (self.attention.heads, self.attention.kv_heads);
        let positions = IndexView::from(&rows.batch.position_ids);
        if !last {
            let qkv = block.qkv.forward_in(normed, self.inputs)?;
            return Ok(Qkv::Fused(rows.rotate(qkv, h + k, positions, false)?));
        }
        let (q, kv) = &self.last_qkv;
        let q = q.forward_in(&rows.of_targets(normed)?, self.inputs)?;
        Ok(Qkv::Split {
            q: rows.rotate(q, h, (&rows.batch.target_positions).into(), false)?,
            kv: rows.rotate(kv.forward_in(normed, self.inputs)?, k, positions, false)?,
        })
    }

    /// The second norm, and gate and up.
    pub(super) fn behind_attention(
        &self,
        block: &Block,
        attended: &Tensor,
        x: &Tensor,
    ) -> Result<(NormTape, Tensor)> {
        let (x, delta) = self.added(&block.o, attended, x.clone())?;
        let Normed { residual, normed, rstd } =
            block.mlp_norm.forward(&x, self.add(delta.as_ref()), self.inputs)?;
        Ok((NormTape { residual, rstd }, block.gate_up.forward_in(&normed, self.inputs)?))
    }

    /// The residual stream `x` behind the MLP, as [`Granite::added`] gives it.
    pub(super) fn down(
        &self,
        block: &Block,
        gate_up: &Tensor,
        x: Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        self.added(&block.down, &swiglu::forward(gate_up)?, x)
    }

    /// The residual stream `x` behind a layer over `input`: the sum, where the device's product adds it up, else `x` and
    /// what the next norm is to add to it.
    fn added(&self, layer: &Linear, input: &Tensor, x: Tensor) -> Result<(Tensor, Option<Tensor>)> {
        match layer.forward_add(input, &x, self.config.residual_multiplier)? {
            Some(sum) => Ok((sum, None)),
            None => Ok((x, Some(layer.forward(input)?))),
        }
    }

    /// Losses of `labels` for the hidden states of their rows [targets, C]; their gradient for a loss of
    /// `dloss * sum(nll)` where `dloss` is given. Logits exist for some rows at a time.
    ///
    /// # Errors
    /// Another number of labels than rows; the device's.
    pub fn head_loss(&self, hidden: &Tensor, labels: &Indices, dloss: Option<f64>) -> Result<HeadLoss> {
        self.on_pool(|| self.head_loss_here(hidden, labels, dloss))
    }

    fn head_loss_here(&self, hidden: &Tensor, labels: &Indices, dloss: Option<f64>) -> Result<HeadLoss> {
        let softmax = Softmax { vocab: self.config.vocab_size, scale: 1.0 / self.config.logits_scaling };
        let (mut nll, mut dhidden) = (Vec::new(), Vec::new());
        let step = head_rows(self.device().location());
        for start in (0..labels.len()).step_by(step) {
            let n = step.min(labels.len() - start);
            let labels = labels.view(start..start + n);
            let logits = self.head.forward(&hidden.narrow(0, start, n)?)?;
            let losses = cross_entropy::forward(&logits, labels, softmax)?;
            if let Some(dloss) = dloss {
                let dlogits = cross_entropy::backward(logits, labels, softmax, &losses, dloss)?;
                dhidden.push(self.head.backward(&dlogits, 1.0)?);
            }
            nll.push(losses.nll);
        }
        let nll = if nll.is_empty() { self.no_losses()? } else { Tensor::cat(&nll, 0)? };
        let dhidden = match dloss {
            Some(_) if dhidden.is_empty() => Some(hidden.clone()),
            Some(_) => Some(Tensor::cat(&dhidden, 0)?),
            None => None,
        };
        Ok(HeadLoss { nll, dhidden })
    }

    fn no_losses(&self) -> Result<Tensor> {
        let dtype = if self.device().is_cpu() { DType::F64 } else { DType::F32 };
        Ok(crate::ops::no_rows(1, dtype, self.device())?.flatten_all()?)
    }

    /// Logits [rows, V] of hidden states behind the last norm [rows, C].
    ///
    /// # Errors
    /// Another width; the device's.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        device::before(Work::Logits, hidden.dims()[0])?;
        let logits = self.head.forward_divided(hidden, self.config.logits_scaling)?;
        // Without the columns of a padded head, which are no tokens.
        Ok(logits.narrow(1, 0, self.config.vocab_size)?)
    }

    /// The gradient of the prompts, from that of the hidden states of the target rows. `prefix` is as in
    /// [`Granite::forward`]; `behind` is what example passes found for the keys and values of this pass's prefixes
    /// ([`Backward::prefixes`], added up). The tape is used up block by block.
    ///
    /// # Errors
    /// Shapes that do not fit; the device's.
    pub fn backward(
        &self,
        batch: &PackedBatch,
        tape: Tape,
        dhidden: &Tensor,
        prefix: Option<&[Tensor]>,
        behind: Option<&[Tensor]>,
        virtual_tokens: usize,
    ) -> Result<Backward> {
        self.on_pool(|| {
            let rows = Rows::new(self, batch)?;
            let Tape { blocks, last, .. } = tape;
            let mut dx = self.norm.backward(dhidden, &last.residual, &last.rstd, None)?;
            drop(last);
            let mut prefixes = Vec::new();
            for (i, (block, saved)) in self.blocks.iter().zip(blocks).enumerate().rev() {
                let needs = if i == 0 { Needs::Prefixes } else { Needs::All };
                let saved = match saved {
                    Saved::Whole(tape) => tape,
                    Saved::Input { residual, .. } => {
                        let normed = block.attention_norm.forward(&residual, None, self.inputs)?;
                        self.block(i, &rows, normed, prefix)?
                    }
                };
                let dstream = self.backward_mlp(block, &saved, &dx)?;
                let last = i + 1 == self.blocks.len();
                let inputs = self.attention_inputs(batch, &saved.qkv, prefix.map(|p| &p[i]), last);
                let dout = block.o.backward(&dstream, self.config.residual_multiplier)?;
                // What other passes found is added before the rotation's backward pass.
                let rotation = if behind.is_none() { rows.rotation(last) } else { None };
                let gradients =
                    self.attention.backward_rotated(inputs, &saved.attended, (&dout, rotation), needs)?;
                prefixes.extend(gradients.prefix);
                let rotated = gradients.rotated_back;
                let Some(dqkv) = gradients.qkv else { break };
                let dqkv = match behind {
                    Some(behind) => self.add_behind(dqkv, &behind[i])?,
                    None => dqkv,
                };
                dx = self.backward_qkv(block, &rows, &saved.attention, (dqkv, rotated), dstream, needs)?;
            }
            prefixes.reverse();
            if prefix.is_some() {
                return Ok(Backward { prompts: None, prefixes: Some(prefixes) });
            }
            let lookup = Lookup { ids: batch.ids.view(0..batch.prefix_rows), ..self.lookup(batch) };
            let prompts = embed::backward(&dx, virtual_tokens, &lookup)?;
            Ok(Backward { prompts: Some(prompts), prefixes: None })
        })
    }

    /// Gradient of the residual stream before the MLP.
    fn backward_mlp(&self, block: &Block, saved: &BlockTape, dx: &Tensor) -> Result<Tensor> {
        let da = block.down.backward(dx, self.config.residual_multiplier)?;
        let dnormed = block.gate_up.backward(&swiglu::backward(&da, &saved.gate_up)?, 1.0)?;
        block.mlp_norm.backward(&dnormed, &saved.mlp.residual, &saved.mlp.rstd, Some(dx))
    }

    /// Adds the gradient of keys and values [P, 2K D] that other passes found to that of the prefix rows.
    fn add_behind(&self, dqkv: Qkv, behind: &Tensor) -> Result<Qkv> {
        Ok(match dqkv {
            Qkv::Fused(t) => Qkv::Fused(rows::add_leading(t, behind, self.attention.q_width())?),
            Qkv::Split { q, kv } => Qkv::Split { q, kv: rows::add_leading(kv, behind, 0)? },
        })
    }

    /// Gradient of the block's input: of every row, or of the prefix rows.
    fn backward_qkv(
        &self,
        block: &Block,
        rows: &Rows,
        saved: &NormTape,
        (dqkv, rotated): (Qkv, bool),
        dstream: Tensor,
        needs: Needs,
    ) -> Result<Tensor> {
        let (h, k) = (self.attention.heads, self.attention.kv_heads);
        let n = if needs == Needs::All { rows.batch.ids.len() } else { rows.batch.prefix_rows };
        let positions = rows.batch.position_ids.view(0..n);
        let residual = saved.residual.narrow(0, 0, n)?;
        let rstd = saved.rstd.narrow(0, 0, n)?;
        let back = |x: Tensor, heads, positions| {
            if rotated { Ok(x) } else { rows.rotate(x, heads, positions, true) }
        };
        let (dnormed, past) = match dqkv {
            Qkv::Fused(t) => {
                let dnormed = block.qkv.backward(&back(t, h + k, positions)?, 1.0)?;
                (dnormed, Some(dstream.narrow(0, 0, n)?))
            }
            Qkv::Split { q, kv } => {
                let (q_layer, kv_layer) = &self.last_qkv;
                let dnormed = kv_layer.backward(&back(kv, k, positions)?, 1.0)?;
                if needs == Needs::Prefixes {
                    // A model of one block: no target row is a prefix row.
                    (dnormed, None)
                } else {
                    let dq = q_layer.backward(&back(q, h, (&rows.batch.target_positions).into())?, 1.0)?;
                    let dnormed = rows::add(dnormed, &dq, rows.targets())?;
                    (dnormed, Some(rows::backward(&dstream, rows.targets(), n)?))
                }
            }
        };
        block.attention_norm.backward(&dnormed, &residual, &rstd, past.as_ref())
    }
}
