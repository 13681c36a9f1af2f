"""What transformers and PEFT say: greedy tokens and log-probabilities of one text at a time, unpadded, in f32."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches/peft"))
import peft_step

NEAR = 1e-3  # a lead of the likeliest token under this is none: the comparison ends before it


@dataclass
class Greedy:
    """A text's continuation, as far as each token leads clearly; without the end-of-text token."""

    text: str
    logprobs: list  # of each token
    prompt_tokens: int
    prompt_logprobs: list  # of the prompt's own tokens; None of the first where nothing stands before it


class Reference:
    """A base model, and prompts tuned for it by name."""

    def __init__(self, checkpoint, adapters):
        self.tokenizer, base = peft_step.load(argparse.Namespace(model=Path(checkpoint), dtype="f32", device="cpu"))
        self.base = base.eval()
        self.base.config.use_cache = True
        self.tuned = {name: PeftModel.from_pretrained(base, folder).eval() for name, folder in adapters.items()}
        self.prompts = {name: tuned.get_prompt(batch_size=1).detach().float() for name, tuned in self.tuned.items()}

    def greedy(self, name, text, new_tokens):
        """Of the prompt `name`, or of the base model where that is None."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        rows = self.base.get_input_embeddings()(ids)
        virtual = 0
        if name is not None:
            rows, virtual = torch.cat([self.prompts[name], rows], 1), self.prompts[name].shape[1]
        with torch.inference_mode():
            out = self.base(inputs_embeds=rows, use_cache=True)
            scores = out.logits[0].double().log_softmax(-1)
            own = [] if virtual else [None]
            own += [scores[virtual + n - 1, token].item() for n, token in enumerate(ids[0].tolist()) if virtual + n > 0]
            tokens, logprobs = [], []
            for _ in range(new_tokens):
                top = out.logits[0, -1].double().log_softmax(-1).topk(2)
                token = top.indices[0].item()
                if top.values[0] - top.values[1] < NEAR or token == self.tokenizer.eos_token_id:
                    break
                tokens.append(token)
                logprobs.append(top.values[0].item())
                out = self.base(input_ids=top.indices[:1][None], past_key_values=out.past_key_values, use_cache=True)
            if name is not None and tokens:
                self.check_with_peft(name, ids, tokens)
        return Greedy(self.tokenizer.decode(tokens), logprobs, ids.shape[1], own)

    def check_with_peft(self, name, ids, tokens):
        """PEFT's own generate has to give the same tokens; with a cache 0.21.2 on transformers 5.24 is wrong."""
        out = self.tuned[name].generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(tokens),
            pad_token_id=self.tokenizer.eos_token_id, use_cache=False)
        found = out[0, ids.shape[1] :].tolist()
        if found != tokens:
            raise AssertionError(f"{name}: PEFT generates {found}, and step by step {tokens}")
