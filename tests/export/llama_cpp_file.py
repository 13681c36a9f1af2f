"""Holds llama.cpp on a baked GGUF file against continuations that are known.

    python tests/export/llama_cpp_file.py FILE.gguf '[[input ids, generated ids], ...]' TEXT 'ids of TEXT'
"""

import json
import sys

from llama_cpp import Llama

file, sequences, text, ids = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
model = Llama(file, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
found = model.tokenize(text.encode(), add_bos=False, special=True)
assert found == ids, (found, ids)
assert model.detokenize(ids[:5]) == b"", "special tokens are no text"
for given, expected in sequences:
    model.reset()
    generated = []
    for token in model.generate(given, temp=0.0, repeat_penalty=1.0):
        generated.append(token)
        if len(generated) == len(expected):
            break
    assert generated == expected, (given, generated, expected)
