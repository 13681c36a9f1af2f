"""Writes reparameterizations.json: rows that a prompt's networks make, and gradients of all their parameters, in f64; and
reparameterizations.safetensors, the parameters before and after ten steps of training on granite/, in f32.

    python tests/golden/reparameterizations.py

The encoders of P-tuning and of prefix tuning are PEFT's own modules. Residual Prompt Tuning is no part of PEFT: its network is
made of torch's modules, in the order of the paper (arXiv:2305.03937, section 3.2).
"""

from pathlib import Path

from generate import Draw
from oracle import TRAINING, Run, load, quiet_and_deterministic, train, versions, write_json, write_tensors

import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from peft.tuners.p_tuning.model import PromptEncoder
from peft.tuners.prefix_tuning.model import PrefixEncoder

HERE = Path(__file__).resolve().parent
P_TUNING_MAX_NORM, PREFIX_MAX_NORM = 6.0, 0.22


class Residual(torch.nn.Module):
    """row = p + LayerNorm(up relu(down p)). The order of the attributes is that of the parameters."""

    def __init__(self, rows, width, bottleneck):
        super().__init__()
        self.prompt_embeddings = torch.nn.Parameter(torch.empty(rows, width))
        self.down = torch.nn.Linear(width, bottleneck)
        self.up = torch.nn.Linear(bottleneck, width)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, _):
        p = self.prompt_embeddings
        return p + self.norm(self.up(torch.relu(self.down(p))))


def p_tuning(rows, width, hidden):
    return PromptEncoder(PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=rows, token_dim=width, num_transformer_submodules=1,
        encoder_reparameterization_type="MLP", encoder_hidden_size=hidden))


def prefix_projection(rows, token_dim, layers, hidden):
    return PrefixEncoder(PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=rows, token_dim=token_dim, num_layers=layers, num_attention_heads=1,
        num_transformer_submodules=1, encoder_hidden_size=hidden, prefix_projection=True))


def case(kind, reparameterization, module, rows, generator):
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)
    parameters = list(module.named_parameters())
    out = module(torch.arange(rows))
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(gradient)
    numbers = lambda tensor: tensor.detach().flatten().tolist()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in parameters)
    return {
        "kind": kind, "reparameterization": reparameterization, "rows": rows, "width": out.shape[1],
        "parameters": [{"name": name, "shape": list(p.shape), "values": numbers(p), "gradient": numbers(p.grad)}
                       for name, p in parameters],
        "prefix": numbers(out), "prefix_gradient": numbers(gradient),
    }


def training(run, kind, config, tensors):
    """Ten steps of PEFT's prompt encoder on granite/: its parameters one after another, and the last prefix."""
    name = run.name
    draw = Draw(91, HERE / "granite")
    torch.manual_seed(5)
    pool = draw.examples(draw.ids(2), [(draw.random.randint(3, 11), draw.random.randint(1, 3)) for _ in range(12)])
    model = get_peft_model(load(HERE / "granite"), config).train()
    encoder = model.prompt_encoder["default"]
    named = list(encoder.named_parameters())
    flat = lambda: torch.cat([p.detach().flatten() for _, p in named])
    tensors[f"{name}.prompt"] = flat().clone()
    records = train(run, draw, pool, model, [p for _, p in named])
    with torch.no_grad():
        rows = encoder(torch.arange(config.num_virtual_tokens))
    tensors[f"{name}.final_values"], tensors[f"{name}.final_prompt"] = flat().clone(), rows
    shapes = {n: list(p.shape) for n, p in named}
    return {"name": name, **TRAINING, "max_norm": run.max_norm, "kind": kind, "reparameterization": "mlp",
            "prompt": f"{name}.prompt", "final_values": f"{name}.final_values", "final_prompt": f"{name}.final_prompt",
            "num_virtual_tokens": config.num_virtual_tokens, "width": rows.shape[1], "parameters": shapes,
            "examples": pool, "steps": records}


def trainings(tensors):
    common = dict(task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=24)
    return [
        training(Run("p_tuning", 2, 3, P_TUNING_MAX_NORM), "embeddings",
                 PromptEncoderConfig(encoder_reparameterization_type="MLP", **common), tensors),
        training(Run("prefix_projection", 2, 3, PREFIX_MAX_NORM), "prefix",
                 PrefixTuningConfig(prefix_projection=True, **common), tensors),
    ]


def main():
    quiet_and_deterministic()
    generator = torch.Generator().manual_seed(7)
    cases = [
        case("embeddings", "residual", Residual(3, 7, 5), 3, generator),
        case("prefix", "residual", Residual(1, 8, 3), 1, generator),
        case("embeddings", "mlp", p_tuning(3, 5, 4), 3, generator),
        case("embeddings", "mlp", p_tuning(1, 3, 9), 1, generator),
        case("prefix", "mlp", prefix_projection(3, 4, 2, 5), 3, generator),
    ]
    tensors = {}
    document = {"versions": versions(), "cases": cases, "training": trainings(tensors)}
    for run in document["training"]:
        print(run["name"], *(f"{s['loss']:.3f}/{s['grad_norm']:.3f}" for s in run["steps"]))
    write_json(HERE / "reparameterizations.json", document)
    write_tensors(HERE / "reparameterizations.safetensors", tensors)


if __name__ == "__main__":
    main()
