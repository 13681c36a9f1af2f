"""Writes a small random checkpoint that a server can serve, with a tokenizer of bytes, a chat template and two tuned prompts.

    checkpoint.py OUT

OUT/base is what transformers saves of a Granite model; OUT/one and OUT/two are what PEFT saves of prompts of 5 and 9 virtual
tokens for it. Every byte is a token, so that any text has tokens; answers are ASCII mostly, and now and then break UTF-8.
"""

import sys
from pathlib import Path

import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROMPTS = {"one": 5, "two": 9}


def main():
    out = Path(sys.argv[1])
    transformers.logging.set_verbosity_error()
    torch.manual_seed(7)
    tokenizer = byte_tokenizer()
    model = transformers.AutoModelForCausalLM.from_config(configuration(len(tokenizer)), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.25 * noise if "norm" in name else (0.25 if "embed" in name else 0.35) * noise)
        rows = model.get_input_embeddings().weight
        for letter, token in tokenizer.get_vocab().items():
            # Less likely, as the head is tied to the embeddings.
            rows[token] *= 0.2 if letter in SPECIAL[:2] else 0.6 if not letter.isascii() else 1
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    for name, virtual in PROMPTS.items():
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=virtual, tokenizer_name_or_path=str(out / "base"))
        tuned = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(out / "base"), config)
        with torch.no_grad():
            chosen = torch.randint(len(tokenizer), (virtual,))
            tuned.prompt_encoder["default"].embedding.weight.copy_(rows[chosen] + 0.1 * torch.randn(virtual, rows.shape[1]))
        tuned.save_pretrained(out / name)


def byte_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False)
    whole.chat_template = CHAT_TEMPLATE
    return whole


def configuration(vocabulary):
    return transformers.GraniteConfig(
        vocab_size=vocabulary, hidden_size=40, intermediate_size=57, num_hidden_layers=3, num_attention_heads=5,
        num_key_value_heads=1, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
        embedding_multiplier=3.5, residual_multiplier=0.37, attention_multiplier=0.21, logits_scaling=2.3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1000.0})


if __name__ == "__main__":
    main()
