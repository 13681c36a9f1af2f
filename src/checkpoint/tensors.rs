//! The tensors of a model: one list, used for loading, random weights, byte counts, FLOPs, the memory plan, the check
//! for unknown tensors, and export.
//!
//! ```text
//! layer     norm, mixer, norm, feed-forward network
//!   mixer   attention            [q k v], o
//!           Mamba2               [z x B C dt], out; conv, A_log, D, dt_bias, norm
//!   network dense                [gate up], down
//!           experts              router, [gate up] of each expert, down of each expert
//! outside   embedding, norm, head                    [..] a stack: projections of one input, in one matrix
//! ```

use super::{ExpertsConfig, MambaConfig, MixerKind, ModelConfig};

/// Name of the embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last norm.
pub(crate) const NORM: &str = "model.norm.weight";
/// Name of the head.
pub(crate) const HEAD: &str = "lm_head.weight";

/// The rows of a pass that a projection multiplies. The last layer computes outputs for target rows only, and below the
/// first layer only prefix rows need a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProjectionRows {
    /// Every row: keys and values.
    Keys,
    /// Rows whose output is needed; the gradient continues to the layer's input.
    Queries,
    /// Rows whose output is needed; the gradient continues to the mixer.
    Outputs,
}

/// One linear projection of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    /// Name in the layer, such as `self_attn.q_proj`; projections that follow one another with the same name are one tensor.
    pub name: &'static str,
    /// Size of the output.
    pub outputs: usize,
    /// Which rows it multiplies.
    pub rows: ProjectionRows,
}

/// Projections of the same input, which are stored in one matrix, one below the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// The projections, from the first row on.
    pub projections: Vec<Projection>,
    /// Size of the input.
    pub inputs: usize,
    /// Whether each has a bias.
    pub has_bias: bool,
    /// Experts, each of which has such a matrix, one below the other: tensors of [E, outputs, inputs].
    pub experts: Option<ExpertsConfig>,
}

/// A tensor that no row of an input is multiplied with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerVector {
    /// Name in the layer, such as `mamba.A_log`.
    pub name: &'static str,
    /// The shape in transformers' files.
    pub shape: Vec<usize>,
}

/// The tensors of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTensors {
    /// Of the mixer.
    pub mixer: MixerTensors,
    /// Of the dense feed-forward network.
    pub dense: Option<DenseTensors>,
    /// Of the experts.
    pub experts: Option<ExpertsTensors>,
}

/// The tensors of a mixer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MixerTensors {
    /// Of attention.
    Attention {
        /// Queries, keys, values.
        qkv: Stack,
        /// Attention's output.
        o: Stack,
    },
    /// Of a Mamba2 layer.
    Mamba2 {
        /// z; x, B and C; dt.
        input: Stack,
        /// The output.
        output: Stack,
        /// In the order of [`MAMBA_VECTORS`], without the bias of a convolution that has none.
        vectors: Vec<LayerVector>,
    },
}

/// The tensors of a dense feed-forward network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseTensors {
    /// Gate, up.
    pub gate_up: Stack,
    /// The output.
    pub down: Stack,
}

/// The tensors of experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertsTensors {
    /// [E, C].
    pub router: Stack,
    /// Gate and up of each expert.
    pub gate_up: Stack,
    /// The output of each expert.
    pub down: Stack,
}

/// Names of a Mamba2 layer's vectors.
pub const MAMBA_VECTORS: [&str; 6] = [
    "mamba.conv1d.weight", "mamba.A_log", "mamba.D", "mamba.dt_bias", "mamba.norm.weight",
    "mamba.conv1d.bias",
];

impl Stack {
    fn new(
        projections: &[(&'static str, usize)],
        inputs: usize,
        has_bias: bool,
        rows: ProjectionRows,
    ) -> Self {
        let projection = |&(name, outputs): &(&'static str, usize)| Projection { name, outputs, rows };
        Self { projections: projections.iter().map(projection).collect(), inputs, has_bias, experts: None }
    }

    /// The same matrix of each expert.
    fn of_experts(name: &'static str, outputs: usize, inputs: usize, experts: ExpertsConfig) -> Self {
        Self {
            experts: Some(experts),
            ..Self::new(&[(name, outputs)], inputs, false, ProjectionRows::Outputs)
        }
    }

    /// Size of all outputs together, of one expert.
    pub fn outputs(&self) -> usize {
        self.projections.iter().map(|projection| projection.outputs).sum()
    }

    /// Rows of the matrix: the outputs of all experts.
    pub fn rows(&self) -> usize {
        self.outputs() * self.experts.map_or(1, |experts| experts.count)
    }

    /// Number of values of the weights.
    pub fn weights(&self) -> usize {
        self.rows() * self.inputs
    }

    /// Number of values of the biases.
    pub fn biases(&self) -> usize {
        if self.has_bias { self.outputs() } else { 0 }
    }

    /// The tensors from the first row on: name in the layer, and rows.
    pub fn tensors(&self) -> Vec<(&'static str, usize)> {
        let parts = self.projections.chunk_by(|a, b| a.name == b.name);
        let experts = self.experts.map_or(1, |experts| experts.count);
        parts
            .map(|parts| (parts[0].name, experts * parts.iter().map(|part| part.outputs).sum::<usize>()))
            .collect()
    }

    /// Shape of a tensor of `rows` rows in transformers' files.
    pub fn shape(&self, rows: usize) -> Vec<usize> {
        match self.experts {
            None => vec![rows, self.inputs],
            Some(experts) => vec![experts.count, rows / experts.count, self.inputs],
        }
    }
}

impl LayerVector {
    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

impl MixerTensors {
    fn attention(config: &ModelConfig) -> Self {
        use ProjectionRows::{Keys, Outputs, Queries};
        let c = config.hidden_size;
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let mut qkv = Stack::new(
            &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
            c,
            config.attention_bias,
            Keys,
        );
        qkv.projections[0].rows = Queries;
        Self::Attention { qkv, o: Stack::new(&[("self_attn.o_proj", c)], q, config.attention_bias, Outputs) }
    }

    fn mamba2(config: &ModelConfig, mamba: &MambaConfig) -> Self {
        use ProjectionRows::{Keys, Outputs, Queries};
        const INPUT: &str = "mamba.in_proj";
        let (c, i, m, x) = (config.hidden_size, mamba.inner(), mamba.heads, mamba.channels());
        let mut input = Stack::new(&[(INPUT, i), (INPUT, x), (INPUT, m)], c, false, Keys);
        input.projections[0].rows = Queries;
        let shapes = [vec![x, 1, mamba.taps], vec![m], vec![m], vec![m], vec![i], vec![x]];
        let vectors = MAMBA_VECTORS.into_iter().zip(shapes).map(|(name, shape)| LayerVector { name, shape });
        let vectors = vectors.take(MAMBA_VECTORS.len() - usize::from(!mamba.conv_bias)).collect();
        Self::Mamba2 { input, output: Stack::new(&[("mamba.out_proj", c)], i, false, Outputs), vectors }
    }
}

impl DenseTensors {
    fn new(config: &ModelConfig, merged: bool) -> Self {
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let (gate_up, down): (&[_], _) = match merged {
            true => (&[("shared_mlp.input_linear", 2 * f)], "shared_mlp.output_linear"),
            false => (&[("mlp.gate_proj", f), ("mlp.up_proj", f)], "mlp.down_proj"),
        };
        Self {
            gate_up: Stack::new(gate_up, c, config.mlp_bias, ProjectionRows::Outputs),
            down: Stack::new(&[(down, c)], f, config.mlp_bias, ProjectionRows::Outputs),
        }
    }
}

impl ExpertsTensors {
    fn new(config: &ModelConfig, experts: ExpertsConfig) -> Self {
        let (c, ExpertsConfig { count, size, .. }) = (config.hidden_size, experts);
        let router = &[("block_sparse_moe.router.layer", count)];
        Self {
            router: Stack::new(router, c, false, ProjectionRows::Outputs),
            gate_up: Stack::of_experts("block_sparse_moe.input_linear", 2 * size, c, experts),
            down: Stack::of_experts("block_sparse_moe.output_linear", c, size, experts),
        }
    }
}

impl LayerTensors {
    /// Names of the norms' weights, `[C]`: before the mixer, and before the feed-forward network.
    pub const NORMS: [&str; 2] = ["input_layernorm.weight", "post_attention_layernorm.weight"];

    /// The tensors of layer `layer` of a model of this shape. With `merged` gate and up are one tensor, as in Granite 4's
    /// models.
    pub fn new(config: &ModelConfig, layer: usize, merged: bool) -> Self {
        let mixer = match (config.mixer(layer), &config.mamba) {
            (MixerKind::Mamba2, Some(mamba)) => MixerTensors::mamba2(config, mamba),
            _ => MixerTensors::attention(config),
        };
        Self {
            mixer,
            dense: (config.intermediate_size > 0).then(|| DenseTensors::new(config, merged)),
            experts: config.experts.map(|experts| ExpertsTensors::new(config, experts)),
        }
    }

    /// Name of a tensor that a layer has only if gate and up are one tensor.
    pub fn merged_name(layer: usize) -> String {
        Self::name(layer, "shared_mlp.input_linear.weight")
    }

    /// Name of a layer's tensor in the model.
    pub fn name(layer: usize, tensor: &str) -> String {
        format!("model.layers.{layer}.{tensor}")
    }

    /// All stacks.
    pub fn stacks(&self) -> impl Iterator<Item = &Stack> {
        let mixer = match &self.mixer {
            MixerTensors::Attention { qkv, o } => [qkv, o],
            MixerTensors::Mamba2 { input, output, .. } => [input, output],
        };
        let dense = self.dense.iter().flat_map(|DenseTensors { gate_up, down }| [gate_up, down]);
        let experts =
            self.experts.iter().flat_map(|ExpertsTensors { router, gate_up, down }| [router, gate_up, down]);
        mixer.into_iter().chain(dense).chain(experts)
    }

    /// All vectors but the norms before the mixer and the feed-forward network.
    pub fn vectors(&self) -> &[LayerVector] {
        match &self.mixer {
            MixerTensors::Attention { .. } => &[],
            MixerTensors::Mamba2 { vectors, .. } => vectors,
        }
    }

    /// Names of all tensors in layer `layer` of the model.
    pub fn names(&self, layer: usize) -> impl Iterator<Item = String> + '_ {
        let of_stack = |stack: &Stack| {
            let endings = if stack.has_bias { &["weight", "bias"][..] } else { &["weight"] };
            let names = stack.tensors().into_iter().map(|(name, _)| name);
            names
                .flat_map(|name| endings.iter().map(move |ending| format!("{name}.{ending}")))
                .collect::<Vec<_>>()
        };
        let vectors = self.vectors().iter().map(|vector| vector.name.to_owned());
        let norms = Self::NORMS.map(str::to_owned).into_iter();
        norms.chain(vectors).chain(self.stacks().flat_map(of_stack)).map(move |name| Self::name(layer, &name))
    }
}
