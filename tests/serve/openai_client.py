"""The `openai` package against a server of a base model and tuned prompts: every route, streamed and not, and its errors.

    openai_client.py --url URL --key KEY --base NAME --tuned NAME [--tuned NAME]...
        [--checkpoint PATH --adapter NAME=DIR ...]

With --checkpoint (a folder, or a GGUF file) and the --adapter folders, greedy tokens and log-probabilities are held against
transformers and PEFT, each text alone and unpadded. Prints a JSON summary. Exit code 1, with what differed, where something
did.
"""

import argparse
import asyncio
import json
import math
import sys
from typing import Literal

import checks
import openai
import pydantic

NEW_TOKENS = 12
TEXTS = [
    "The quick brown fox",
    "classify {0, 1} Comment: They washed our dog well, and on time.\nSatisfaction:\n",
    "In 1987 the shop washed 2,450 dogs",
    "a",
]


class Verdict(pydantic.BaseModel):
    label: Literal["billing", "delivery"]
    urgent: bool


def main():
    args = arguments()
    args.client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=args.key or "none", max_retries=0, timeout=300)
    all_checks = [models, completions, several, streams, logprobs, echo, stops, seeds, chat, chat_streams, refusals, keys, together, choices, fields]
    if args.checkpoint:
        all_checks.append(reference)
    return checks.run("openai_client", all_checks, args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", required=True)
    add("--key", help="the server's key; without it the server is expected to ask for none")
    add("--base", required=True, help="name of the base model")
    add("--tuned", action="append", required=True, help="name of a tuned prompt")
    add("--checkpoint", help="the base model, for transformers")
    add("--adapter", action="append", default=[], metavar="NAME=DIR", help="a tuned prompt's folder, for PEFT")
    args = parser.parse_args()
    args.adapters = dict(text.split("=", 1) for text in args.adapter)
    args.names = [args.base, *args.tuned]
    return args


def expect(name, found, expected):
    if found != expected:
        raise AssertionError(f"{name}: expected {expected!r}, found {found!r}")


def expect_that(holds, text):
    if not holds:
        raise AssertionError(text)


def refused(kind, status, parts, call):
    """Expects an error of the package's class, with a status, and a message that names each of `parts`."""
    try:
        answer = call()
    except kind as error:
        expect(f"status of {error}", error.status_code, status)
        missing = [part for part in parts if part not in error.message]
        expect_that(not missing, f"expected a message that names {missing}, found {error.message!r}")
        expect_that(isinstance(error.body, dict) and {"message", "type", "param", "code"} <= error.body.keys(),
                    f"expected an error of OpenAI's form, found {error.body!r}")
        return error
    raise AssertionError(f"expected {kind.__name__} that names {parts}, found {answer!r}")


def complete(args, model, prompt, **more):
    asked = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0} | more
    return args.client.completions.create(**asked)


def greedy(args, model, prompt, **more):
    return complete(args, model, prompt, **more).choices[0].text


def text_tokens(usage):
    """Tokens of the text: usage counts a tuned prompt's virtual tokens too, as tokens that were cached."""
    details = usage.prompt_tokens_details
    return usage.prompt_tokens - (details.cached_tokens or 0 if details else 0)


# ---------------------------------------------------------------- completions


def models(args):
    found = args.client.models.list().data
    names = [model.id for model in found]
    expect_that(set(args.names) <= set(names), f"expected {args.names}, found {names}")
    expect("names listed twice", len(names), len(set(names)))
    for model in found:
        expect("object", model.object, "model")
        expect_that(model.created > 1_600_000_000 and model.owned_by, f"expected a time and an owner, found {model}")
        expect("retrieved", args.client.models.retrieve(model.id), model)
    refused(openai.NotFoundError, 404, ["nowhere"], lambda: args.client.models.retrieve("nowhere"))
    return names


def completions(args):
    for model in args.names:
        for text in TEXTS:
            answer = complete(args, model, text)
            expect("object", answer.object, "text_completion")
            expect("model", answer.model, model)
            expect_that(answer.id and answer.created > 1_600_000_000, f"expected an id and a time, found {answer}")
            choice, usage = answer.choices[0], answer.usage
            expect("choices", [c.index for c in answer.choices], [0])
            expect_that(choice.finish_reason in ("stop", "length"), f"expected stop or length, found {choice.finish_reason}")
            expect("logprobs unasked", choice.logprobs, None)
            expect("usage", usage.prompt_tokens + usage.completion_tokens, usage.total_tokens)
            expect_that(usage.completion_tokens <= NEW_TOKENS, f"expected at most {NEW_TOKENS} tokens, found {usage}")
            if choice.finish_reason == "length":
                expect("tokens", usage.completion_tokens, NEW_TOKENS)
            expect("asked again", greedy(args, model, text), choice.text)
            one = complete(args, model, text, max_tokens=1)
            expect_that(choice.text.startswith(one.choices[0].text.rstrip("\ufffd")),
                        f"expected the start of {choice.text!r}, found {one.choices[0].text!r}")
            expect_that(one.usage.completion_tokens <= 1, f"expected one token, found {one.usage}")
    unlimited = args.client.completions.create(model=args.base, prompt=TEXTS[0], temperature=0)
    expect_that(unlimited.usage.completion_tokens <= 16, f"expected OpenAI's 16 tokens at most, found {unlimited.usage}")
    return {model: [greedy(args, model, text) for text in TEXTS[:2]] for model in args.names}


def several(args):
    """A list of prompts, and n answers to each, in order; usage counts each prompt once."""
    for model in args.names:
        alone = [complete(args, model, text) for text in TEXTS]
        listed = complete(args, model, TEXTS)
        expect("indices", [c.index for c in listed.choices], list(range(len(TEXTS))))
        expect("texts", [c.text for c in listed.choices], [a.choices[0].text for a in alone])
        expect("prompt tokens", listed.usage.prompt_tokens, sum(a.usage.prompt_tokens for a in alone))
        expect("tokens", listed.usage.completion_tokens, sum(a.usage.completion_tokens for a in alone))
        twice = complete(args, model, TEXTS[:2], n=2)
        expect("greedy, two of each", [c.text for c in twice.choices], [a.choices[0].text for a in alone[:2] for _ in "ab"])
        expect("prompt tokens, two of each", twice.usage.prompt_tokens, sum(a.usage.prompt_tokens for a in alone[:2]))
        drawn = complete(args, model, TEXTS[0], n=4, temperature=1.5, seed=7)
        expect_that(len({c.text for c in drawn.choices}) > 1, f"expected draws of their own, found {drawn.choices}")


def streams(args):
    for model in args.names:
        for text in TEXTS:
            whole = complete(args, model, text)
            chunks = list(complete(args, model, text, stream=True, stream_options={"include_usage": True}))
            expect("choices of the last chunk", chunks[-1].choices, [])
            expect("usage", chunks[-1].usage, whole.usage)
            expect_that(not any(chunk.usage for chunk in chunks[:-1]), "expected usage in the last chunk alone")
            expect("one id", len({chunk.id for chunk in chunks}), 1)
            choices = [choice for chunk in chunks for choice in chunk.choices]
            expect("joined", "".join(choice.text for choice in choices), whole.choices[0].text)
            reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
            expect("reasons", reasons, [whole.choices[0].finish_reason])
            expect("reason of the last choice", choices[-1].finish_reason, reasons[0])
            plain = list(complete(args, model, text, stream=True))
            expect_that(not any(chunk.usage for chunk in plain), "expected no usage unasked")
    listed = {}
    for chunk in complete(args, args.base, TEXTS, stream=True):
        for choice in chunk.choices:
            listed[choice.index] = listed.get(choice.index, "") + choice.text
    expect("a list, streamed", [listed[n] for n in range(len(TEXTS))], [greedy(args, args.base, text) for text in TEXTS])
    with complete(args, args.base, TEXTS[0], stream=True, max_tokens=NEW_TOKENS) as stream:
        next(iter(stream))  # and hangs up
    return len(chunks)


def whole_tokens(tokens):
    """Whether tokens are text by themselves, neither parts of a character nor special."""
    return not any("\ufffd" in token or token.startswith(("bytes:", "<|")) for token in tokens)


def logprobs(args):
    joined = 0
    for model in args.names:
        for text in TEXTS:
            answer = complete(args, model, text, logprobs=3)
            choice, found = answer.choices[0], answer.choices[0].logprobs
            size = len(found.tokens)
            expect_that(size in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1),
                        f"expected {answer.usage.completion_tokens} tokens, found {found.tokens}")
            expect("lengths", [len(found.token_logprobs), len(found.top_logprobs), len(found.text_offset)], [size] * 3)
            for value, top in zip(found.token_logprobs, found.top_logprobs):
                expect_that(value <= 0 and math.isfinite(value), f"expected a log-probability, found {value}")
                expect_that(1 <= len(top) <= 3, f"expected 3 of the likeliest, found {top}")
                expect("likelihood of a greedy token", value, max(top.values()))
            expect("offsets ascend", sorted(found.text_offset), found.text_offset)
            if whole_tokens(found.tokens):
                joined += 1
                expect("joined tokens", "".join(found.tokens), choice.text)
            streamed = [c.logprobs for chunk in complete(args, model, text, logprobs=3, stream=True) for c in chunk.choices]
            values = [value for part in streamed if part for value in part.token_logprobs]
            close("streamed log-probabilities", values, found.token_logprobs, 1e-4)
            none = complete(args, model, text, logprobs=0).choices[0].logprobs
            close("log-probabilities without others", none.token_logprobs, found.token_logprobs, 1e-4)
    return {"joined": joined}


def close(name, found, expected, tolerance):
    expect(f"{name}: number", len(found), len(expected))
    for place, (a, b) in enumerate(zip(found, expected)):
        if a is None and b is None:
            continue
        if a is None or b is None or not abs(a - b) <= tolerance:
            raise AssertionError(f"{name}: expected {b} at {place}, found {a}, with a tolerance of {tolerance}")


def echo(args):
    """echo gives the prompt, and with max_tokens 0 its own log-probabilities."""
    for model in args.names:
        text = TEXTS[0]
        plain = complete(args, model, text)
        echoed = complete(args, model, text, echo=True)
        expect("echoed", echoed.choices[0].text, text + plain.choices[0].text)
        expect("usage", echoed.usage, plain.usage)
        scored = complete(args, model, text, echo=True, max_tokens=0, logprobs=1)
        found = scored.choices[0].logprobs
        expect("text", scored.choices[0].text, text)
        expect("no new tokens", scored.usage.completion_tokens, 0)
        expect("tokens", len(found.tokens), text_tokens(scored.usage))
        expect("offsets", found.text_offset[0], 0)
        # Nothing stands before the base model's first token; the virtual tokens before a tuned one's.
        expect(f"{model}: no log-probability of the first token", found.token_logprobs[0] is None, model == args.base)
        expect_that(all(value <= 0 for value in found.token_logprobs[1:]), f"expected log-probabilities, found {found}")
        both = complete(args, model, text, echo=True, logprobs=1)
        close("log-probabilities of the prompt", both.choices[0].logprobs.token_logprobs[: len(found.tokens)],
              found.token_logprobs, 1e-4)


def stops(args):
    tried = 0
    for model in args.names:
        for text in TEXTS:
            whole = greedy(args, model, text)
            stop = whole[len(whole) // 2 :][:2]
            if not stop or "\ufffd" in whole:
                continue
            tried += 1
            until = whole[: whole.index(stop)]
            for given in (stop, ["never comes", stop]):
                choice = complete(args, model, text, stop=given).choices[0]
                expect(f"{whole!r} to {stop!r}", (choice.text, choice.finish_reason), (until, "stop"))
            pieces = [c.text for chunk in complete(args, model, text, stop=stop, stream=True) for c in chunk.choices]
            expect("streamed", "".join(pieces), until)
    expect_that(tried, "expected an answer of two characters at least, found none")
    return tried


def seeds(args):
    def draw(seed, **more):
        return greedy(args, args.base, TEXTS[0], temperature=1.5, seed=seed, **more)

    drawn = [draw(seed) for seed in range(6)]
    expect("drawn again", [draw(seed) for seed in range(6)], drawn)
    expect_that(len(set(drawn)) > 1, f"expected other texts from other seeds, found {drawn}")
    expect("of the likeliest alone", draw(1, top_p=1e-6), greedy(args, args.base, TEXTS[0]))
    unseeded = {greedy(args, args.base, TEXTS[0], temperature=2.0) for _ in range(6)}
    expect_that(len(unseeded) > 1, f"expected draws that differ without a seed, found {unseeded}")


# ---------------------------------------------------------------- chat


MESSAGES = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Say hello."}]


def talk(args, model, **more):
    asked = {"model": model, "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0} | more
    return args.client.chat.completions.create(**asked)


def chat(args):
    found = {}
    for model in args.names:
        answer = talk(args, model)
        expect("object", answer.object, "chat.completion")
        choice, usage = answer.choices[0], answer.usage
        expect("role", choice.message.role, "assistant")
        expect_that(choice.finish_reason in ("stop", "length"), f"expected stop or length, found {choice.finish_reason}")
        expect("usage", usage.prompt_tokens + usage.completion_tokens, usage.total_tokens)
        expect("again", talk(args, model).choices[0].message.content, choice.message.content)
        expect("max_completion_tokens", talk(args, model, max_tokens=openai.omit, max_completion_tokens=NEW_TOKENS)
               .choices[0].message.content, choice.message.content)
        with_logprobs = talk(args, model, logprobs=True, top_logprobs=2).choices[0]
        tokens = with_logprobs.logprobs.content
        for token in tokens:
            expect("alternatives", len(token.top_logprobs), 2)
            expect("the likeliest", token.top_logprobs[0].logprob, token.logprob)
            expect_that(0 >= token.logprob >= token.top_logprobs[1].logprob, f"expected falling log-probabilities, found {token}")
        spelled = b"".join(bytes(token.bytes) for token in tokens)
        text, content = spelled.decode(errors="replace"), with_logprobs.message.content
        expect_that(text.startswith(content) and not text[len(content) :].strip("\ufffd"),
                    f"expected {text!r} but for a part of a character at its end, found {content!r}")
        parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[1]["content"]}]}]
        expect("content in parts", talk(args, model, messages=parts).choices[0].message.content,
               talk(args, model, messages=MESSAGES[1:]).choices[0].message.content)
        found[model] = choice.message.content
    return found


def chat_streams(args):
    for model in args.names:
        whole = talk(args, model)
        chunks = list(talk(args, model, stream=True, stream_options={"include_usage": True}))
        expect("object", {chunk.object for chunk in chunks}, {"chat.completion.chunk"})
        expect("role at the start", chunks[0].choices[0].delta.role, "assistant")
        choices = [choice for chunk in chunks for choice in chunk.choices]
        expect("joined", "".join(choice.delta.content or "" for choice in choices), whole.choices[0].message.content)
        expect("reasons", [c.finish_reason for c in choices if c.finish_reason], [whole.choices[0].finish_reason])
        expect("usage", chunks[-1].usage, whole.usage)


# ---------------------------------------------------------------- errors, and many at once


def refusals(args):
    bad = [
        ("temperature", -1), ("temperature", 3), ("temperature", "hot"), ("top_p", 2), ("top_p", -0.1), ("n", 0), ("n", 100000),
        ("max_tokens", -1), ("max_tokens", "many"), ("logprobs", 100), ("stop", ["a"] * 17), ("stop", 5),
        ("presence_penalty", 5), ("logit_bias", {"99999999": 1}), ("logit_bias", {"word": 1}), ("seed", "x"), ("stream", "yes"),
        ("prompt", 5), ("prompt", {}),
    ]
    for name, value in bad:
        error = refused(openai.BadRequestError, 400, [name], lambda name=name, value=value: complete(
            args, args.base, **({"prompt": TEXTS[0]} | {name: value})))
        expect("param", error.param, name)
        expect("type", error.type, "invalid_request_error")
    for name, value in [("temperature", -1), ("top_logprobs", 100), ("messages", []), ("messages", "hi"),
                        ("messages", [{"role": 5, "content": "x"}])]:
        refused(openai.BadRequestError, 400, [name.rstrip("s")], lambda name=name, value=value: talk(
            args, args.base, logprobs=True, **{name: value}))
    for call in (lambda: complete(args, "nowhere", TEXTS[0]), lambda: talk(args, "nowhere"),
                 lambda: complete(args, "nowhere", TEXTS[0], stream=True)):
        expect("code", refused(openai.NotFoundError, 404, ["nowhere"], call).code, "model_not_found")
    error = refused(openai.BadRequestError, 400, [], lambda: complete(args, args.base, "dog " * 100_000))
    expect("code of a long prompt", error.code, "context_length_exceeded")
    refused(openai.NotFoundError, 404, ["/v1/embeddings"], lambda: args.client.embeddings.create(model=args.base, input="x"))
    return len(bad)


def choices(args):
    """Answers that have to be one of some texts: by vLLM's fields, and by the package's own parsing into a model."""
    labels = ["no", "none at all", "yes", "0", "1"]
    found = {}
    for model in args.names:
        for text in TEXTS:
            guided = complete(args, model, text, logprobs=2, extra_body={"guided_choice": labels})
            choice = guided.choices[0]
            expect_that(choice.text in labels, f"expected one of {labels}, found {choice.text!r}")
            expect("reason", choice.finish_reason, "stop")
            expect("joined tokens", "".join(choice.logprobs.tokens), choice.text)
            expect("structured", greedy(args, model, text, extra_body={"structured_outputs": {"choice": labels}}), choice.text)
            pieces = [c.text for chunk in complete(args, model, text, stream=True, extra_body={"guided_choice": labels})
                      for c in chunk.choices]
            expect("streamed", "".join(pieces), choice.text)
            # The model's own log-probabilities: those of the same text as a prompt.
            scored = complete(args, model, text + choice.text, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs
            size = len(choice.logprobs.tokens)
            close("log-probabilities", choice.logprobs.token_logprobs, scored.token_logprobs[-size:], 1e-3)
            drawn = complete(args, model, text, n=6, temperature=2, seed=3, extra_body={"guided_choice": labels}).choices
            expect_that(all(c.text in labels for c in drawn), f"expected {labels}, found {[c.text for c in drawn]}")
            found.setdefault(model, []).append(choice.text)
        parsed = args.client.chat.completions.parse(
            model=model, messages=MESSAGES, temperature=0, response_format=Verdict).choices[0]
        expect_that(parsed.message.parsed.label in ("billing", "delivery"), f"expected a label, found {parsed.message}")
        expect("reason", parsed.finish_reason, "stop")
        found[model].append(parsed.message.content)
        schema = {"name": "v", "strict": True, "schema": {"type": "string", "enum": ["billing", "delivery"]}}
        said = talk(args, model, response_format={"type": "json_schema", "json_schema": schema}).choices[0].message.content
        expect_that(json.loads(said) in ("billing", "delivery"), f"expected a label in JSON, found {said!r}")
    return found


def fields(args):
    """Fields of other engines: refused by name, or named as ignored."""
    for name, value in [("guided_regex", "[01]"), ("use_beam_search", True), ("mirostat", 2), ("temprature", 0), ("max_new_tokens", 3)]:
        error = refused(openai.BadRequestError, 400, [name], lambda name=name, value=value: complete(
            args, args.base, TEXTS[0], extra_body={name: value}))
        expect("param", error.param, name)
    raw = args.client.chat.completions.with_raw_response.create(
        model=args.base, messages=MESSAGES, max_tokens=1, user="me", store=False, metadata={"a": "b"},
        extra_body={"chat_id": "x", "mirostat": 0})
    expect("ignored", raw.headers.get("x-gneiss-ignored-fields"), "chat_id")
    begun = [*MESSAGES, {"role": "assistant", "content": "Hello"}]
    goes_on = talk(args, args.base, messages=begun, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    again = talk(args, args.base, messages=begun)
    expect_that(goes_on.usage.prompt_tokens < again.usage.prompt_tokens, f"expected no new turn, found {goes_on.usage}")


def keys(args):
    if not args.key:
        return None
    for key in (args.key + "x", args.key[:-1] or "x", "none"):
        wrong = openai.OpenAI(base_url=f"{args.url}/v1", api_key=key, max_retries=0)
        for call in (wrong.models.list, lambda wrong=wrong: wrong.completions.create(model=args.base, prompt="a")):
            error = refused(openai.AuthenticationError, 401, ["key"], call)
            expect_that(args.key not in error.message, "expected a message without the key, found the key in it")
    return True


def together(args):
    """32 at a time, of all models, lengths and kinds: each gets what it gets alone."""
    asked = []
    for number in range(32):
        text = TEXTS[number % len(TEXTS)] + " and so on" * (number % 5)
        asked.append((args.names[number % len(args.names)], text, 1 + number % NEW_TOKENS, number % 3 == 0))
    alone = [greedy(args, model, text, max_tokens=tokens) for model, text, tokens, _ in asked]

    async def one(client, model, text, tokens, streamed):
        answer = await client.completions.create(model=model, prompt=text, max_tokens=tokens, temperature=0, stream=streamed)
        if not streamed:
            return answer.choices[0].text
        return "".join([choice.text async for chunk in answer for choice in chunk.choices])

    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.key or "none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, *request) for request in asked))

    for _ in range(3):
        for request, found, expected in zip(asked, asyncio.run(everyone()), alone):
            expect(f"{request} among others", found, expected)
    return len(asked)


# ---------------------------------------------------------------- transformers and PEFT


def reference(args):
    import reference as oracle  # torch is slow to load, and only this needs it

    model, compared = oracle.Reference(args.checkpoint, args.adapters), 0
    for name in [args.base, *args.adapters]:
        for text in TEXTS:
            expected = model.greedy(None if name == args.base else name, text, NEW_TOKENS)
            answer = complete(args, name, text, logprobs=1, max_tokens=max(1, len(expected.logprobs)))
            choice, found = answer.choices[0], answer.choices[0].logprobs
            expect(f"{name}, {text!r}: tokens of the prompt", text_tokens(answer.usage), expected.prompt_tokens)
            size = len(expected.logprobs)
            close(f"{name}, {text!r}: log-probabilities", found.token_logprobs[:size], expected.logprobs, 1e-3)
            if size and whole_tokens(found.tokens):
                expect(f"{name}, {text!r}: text", choice.text, expected.text)
            scored = complete(args, name, text, echo=True, max_tokens=0, logprobs=0).choices[0].logprobs.token_logprobs
            close(f"{name}, {text!r}: log-probabilities of the prompt", scored, expected.prompt_logprobs, 1e-3)
            compared += size
    expect_that(compared > 2 * len(TEXTS), f"expected more tokens to compare, found {compared}")
    return {"tokens": compared}


if __name__ == "__main__":
    sys.exit(main())
