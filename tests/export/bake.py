"""Holds a baked folder against its base with PEFT, by transformers.

    python tests/export/bake.py '[{"base": DIR, "baked": DIR, "adapters": {NAME: DIR}, "has_tokenizer": true}, ...]'

A case may have `texts` of its own; `has_tokenizer` says whether the base's folder has one. For each adapter: the logits behind its tokens and a text are those that PEFT gives the text, and so are the tokens of
greedy decoding. Without the tokens, the hidden states and the base's rows of the head are those of the base, bit for bit.
New tokens are one id each, are not decoded, are never the likeliest, and are never generated.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["wet dogs, 7 days\n", "Comment: go on!", "1"]


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # The last bit of a product may depend on where in a file its matrix lies; in memory of their own all are aligned.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def close(found, expected, what):
    worst = (found - expected).abs().max().item()
    assert worst < 1e-4, f"{what}: {worst}"


def inputs(ids):
    ids = torch.tensor([ids])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))


def check_tokenizer(case, texts, tokenizer, prompts):
    assert len(tokenizer) == max(p["token_ids"][1] for p in prompts.values()) + 1, len(tokenizer)
    for prompt in prompts.values():
        first, last = prompt["token_ids"]
        ids = tokenizer(prompt["tokens"], add_special_tokens=False).input_ids
        assert ids == list(range(first, last + 1)), ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""
        assert tokenizer.decode(ids) == prompt["tokens"]
        for id in ids:
            token = tokenizer.convert_ids_to_tokens(id)
            assert tokenizer(token, add_special_tokens=False).input_ids == [id], token
            assert tokenizer.added_tokens_decoder[id].special, token
            assert token in tokenizer.extra_special_tokens, token
    if not case["has_tokenizer"]:
        return
    base = AutoTokenizer.from_pretrained(case["base"])
    for text in [*texts, " a <s> b", "x<|tool|> </s>y"]:
        assert tokenizer(text).input_ids == base(text).input_ids, text
    assert set(base.all_special_tokens) <= set(tokenizer.all_special_tokens)
    assert tokenizer.eos_token_id == base.eos_token_id and tokenizer.bos_token_id == base.bos_token_id
    chat = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "on"}]
    plain = base.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for chosen in ({}, {"soft_prompt": None}, {"soft_prompt": ""}):
        assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **chosen) == plain
    for name, prompt in prompts.items():
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, soft_prompt=name)
        assert text == prompt["tokens"] + plain, text
    try:
        tokenizer.apply_chat_template(chat, tokenize=False, soft_prompt="birds")
        raise AssertionError("a prompt that is not there was taken")
    except Exception as error:
        assert "soft_prompt: expected one of" in str(error), error


@torch.no_grad()
def check_base(base, baked, texts, new):
    """What the base computes without the new tokens."""
    old = base.get_output_embeddings().weight
    head = baked.get_output_embeddings().weight
    kept = [row for row in range(old.shape[0]) if row not in new]
    assert torch.equal(head[kept], old[kept]) and torch.equal(
        baked.get_input_embeddings().weight[kept], base.get_input_embeddings().weight[kept])
    assert head.data_ptr() != baked.get_input_embeddings().weight.data_ptr(), "the head is tied"
    for ids in texts:
        hidden = [model.model(**inputs(ids)).last_hidden_state for model in (base, baked)]
        assert torch.equal(*hidden), ids
        logits = baked(**inputs(ids)).logits[0]
        close(logits[:, kept], base(**inputs(ids)).logits[0][:, kept], "logits of the base")
        assert not set(logits.argmax(-1).tolist()) & new, "a new token is the likeliest"
        greedy = dict(max_new_tokens=12, do_sample=False, suppress_tokens=None)
        [found, expected] = [model.generate(**inputs(ids), **greedy).tolist() for model in (baked, base)]
        assert found == expected or set(sum(expected, [])) - set(kept), (found, expected)
        # Hot enough that every token is drawn; the generation configuration keeps the new ones out.
        drawn = baked.generate(**inputs(ids), do_sample=True, temperature=100.0, top_k=0, max_new_tokens=40,
                               num_return_sequences=16)
        assert not set(drawn[:, len(ids):].flatten().tolist()) & new, "a new token was generated"


@torch.no_grad()
def check_prompt(base_folder, adapter, baked, tokenizer, prompt, texts, new):
    peft = PeftModel.from_pretrained(load(base_folder), adapter).eval()
    rows = prompt["num_virtual_tokens"]
    for text in texts:
        filled = prompt["template"].replace("{{input}}", text)
        # PEFT is given what the base's tokenizer makes of the same text: a beginning-of-text token, the verbalizer.
        plain = tokenizer(prompt["verbalizer"].replace("{{input}}", text)).input_ids
        ids = tokenizer(filled, add_special_tokens=False).input_ids
        assert ids[rows:] == plain, (ids, plain)
        expected = peft(**inputs(plain)).logits[0]
        found = baked(**inputs(ids)).logits[0]
        kept = [id for id in range(expected.shape[1]) if id not in new]
        close(found[rows:, kept], expected[-len(plain):, kept], f"logits of {filled!r}")
        steps = dict(max_new_tokens=8, do_sample=False)
        # With a cache PEFT 0.21.2 on transformers 5.24 puts the prompt before every new token again.
        theirs = peft.generate(**inputs(plain), **steps, use_cache=False)[0, len(plain):].tolist()
        ours = baked.generate(**inputs(ids), **steps)[0, len(ids):].tolist()
        assert ours == theirs or set(theirs) & new, (ours, theirs)
        assert not set(ours) & new


def check(case):
    folder, texts = Path(case["baked"]), case.get("texts", TEXTS)
    prompts = json.loads((folder / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(case, texts, tokenizer, prompts)
    base, baked = load(case["base"]), load(folder)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32
    new = {id for p in prompts.values() for id in range(p["token_ids"][0], p["token_ids"][1] + 1)}
    assert set(baked.generation_config.suppress_tokens) == new
    check_base(base, baked, [tokenizer(text).input_ids for text in texts], new)
    assert set(prompts) == set(case["adapters"])
    for name, adapter in case["adapters"].items():
        check_prompt(case["base"], adapter, baked, tokenizer, prompts[name], texts, new)
    return len(prompts)


def main():
    cases = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prompts = sum(check(case) for case in cases)
    print(f"{len(cases)} checkpoints, {prompts} prompts")


if __name__ == "__main__":
    main()
