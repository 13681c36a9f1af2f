//! Mamba2 (Dao and Gu, 2024, arXiv:2405.21060; transformers `modeling_granitemoehybrid.py`, `GraniteMoeHybridMambaLayer`).
//!
//! ```text
//! z, xBC, dt = split(u Winᵀ)
//! x, B, C    = split(silu(conv(xBC)))            causal, by channels
//! y          = scan(x, B, C, dt)                 the state of each sequence begins with that at its prefix's end
//! out        = norm(y silu(z)) Woutᵀ
//! ```

use super::{
    InputGradient, LayerGradients, LayerPass, LayerPrefix, PrefixGradient, PrefixState, Stream, ToDevice,
};
use super::{LayerCachePart, OutputRows, other_kind};
use crate::checkpoint::{MambaConfig, ModelConfig};
use crate::model::memory::{MixerMemory, ValueSizes};
use crate::ops::conv::{self, ConvInputs, ConvWeights};
use crate::ops::gated_norm::{GatedNorm, GatedNormGradients, GatedNormed};
use crate::ops::ssd::{self, ScanStates, SsdInputs, SsdOutput, SsdShape, SsdWeights};
use crate::ops::{Linear, cpu, rows};
use crate::{Error, Result};
use candle_core::Tensor;

/// The frozen weights.
pub(in crate::model) struct Mamba2 {
    shape: SsdShape,
    /// z; x, B and C; dt: [2I + 2GN + M, C].
    input: Linear,
    /// The parts of `input`, which share its memory.
    parts: InputParts,
    conv: ConvWeights,
    scan: SsdWeights,
    norm: GatedNorm,
    /// [C, I].
    output: Linear,
}

/// The rows of the input projection.
struct InputParts {
    /// The gate, [I, C].
    z: Linear,
    /// x, B and C before the convolution, [X, C].
    xbc: Linear,
    /// The time steps, [M, C].
    dt: Linear,
}

/// What the backward pass needs.
pub(in crate::model) struct Mamba2Saved {
    /// [output rows, I].
    z: Tensor,
    /// [T, X].
    xbc: Tensor,
    /// [T, M].
    dt: Tensor,
    /// [output rows, I].
    y: Tensor,
    /// [output rows, G].
    rstd: Tensor,
    /// At the end of each prefix of this pass, if other passes read it.
    ends: Option<ScanStates>,
}

impl InputParts {
    fn new(input: &Linear, shape: &SsdShape) -> Result<Self> {
        let (i, x) = (shape.inner(), shape.width());
        Ok(Self {
            z: input.rows(0..i)?,
            xbc: input.rows(i..i + x)?,
            dt: input.rows(i + x..i + x + shape.heads)?,
        })
    }
}

impl Mamba2 {
    /// `vectors` are in the order of [`crate::checkpoint::tensors::MAMBA_VECTORS`].
    pub(super) fn new(
        config: &MambaConfig,
        eps: f64,
        [input, output]: [Linear; 2],
        vectors: &[Tensor],
    ) -> Result<Self> {
        let [conv, a_log, d, dt_bias, norm, bias @ ..] = vectors else {
            let found = format!("{} vectors", vectors.len());
            return Err(Error::Shape { op: "mamba2", expected: "at least 5 vectors".into(), found });
        };
        let bias = match bias.first() {
            Some(bias) => bias.clone(),
            None => conv.narrow(2, 0, 1)?.flatten_all()?.zeros_like()?,
        };
        let conv = ConvWeights { weight: conv.reshape((config.channels(), config.taps))?, bias };
        let scan = SsdWeights {
            a: a_log.exp()?.neg()?,
            d: d.clone(),
            dt_bias: dt_bias.clone(),
            dt_limit: config.dt_limit,
        };
        let norm = GatedNorm { weight: norm.clone(), groups: config.groups, eps };
        let shape = SsdShape {
            heads: config.heads,
            head_dim: config.head_dim,
            state: config.state,
            groups: config.groups,
        };
        let parts = InputParts::new(&input, &shape)?;
        Ok(Self { shape, input, parts, conv, scan, norm, output })
    }

    /// The memory that it needs in a layer.
    pub(in crate::model) fn memory(config: &ModelConfig, sizes: ValueSizes) -> MixerMemory {
        let ValueSizes { activation, operand, operand_copy, row_sum, .. } = sizes;
        let Some(mamba) = &config.mamba else { return MixerMemory::default() };
        let (c, i, m, x) = (config.hidden_size, mamba.inner(), mamba.heads, mamba.channels());
        let state = (i * mamba.state + (mamba.taps - 1) * x) * row_sum;
        MixerMemory {
            saved: x * operand + m * row_sum,
            saved_per_output: 2 * i * operand + mamba.groups * row_sum,
            state_per_prefix: state,
            // What was summed so far, and what the next pass adds.
            state_gradient_per_prefix: 2 * state,
            // The stream's gradients; y, dy and dz; x, B and C after the convolution and their gradients.
            workspace: (4 * c + 3 * i + 3 * x) * activation + (i + x) * operand_copy,
            last_workspace: (5 * c + 2 * i + 3 * x) * activation + x * operand_copy,
            ..MixerMemory::default()
        }
    }

    pub(super) fn projections(&self) -> [&Linear; 2] {
        [&self.input, &self.output]
    }

    pub(super) fn to_device(&self, change: ToDevice) -> Result<Self> {
        let input = change.linear(&self.input)?;
        Ok(Self {
            shape: self.shape,
            parts: InputParts::new(&input, &self.shape)?,
            input,
            conv: ConvWeights {
                weight: change.vector(&self.conv.weight)?,
                bias: change.vector(&self.conv.bias)?,
            },
            scan: SsdWeights {
                a: change.vector(&self.scan.a)?,
                d: change.vector(&self.scan.d)?,
                dt_bias: change.vector(&self.scan.dt_bias)?,
                dt_limit: self.scan.dt_limit,
            },
            norm: GatedNorm { weight: change.vector(&self.norm.weight)?, ..self.norm.clone() },
            output: change.linear(&self.output)?,
        })
    }

    pub(super) fn forward(
        &self,
        normed: Tensor,
        residual: &Tensor,
        pass: &LayerPass,
        prefix: Option<&PrefixState>,
    ) -> Result<(Stream, Mamba2Saved)> {
        let states = prefix.map(PrefixState::scan).transpose()?;
        self.run(&normed, residual, pass, states)
    }

    /// The residual stream after the mixer; each sequence goes on from its state in `cache`, to which its new one is written.
    pub(super) fn infer(
        &self,
        normed: &Tensor,
        residual: Tensor,
        pass: &LayerPass,
        (cache, layer): LayerCachePart,
    ) -> Result<Stream> {
        let (stream, saved) = self.run(normed, &residual, pass, Some(cache.scan_states(layer)?))?;
        if let Some(ends) = &saved.ends {
            cache.write_scan_states(layer, ends)?;
        }
        Ok(stream)
    }

    fn run(
        &self,
        normed: &Tensor,
        residual: &Tensor,
        pass: &LayerPass,
        states: Option<&ScanStates>,
    ) -> Result<(Stream, Mamba2Saved)> {
        let InputParts { z, xbc, dt } = &self.parts;
        let z = z.forward_to(&pass.output_rows_of(normed)?, pass.input_dtype)?;
        let xbc = xbc.forward_to(normed, pass.input_dtype)?;
        let dt = dt.forward(normed)?;
        let convolution = conv_inputs(&xbc, pass, states);
        let SsdOutput { y, ends: ssm } = {
            let convolved = conv::forward(convolution, &self.conv, pass.dtype)?;
            ssd::forward(scan_inputs(&convolved, &dt, pass, states), &self.shape, &self.scan)?
        };
        let y = cpu::to_storage("mamba2", &pass.output_rows_of(&y)?, pass.input_dtype)?;
        let GatedNormed { normed: gated, rstd } = self.norm.forward(&y, &z, pass.input_dtype)?;
        let ends = match (ssm, conv::ends(convolution, self.conv.weight.dims2()?.1)?) {
            (Some(ssm), Some(conv)) => Some(ScanStates { ssm, conv }),
            _ => None,
        };
        let residual = pass.output_rows_of(residual)?;
        let stream = Stream::project(residual, &self.output, &gated, pass.residual_multiplier)?;
        Ok((stream, Mamba2Saved { z, xbc, dt, y, rstd, ends }))
    }

    /// Gradients from `dstream`, that of the residual stream after the mixer.
    pub(super) fn backward(
        &self,
        dstream: &Tensor,
        saved: &Mamba2Saved,
        pass: &LayerPass,
        prefix: LayerPrefix,
    ) -> Result<LayerGradients> {
        let Mamba2Saved { z, xbc, dt, y, rstd, .. } = saved;
        let states = prefix.state.map(PrefixState::scan).transpose()?;
        let dends = prefix.gradient.map(PrefixGradient::scan).transpose()?;
        let dgated = self.output.backward(dstream, pass.residual_multiplier)?;
        let GatedNormGradients { y: dy, z: dz } = self.norm.backward(&dgated, y, z, rstd)?;
        drop(dgated);
        let rows = pass.batch.ids.len();
        let dy = match pass.output_rows {
            OutputRows::All => dy,
            OutputRows::Targets => rows::backward(&dy, pass.targets(), rows)?,
        };
        let convolution = conv_inputs(xbc, pass, states);
        let gradients = {
            let convolved = conv::forward(convolution, &self.conv, pass.dtype)?;
            let inputs = scan_inputs(&convolved, dt, pass, states);
            ssd::backward((&dy, dends.map(|dends| &dends.ssm)), inputs, &self.shape, &self.scan)?
        };
        drop(dy);
        let dconvolved = (&gradients.xbc, dends.map(|dends| &dends.conv));
        let before_conv = conv::backward(dconvolved, convolution, &self.conv)?;
        let states = match (gradients.states, before_conv.tails) {
            (Some(ssm), Some(conv)) => Some(PrefixGradient::Scan(ScanStates { ssm, conv })),
            _ => None,
        };
        if states.is_some() && pass.input_gradient == InputGradient::Prefixes {
            return Ok(LayerGradients { input: None, prefix: states });
        }
        let input = self.backward_input(&dz, &before_conv.x, &gradients.dt, pass)?;
        Ok(LayerGradients { input: Some(input), prefix: states })
    }

    /// The gradient of the normed input, from those of z, of x, B and C, and of dt.
    fn backward_input(&self, dz: &Tensor, dxbc: &Tensor, ddt: &Tensor, pass: &LayerPass) -> Result<Tensor> {
        let InputParts { z, xbc, dt } = &self.parts;
        let n = pass.gradient_rows();
        let first = |gradient: &Tensor| gradient.narrow(0, 0, n);
        let dnormed = (xbc.backward(&first(dxbc)?, 1.0)? + dt.backward(&first(ddt)?, 1.0)?)?;
        match (pass.output_rows, pass.input_gradient) {
            (OutputRows::All, _) => Ok((dnormed + z.backward(&first(dz)?, 1.0)?)?),
            (OutputRows::Targets, InputGradient::All) => {
                rows::add(dnormed, &z.backward(dz, 1.0)?, pass.targets())
            }
            // A model of one layer: no target row is a prefix row.
            (OutputRows::Targets, InputGradient::Prefixes) => Ok(dnormed),
        }
    }
}

/// What the convolution reads.
fn conv_inputs<'a>(xbc: &'a Tensor, pass: &'a LayerPass, states: Option<&'a ScanStates>) -> ConvInputs<'a> {
    ConvInputs { x: xbc, plan: &pass.batch.scan, tails: states.map(|states| &states.conv) }
}

/// What the scan reads.
fn scan_inputs<'a>(
    xbc: &'a Tensor,
    dt: &'a Tensor,
    pass: &'a LayerPass,
    states: Option<&'a ScanStates>,
) -> SsdInputs<'a> {
    SsdInputs { xbc, dt, plan: &pass.batch.scan, states: states.map(|states| &states.ssm) }
}

impl Mamba2Saved {
    /// The state at the end of each prefix.
    pub(super) fn prefix_state(&self) -> Result<PrefixState> {
        match &self.ends {
            Some(ends) => Ok(PrefixState::Scan(ends.clone())),
            None => Err(other_kind("prefix state of a pass that shares none")),
        }
    }
}
