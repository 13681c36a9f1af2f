"""Checkpoints with experts and Mamba2 layers: their configurations, the values of their weights, and the margins of
the choices that a pass makes.

Routing is a step function of the router's logits, and a clamped time step has a gradient of 0. If rounding could send
a row to another expert, or a time step over a limit, a test would compare two functions. `Margins` asserts that no row
is that close.
"""

import math

import torch
import transformers

MULTIPLIERS = dict(embedding_multiplier=1.7, residual_multiplier=0.62, attention_multiplier=0.29, logits_scaling=1.6)
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
ATTENTION = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 tie_word_embeddings=True, **MULTIPLIERS)
# An expert's size is a multiple of 8: `torch._grouped_mm`, transformers' default, needs strides of 16 bytes.
EXPERTS = dict(num_local_experts=6, num_experts_per_tok=2, intermediate_size=16)
DENSE = dict(num_local_experts=0, num_experts_per_tok=0, intermediate_size=24)
# transformers pads every sequence to whole chunks; 16 rows instead of the hub's 256 change only how long it takes.
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=12, mamba_n_groups=1, mamba_chunk_size=16)

CHECKPOINTS = {
    "experts": dict(
        seed=18, stds=(0.3, 0.3), max_norms=(10.5, 6.1),
        config=transformers.GraniteMoeConfig(
            vocab_size=133, num_hidden_layers=3, rms_norm_eps=1e-6, rope_parameters=ROPE, **ATTENTION,
            num_local_experts=7, num_experts_per_tok=3, intermediate_size=16),
    ),
    "shared_experts": dict(
        seed=2, stds=(0.3, 0.3), max_norms=(3.8, 5.5),
        config=transformers.GraniteMoeSharedConfig(
            vocab_size=134, num_hidden_layers=3, rms_norm_eps=1e-6, rope_parameters=ROPE, **ATTENTION, **EXPERTS,
            shared_intermediate_size=21),
    ),
    "mamba": dict(
        seed=2, stds=(0.3, 0.3), max_norms=(8.7, 7.9),
        config=transformers.GraniteMoeHybridConfig(
            vocab_size=135, num_hidden_layers=4, rms_norm_eps=1e-5, position_embedding_type="nope", **ATTENTION,
            **DENSE, **MAMBA, shared_intermediate_size=28,
            layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"]),
    ),
    "mamba_experts": dict(
        seed=18, stds=(0.3, 0.3), max_norms=(5.3, 4.9),
        config=transformers.GraniteMoeHybridConfig(
            vocab_size=137, num_hidden_layers=3, rms_norm_eps=1e-5, position_embedding_type="nope", **ATTENTION,
            **EXPERTS, **MAMBA, shared_intermediate_size=20,
            layer_types=["linear_attention", "full_attention", "linear_attention"]),
    ),
    # No model of the hub has these: two groups, an inner width of 3 C, limits of the time step, rope beside Mamba2
    # layers, and attention in the last layer.
    "mamba_groups": dict(
        seed=1, stds=(0.3, 0.3), max_norms=(5.1, 2.5),
        config=transformers.GraniteMoeHybridConfig(
            vocab_size=138, num_hidden_layers=3, rms_norm_eps=1e-5, position_embedding_type="rope",
            rope_parameters=ROPE, **ATTENTION, **DENSE, shared_intermediate_size=28, mamba_expand=3, mamba_n_heads=6,
            mamba_d_head=16, mamba_d_state=10, mamba_n_groups=2, mamba_chunk_size=16, time_step_limit=(0.02, 1.8),
            layer_types=["linear_attention", "linear_attention", "full_attention"]),
    ),
}


def value(key, noise, generator):
    """The values of a weight of experts and Mamba2 layers, from standard normal `noise`; None for other weights.

    transformers' initial values of a Mamba2 layer forget within a token or two. These remember some tokens in some
    heads and hundreds in others.
    """
    def spread(low, high):
        order = torch.randperm(noise.numel(), generator=generator)
        return torch.linspace(low, high, noise.numel())[order]

    module = key.split(".")[-2]
    if key.endswith(".A_log"):
        return spread(-2.0, 2.0)
    if key.endswith(".dt_bias"):
        return spread(-3.0, 1.0)
    if key.endswith(".D"):
        return 1.0 + 0.3 * noise
    if key.endswith("conv1d.weight"):
        return 0.4 * noise
    return noise if module == "router" else None


class Margins:
    """Asserts of every row of every pass that no choice of the model is close, and remembers the smallest margins."""

    ROUTING = 1e-3  # of the logits: the last expert that is chosen before the first that is not
    TIME_STEP = 2e-5  # of the time step before softplus, from where the limits clamp it

    def __init__(self):
        self.routing = math.inf
        self.time_step = math.inf
        self.chosen = {}
        self.clamped = {"low": 0, "high": 0, "none": 0}
        self.mask = None

    def watch(self, base):
        """Hooks into a model and returns it; padding is left out by the attention mask of each pass."""
        base.model.register_forward_pre_hook(self._pass, with_kwargs=True)
        for name, module in base.named_modules():
            if name.endswith(".router"):
                module.register_forward_hook(lambda router, _, out, name=name: self._route(name, router, out))
            elif name.endswith(".mamba"):
                low, high = module.time_step_limit
                if low > 0 and high < math.inf:
                    module.in_proj.register_forward_hook(lambda _, inputs, out, mamba=module: self._step(mamba, out))
        return base

    def _pass(self, _, args, kwargs):
        assert not args
        inputs = kwargs.get("inputs_embeds")
        rows = (kwargs["input_ids"] if inputs is None else inputs).shape[1]
        mask = kwargs.get("attention_mask")
        self.mask = None if mask is None else mask[:, -rows:].bool()

    def _rows(self, values):
        """Rows that are no padding, of [batch, rows, n] or [batch * rows, n]."""
        values = values.detach().flatten(0, -2)
        return values if self.mask is None else values[self.mask.flatten()]

    def _route(self, name, router, out):
        logits, k = self._rows(out[0]), router.top_k
        top = logits.topk(k + 1)
        margin = (top.values[:, k - 1] - top.values[:, k]).min().item()
        assert margin > self.ROUTING, f"{name}: the logits of two experts differ by {margin} only"
        self.routing = min(self.routing, margin)
        chosen = self.chosen.setdefault(name, torch.zeros(logits.shape[1], dtype=torch.bool))
        chosen[top.indices[:, :k].flatten()] = True

    def _step(self, mamba, out):
        before = self._rows(out[..., -mamba.num_heads :]) + mamba.dt_bias
        for bound in mamba.time_step_limit:
            distance = (before - math.log(math.expm1(bound))).abs().min().item()
            assert distance > self.TIME_STEP, f"a time step is {distance} from the limit {bound}"
            self.time_step = min(self.time_step, distance)
        step = torch.nn.functional.softplus(before)
        low, high = ((step < mamba.time_step_limit[0]).sum().item(), (step > mamba.time_step_limit[1]).sum().item())
        for key, count in (("low", low), ("high", high), ("none", step.numel() - low - high)):
            self.clamped[key] += count

    def finish(self):
        """Asserts that all experts and both limits were in use; returns what cases.json says about the margins."""
        assert all(chosen.all() for chosen in self.chosen.values()), f"an expert without a row: {self.chosen}"
        margins = {}
        if self.chosen:
            margins["routing_margin"] = self.routing
        if self.time_step < math.inf:
            total = sum(self.clamped.values())
            assert min(self.clamped.values()) > 0.01 * total, self.clamped
            margins["time_step_margin"] = self.time_step
            margins["clamped_time_steps"] = {key: self.clamped[key] / total for key in ("low", "high")}
        return margins
