"""Writes torch_files.json: small tensors as torch.save writes them, in base64, with their values; and files that hold something
else, whose values are null.

    python tests/golden/torch_files.py
"""

import base64
import collections
import io
import json
import pathlib

import torch


def saved(value, **how):
    file = io.BytesIO()
    torch.save(value, file, **how)
    return base64.b64encode(file.getvalue()).decode()


def main():
    torch.manual_seed(0)
    whole = torch.randn(5, 3)
    tensors = {
        "f32": whole[:2].clone(),
        "f64": whole[2:4].double().clone(),
        "f16": whole[:2].half(),
        "bf16": whole[:2].bfloat16(),
        "a part of a storage": whole[1:3],
        "turned": whole[:3].clone().T,
        "every other row and column": whole[::2, ::2],
        "a row repeated": whole[:1].expand(1, 3).contiguous(),
        "three dimensions": whole[None, :2].clone(),
        "one dimension": whole[0].clone(),
        "a parameter": torch.nn.Parameter(whole[:1].clone()),
        "with a gradient": whole[:1].clone().requires_grad_(),
        "a part that begins at value 300": torch.arange(310.0).half()[300:].reshape(2, 5),
        "no rows": torch.zeros(0, 3),
    }
    others = {
        "whole numbers": torch.arange(6).reshape(2, 3),
        "a list": [1, 2],
        "a dictionary": {"prompt_embeddings": whole[:1].clone()},
        "a list of tensors": [whole[:1].clone()],
        "an ordered dictionary": collections.OrderedDict(),
        "sparse": whole[:1].to_sparse(),
        "a size": torch.Size([1]),
        "the form of before 1.6": None,
        "another class": pathlib.PurePosixPath("/x"),
    }
    cases = []
    for name, tensor in tensors.items():
        cases.append({"name": name, "file": saved(tensor), "shape": list(tensor.shape), "values": tensor.float().flatten().tolist()})
    for name, other in others.items():
        file = saved(whole[:1].clone(), _use_new_zipfile_serialization=False) if other is None else saved(other)
        cases.append({"name": name, "file": file, "values": None})
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"made_with": {"torch": torch.__version__}, "cases": cases}, indent=1) + "\n")
    print(f"{len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
