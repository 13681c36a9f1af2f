//! Grouped-query attention with rotary positions (transformers `modeling_granite.py`, `GraniteAttention`).

use super::{
    InputGradient, LayerGradients, LayerPass, LayerPrefix, OutputRows, PrefixGradient, PrefixState, Stream,
};
use crate::checkpoint::ModelConfig;
use crate::model::KvCache;
use crate::model::memory::{MixerMemory, ValueSizes};
use crate::ops::attention::{AttentionOutputSaved, AttentionShape, GradTargets, Inputs, Qkv};
use crate::ops::backend::{Route, route};
use crate::ops::{Linear, rope, rows};
use crate::{Error, Result};
use candle_core::Tensor;

/// The frozen weights.
pub(in crate::model) struct Attention {
    pub(in crate::model) shape: AttentionShape,
    /// Queries, keys, values: [(H + 2K) D, C].
    pub(in crate::model) qkv: Linear,
    /// [C, H D].
    pub(in crate::model) o: Linear,
    /// In the last layer `qkv` in two parts, since queries are wanted of target rows only.
    split: Option<SplitQkv>,
}

/// Parts of the matrix of queries, keys and values.
struct SplitQkv {
    q: Linear,
    kv: Linear,
}

/// What the backward pass needs.
pub(in crate::model) struct AttentionSaved {
    qkv: Qkv,
    attended: AttentionOutputSaved,
}

/// The heads of attention in a model of this shape.
pub(in crate::model) fn attention_shape(config: &ModelConfig) -> AttentionShape {
    AttentionShape {
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        scale: config.attention_multiplier,
    }
}

impl Attention {
    /// For a layer whose output is wanted of `output_rows`.
    pub(in crate::model) fn new(
        shape: AttentionShape,
        qkv: Linear,
        o: Linear,
        output_rows: OutputRows,
    ) -> Result<Self> {
        let (q, kv) = (shape.q_width(), shape.kv_width());
        let split = match output_rows {
            OutputRows::All => None,
            OutputRows::Targets => Some(SplitQkv { q: qkv.rows(0..q)?, kv: qkv.rows(q..q + kv)? }),
        };
        Ok(Self { shape, qkv, o, split })
    }

    /// The memory that it needs in a layer.
    pub(in crate::model) fn memory(config: &ModelConfig, sizes: ValueSizes) -> MixerMemory {
        let ValueSizes { activation, operand, operand_copy, row_sum, keeps_attention_output } = sizes;
        let (c, h) = (config.hidden_size, config.num_attention_heads);
        let (q, kv) = (h * config.head_dim, 2 * config.num_key_value_heads * config.head_dim);
        let output = if keeps_attention_output { q * activation } else { 0 };
        MixerMemory {
            saved: kv * operand,
            saved_per_output: q * operand + output + h * row_sum,
            prefix_state: kv * operand,
            prefix_gradient: kv * row_sum,
            workspace: (4 * c + q + (q + kv)) * activation + (q + (q + kv)) * operand_copy,
            last_workspace: (5 * c + kv) * activation + kv * operand_copy,
            ..MixerMemory::default()
        }
    }

    /// The same with each projection changed by `change`.
    pub(super) fn with_projections(&self, change: impl Fn(&Linear) -> Result<Linear>) -> Result<Self> {
        let output_rows = if self.split.is_some() { OutputRows::Targets } else { OutputRows::All };
        Self::new(self.shape, change(&self.qkv)?, change(&self.o)?, output_rows)
    }

    pub(super) fn projections(&self) -> [&Linear; 2] {
        [&self.qkv, &self.o]
    }

    pub(super) fn forward(
        &self,
        normed: Tensor,
        residual: &Tensor,
        pass: &LayerPass,
        prefix: Option<&PrefixState>,
    ) -> Result<(Stream, AttentionSaved)> {
        let qkv = self.qkv(&normed, pass)?;
        drop(normed);
        let attended = self.shape.forward(inputs(pass, &qkv, prefix)?)?;
        let residual = pass.output_rows_of(residual)?;
        let stream = Stream::project(residual, &self.o, &attended.out, pass.residual_multiplier)?;
        Ok((stream, AttentionSaved { qkv, attended: attended.saved() }))
    }

    /// Queries, keys and values with rotary positions.
    fn qkv(&self, normed: &Tensor, pass: &LayerPass) -> Result<Qkv> {
        let (h, k) = (self.shape.heads, self.shape.kv_heads);
        let positions = (&pass.batch.position_ids).into();
        let Some(SplitQkv { q, kv }) = &self.split else {
            let qkv = self.qkv.forward_to(normed, pass.input_dtype)?;
            return Ok(Qkv::Fused(pass.rotate(qkv, h + k, positions)?));
        };
        let q = q.forward_to(&pass.output_rows_of(normed)?, pass.input_dtype)?;
        Ok(Qkv::Split {
            q: pass.rotate(q, h, pass.output_positions())?,
            kv: pass.rotate(kv.forward_to(normed, pass.input_dtype)?, k, positions)?,
        })
    }

    /// The residual stream after attention over `cache`, to which this pass's keys and values are written.
    pub(super) fn infer(
        &self,
        normed: &Tensor,
        residual: Tensor,
        pass: &LayerPass,
        (cache, layer): (&mut KvCache, usize),
    ) -> Result<Stream> {
        let q = match route(normed) {
            Route::Kernel => self.queries_by_kernel(normed, pass, cache, layer)?,
            Route::Cpu => self.queries(normed, pass, cache, layer)?,
        };
        let qkv = Qkv::Split { q, kv: cache.keys_values(layer)?.clone() };
        let attended = self.shape.forward(inputs(pass, &qkv, None)?)?;
        let residual = pass.output_rows_of(&residual)?;
        Stream::project(residual, &self.o, &attended.out, pass.residual_multiplier)
    }

    /// Queries of the rows whose output is wanted.
    fn queries(
        &self,
        normed: &Tensor,
        pass: &LayerPass,
        cache: &mut KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        let qkv = self.qkv(normed, pass)?;
        let (kv, kv_width) = (qkv.keys_values(), self.shape.kv_width());
        cache.write(layer, &kv.narrow(1, kv.dims()[1] - kv_width, kv_width)?)?;
        Ok(qkv.queries().narrow(1, 0, self.shape.q_width())?.contiguous()?)
    }

    /// The same by one kernel, which rotates and writes keys and values to the cache.
    fn queries_by_kernel(
        &self,
        normed: &Tensor,
        pass: &LayerPass,
        cache: &KvCache,
        layer: usize,
    ) -> Result<Tensor> {
        let write = |qkv: &Tensor, shape: &AttentionShape| {
            rope::forward_to_cache(
                pass.rope,
                qkv,
                shape,
                (&pass.batch.position_ids).into(),
                cache.rows(layer)?,
            )
        };
        let Some(SplitQkv { q, kv }) = &self.split else {
            return write(&self.qkv.forward_to(normed, pass.input_dtype)?, &self.shape);
        };
        write(&kv.forward_to(normed, pass.input_dtype)?, &AttentionShape { heads: 0, ..self.shape })?;
        let q = q.forward_to(&pass.output_rows_of(normed)?, pass.input_dtype)?;
        pass.rotate(q, self.shape.heads, pass.output_positions())
    }

    /// Gradients from `dstream`, that of the residual stream after attention.
    pub(super) fn backward(
        &self,
        dstream: &Tensor,
        saved: &AttentionSaved,
        pass: &LayerPass,
        prefix: LayerPrefix,
    ) -> Result<LayerGradients> {
        let dout = self.o.backward(dstream, pass.residual_multiplier)?;
        // The gradient of other passes is added before the rotation's backward pass.
        let rotation = if prefix.gradient.is_none() { pass.rotation() } else { None };
        let needs = match pass.input_gradient {
            InputGradient::All => GradTargets::All,
            InputGradient::Prefixes => GradTargets::Prefixes,
        };
        let inputs = inputs(pass, &saved.qkv, prefix.state)?;
        let gradients = self.shape.backward_rotated(inputs, &saved.attended, (&dout, rotation), needs)?;
        drop(dout);
        let state = gradients.prefix.map(PrefixGradient::KeysValues);
        let Some(mut dqkv) = gradients.qkv else { return Ok(LayerGradients { input: None, prefix: state }) };
        if let Some(gradient) = prefix.gradient {
            dqkv = self.add_prefix_gradient(dqkv, gradient.keys_values()?)?;
        }
        let input = self.backward_qkv(dqkv, gradients.rotated_back, pass)?;
        Ok(LayerGradients { input: Some(input), prefix: state })
    }

    /// Adds the gradient of keys and values [P, 2K D] that other passes have to that of the prefix rows.
    fn add_prefix_gradient(&self, dqkv: Qkv, gradient: &Tensor) -> Result<Qkv> {
        Ok(match dqkv {
            Qkv::Fused(t) => Qkv::Fused(rows::add_leading(t, gradient, self.shape.q_width())?),
            Qkv::Split { q, kv } => Qkv::Split { q, kv: rows::add_leading(kv, gradient, 0)? },
        })
    }

    /// The gradient of the normed input, from that of queries, keys and values.
    fn backward_qkv(&self, dqkv: Qkv, is_rotated_back: bool, pass: &LayerPass) -> Result<Tensor> {
        let (h, k) = (self.shape.heads, self.shape.kv_heads);
        let positions = pass.batch.position_ids.view(0..pass.gradient_rows());
        let back = |dy: Tensor, heads, positions| {
            if is_rotated_back { Ok(dy) } else { pass.rotate_backward(dy, heads, positions) }
        };
        match (dqkv, &self.split) {
            (Qkv::Fused(dqkv), _) => self.qkv.backward(&back(dqkv, h + k, positions)?, 1.0),
            (Qkv::Split { q: dq, kv: dkv }, Some(SplitQkv { q, kv })) => {
                let dnormed = kv.backward(&back(dkv, k, positions)?, 1.0)?;
                if pass.input_gradient == InputGradient::Prefixes {
                    // A model of one layer: no target row is a prefix row.
                    return Ok(dnormed);
                }
                let dq = q.backward(&back(dq, h, pass.output_positions())?, 1.0)?;
                rows::add(dnormed, &dq, pass.targets())
            }
            (Qkv::Split { .. }, None) => Err(Error::Invalid(
                "attention: expected queries, keys and values in one matrix, found two; only the last layer has two".into(),
            )),
        }
    }
}

impl AttentionSaved {
    /// Keys and values of the first `rows` rows, as a view.
    pub(super) fn prefix_state(&self, rows: usize) -> Result<PrefixState> {
        Ok(PrefixState::KeysValues(self.qkv.keys_values().narrow(0, 0, rows)?))
    }

    /// The same as a matrix of its own, [rows, 2K D]: a view would keep the queries and the other rows in memory too.
    pub(super) fn own_prefix_state(&self, rows: usize, shape: &AttentionShape) -> Result<PrefixState> {
        let (kv, width) = (self.qkv.keys_values(), shape.kv_width());
        let columns = kv.dims()[1];
        let own = kv.narrow(0, 0, rows)?.narrow(1, columns - width, width)?.force_contiguous()?;
        Ok(PrefixState::KeysValues(own))
    }
}

/// What attention reads.
fn inputs<'a>(pass: &'a LayerPass, qkv: &'a Qkv, prefix: Option<&'a PrefixState>) -> Result<Inputs<'a>> {
    let segments = match pass.output_rows {
        OutputRows::All => &pass.batch.segments,
        OutputRows::Targets => &pass.batch.target_segments,
    };
    Ok(Inputs { segments, qkv, prefix: prefix.map(PrefixState::keys_values).transpose()? })
}
