"""Holds baked checkpoints of prompts that stand after a text against their base, by transformers.

    python tests/export/after_head.py '[{"base": DIR, "baked": DIR, "adapter": DIR, "bos": true}, ...]'

The base gets embeddings: those of the tokens before the prompt, the prompt, those of the other tokens. The baked checkpoint gets
the text of prompts.json with an input in its place: its logits are the same, and so are the tokens of greedy decoding. The chat
template puts the prompt after its text too, keeps what the base's template gives without a prompt, and refuses a conversation
that begins otherwise.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

INPUTS = ["wet dogs, 7 days\n", "Comment: go on!", "1"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def check_logits(case, prompt, tokenizer):
    base, baked = load(case["base"]), load(case["baked"])
    soft = load_file(Path(case["adapter"]) / "adapter_model.safetensors")["prompt_embeddings"]
    before = json.loads((Path(case["adapter"]) / "task.json").read_text())["before"]["token_ids"]
    first, last = prompt["token_ids"]
    new = list(range(first, last + 1))
    plain = AutoTokenizer.from_pretrained(case["base"])
    for text in INPUTS:
        ids = tokenizer(prompt["template"].replace("{{input}}", text), add_special_tokens=False).input_ids
        own = plain(prompt["verbalizer"].replace("{{input}}", text)).input_ids
        assert ids == before + new + own[len(before):] and own[: len(before)] == before, (ids, own)
        for _ in range(6):
            tokens = base.get_input_embeddings()(torch.tensor(own))
            rows = torch.cat([tokens[: len(before)], soft, tokens[len(before):]])[None]
            expected = base(inputs_embeds=rows, use_cache=False).logits[0]
            found = baked(torch.tensor([ids]), use_cache=False).logits[0]
            kept = [id for id in range(expected.shape[1]) if id not in new]
            worst = (found[:, kept] - expected[:, kept]).abs().max().item()
            assert worst < 1e-4, worst
            best = int(expected[-1].argmax())
            assert int(found[-1].argmax()) == best and best not in new
            ids, own = ids + [best], own + [best]


def check_chat(case, prompt, tokenizer):
    base = AutoTokenizer.from_pretrained(case["base"])
    kind = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "go"}]
    other = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go"}]
    for chat in (kind, other):
        for add in (False, True):
            options = dict(tokenize=False, add_generation_prompt=add)
            plain = base.apply_chat_template(chat, **options)
            for chosen in ({}, {"soft_prompt": None}, {"soft_prompt": ""}):
                assert tokenizer.apply_chat_template(chat, **options, **chosen) == plain
            assert tokenizer.apply_chat_template(chat, **options, soft_prompt="start").endswith(">" + plain)
            # The base's template begins with a beginning-of-text token, which tuning had only if the tokenizer adds it.
            if chat is kind and case["bos"]:
                text = tokenizer.apply_chat_template(chat, **options, soft_prompt="p")
                head = "<s>" + prompt["before"]
                assert plain.startswith(head) and text == head + prompt["tokens"] + plain[len(head):], text
                continue
            try:
                tokenizer.apply_chat_template(chat, **options, soft_prompt="p")
                raise AssertionError("a conversation that begins otherwise was taken")
            except Exception as error:
                assert "expected a conversation that begins with" in str(error), error


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = json.loads(sys.argv[1])
    for case in cases:
        prompts = json.loads((Path(case["baked"]) / "prompts.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(case["baked"])
        check_logits(case, prompts["p"], tokenizer)
        check_chat(case, prompts["p"], tokenizer)
    print(f"{len(cases)} checkpoints")


if __name__ == "__main__":
    main()
