//! The tensors of a model: one list, used for loading, random weights, byte counts, FLOPs, the memory plan, the check
//! for unknown tensors, and export.
//!
//! ```text
//! layer i   norm, [q k v], o, norm, [gate up], down         [..] a stack: projections of one input, in one matrix
//! outside   embedding, norm, head
//! ```

use super::ModelConfig;

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
    /// Name in the layer, such as `self_attn.q_proj`.
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
}

/// The tensors of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerTensors {
    /// Queries, keys, values.
    pub qkv: Stack,
    /// Attention's output.
    pub o: Stack,
    /// Gate, up.
    pub gate_up: Stack,
    /// The feed-forward network's output.
    pub down: Stack,
}

impl Stack {
    fn new(
        projections: &[(&'static str, usize)],
        inputs: usize,
        has_bias: bool,
        rows: ProjectionRows,
    ) -> Self {
        let projection = |&(name, outputs): &(&'static str, usize)| Projection { name, outputs, rows };
        Self { projections: projections.iter().map(projection).collect(), inputs, has_bias }
    }

    /// Size of all outputs together.
    pub fn outputs(&self) -> usize {
        self.projections.iter().map(|projection| projection.outputs).sum()
    }

    /// Number of values of the weights.
    pub fn weights(&self) -> usize {
        self.outputs() * self.inputs
    }

    /// Number of values of the biases.
    pub fn biases(&self) -> usize {
        if self.has_bias { self.outputs() } else { 0 }
    }
}

impl LayerTensors {
    /// Names of the norms' weights, `[C]`: before the mixer, and before the feed-forward network.
    pub const NORMS: [&str; 2] = ["input_layernorm.weight", "post_attention_layernorm.weight"];

    /// The tensors of a layer of this shape. With `merged` gate and up are one tensor, as in Granite 4's dense models.
    pub fn new(config: &ModelConfig, merged: bool) -> Self {
        use ProjectionRows::{Keys, Outputs, Queries};
        let (c, f) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let mut qkv = Stack::new(
            &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
            c,
            config.attention_bias,
            Keys,
        );
        qkv.projections[0].rows = Queries;
        let (gate_up, down): (&[_], _) = match merged {
            true => (&[("shared_mlp.input_linear", 2 * f)], "shared_mlp.output_linear"),
            false => (&[("mlp.gate_proj", f), ("mlp.up_proj", f)], "mlp.down_proj"),
        };
        Self {
            qkv,
            o: Stack::new(&[("self_attn.o_proj", c)], q, config.attention_bias, Outputs),
            gate_up: Stack::new(gate_up, c, config.mlp_bias, Outputs),
            down: Stack::new(&[(down, c)], f, config.mlp_bias, Outputs),
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
    pub fn stacks(&self) -> [&Stack; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// Names of all tensors in layer `layer` of the model.
    pub fn names(&self, layer: usize) -> impl Iterator<Item = String> + '_ {
        let of_stack = |stack: &Stack| {
            let endings = if stack.has_bias { &["weight", "bias"][..] } else { &["weight"] };
            let names = stack.projections.iter().map(|projection| projection.name);
            names
                .flat_map(|name| endings.iter().map(move |ending| format!("{name}.{ending}")))
                .collect::<Vec<_>>()
        };
        let norms = Self::NORMS.map(str::to_owned).into_iter();
        norms.chain(self.stacks().into_iter().flat_map(of_stack)).map(move |name| Self::name(layer, &name))
    }
}
