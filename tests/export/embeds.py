"""Holds a file of prompt embeddings against the tensor that it has to be.

    python tests/export/embeds.py FILE.pt EXPECTED.safetensors DTYPE
"""

import base64
import io
import sys

import torch
from safetensors.torch import load_file

file, expected, dtype = sys.argv[1:]
expected = load_file(expected)["x"]
found = torch.load(file, weights_only=True)
assert type(found) is torch.Tensor and found.dim() == 2 and found.is_contiguous(), type(found)
assert str(found.dtype) == f"torch.{dtype}" and not found.requires_grad, found.dtype
assert torch.equal(found, expected), (found.shape, expected.shape)
# The way that it takes to a server: as base64 of the file.
sent = base64.b64encode(open(file, "rb").read())
assert torch.equal(torch.load(io.BytesIO(base64.b64decode(sent)), weights_only=True), expected)
