"""The `openai` package's Responses API against a server: each answer is held against that of chat completions.

    openai_responses.py --url URL --key KEY --base NAME --tuned NAME [--tuned NAME]...

Prints a JSON summary. Exit code 1, with what differed, where something did.
"""

import asyncio
import json
import sys
from enum import Enum

import checks
import openai
import openai_client
import pydantic
from openai_client import NEW_TOKENS, expect, expect_that, refused

INPUT = "Long wait times.\nSatisfaction:"
INSTRUCTIONS = "Say 1 or 0."


def main():
    args = openai_client.arguments()
    args.client = openai.OpenAI(base_url=f"{args.url}/v1", api_key=args.key or "none", max_retries=0, timeout=300)
    return checks.run("openai_responses", (plain, conversations, streams, helper, choices, drawn, other_headers, asynchronous, errors), args)


def ask(args, model, **more):
    return args.client.responses.create(**{"model": model, "input": INPUT, "temperature": 0, "max_output_tokens": NEW_TOKENS} | more)


def chat(args, model, messages, **more):
    return args.client.chat.completions.create(
        **{"model": model, "messages": messages, "temperature": 0, "max_completion_tokens": NEW_TOKENS} | more)


def same(name, response, completion):
    choice, usage = completion.choices[0], completion.usage
    expect(f"{name}: text", response.output_text, choice.message.content)
    expect(f"{name}: status", response.status, "completed" if choice.finish_reason == "stop" else "incomplete")
    expect(f"{name}: tokens", (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens),
           (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens))
    expect(f"{name}: cached", response.usage.input_tokens_details.cached_tokens, usage.prompt_tokens_details.cached_tokens)


def plain(args):
    found = {}
    for model in args.names:
        response = ask(args, model, instructions=INSTRUCTIONS, metadata={"k": "v"}, store=False)
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": INPUT}]
        same(model, response, chat(args, model, messages))
        expect("object", (response.object, response.model, response.metadata), ("response", model, {"k": "v"}))
        expect("error", response.error, None)
        message = response.output[0]
        expect("message", (message.type, message.role, message.content[0].type), ("message", "assistant", "output_text"))
        if response.status == "incomplete":
            expect("reason", response.incomplete_details.reason, "max_output_tokens")
        # What the package's own types say is complete: nothing that they need is missing.
        openai.types.responses.Response.model_validate(response.model_dump())
        found[model] = response.output_text
    return found


def conversations(args):
    """A response's output goes back as input, as it is."""
    for model in args.names:
        first = ask(args, model)
        history = [{"role": "user", "content": INPUT}, *[item.model_dump() for item in first.output],
                   {"role": "user", "content": [{"type": "input_text", "text": "And now?"}]}]
        messages = [{"role": "user", "content": INPUT}, {"role": "assistant", "content": first.output_text},
                    {"role": "user", "content": "And now?"}]
        same(model, ask(args, model, input=history), chat(args, model, messages))
    return len(history)


def streams(args):
    for model in args.names:
        whole = ask(args, model, include=["message.output_text.logprobs"], top_logprobs=2)
        events = list(ask(args, model, include=["message.output_text.logprobs"], top_logprobs=2, stream=True))
        expect("numbers", [event.sequence_number for event in events], list(range(len(events))))
        expect("first and last", (events[0].type, events[-1].type), ("response.created", f"response.{whole.status}"))
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        expect("joined", "".join(event.delta for event in deltas), whole.output_text)
        last = events[-1].response
        expect("at the end", (last.output_text, last.usage, last.status), (whole.output_text, whole.usage, whole.status))
        found = [token for event in deltas for token in event.logprobs]
        expect("tokens", [(t.token, t.logprob) for t in found], [(t.token, t.logprob) for t in whole.output[0].content[0].logprobs])
        for token in found:
            expect("the likeliest", token.top_logprobs[0].logprob, token.logprob)
        for event in events:
            type(event).model_validate(event.model_dump())
    with ask(args, args.base, stream=True) as stream:
        next(iter(stream))  # and hangs up
    return len(events)


def helper(args):
    """`responses.stream` puts a stream together and checks its order and its ids. It wants texts that end by themselves."""
    ends = []
    for model in args.names:
        # Without the cut the text ends at its end token; a choice ends in any case.
        asked = {"model": model, "input": INPUT, "temperature": 0, "extra_body": {"guided_choice": ["yes", "no"]}}
        with args.client.responses.stream(**asked) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        expect("final", final.output_text, args.client.responses.create(**asked).output_text)
        expect("last snapshot", snapshots[-1], final.output_text)
        ends.append(final.output_text)
    return ends


class Mood(str, Enum):
    GOOD = "good"
    BAD = "bad"


class Verdict(pydantic.RootModel[Mood]):
    pass


def choices(args):
    """A schema that lists its values binds the answer; any other is refused by the field that has it."""
    schema = {"type": "string", "enum": ["good", "bad"]}
    text = {"format": {"type": "json_schema", "name": "mood", "schema": schema, "strict": True}}
    response = ask(args, args.base, text=text)
    expect_that(json.loads(response.output_text) in ("good", "bad"), f"expected a choice, found {response.output_text!r}")
    completion = chat(args, args.base, [{"role": "user", "content": INPUT}], response_format={
        "type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}})
    same("bound", response, completion)
    Verdict.model_validate_json(response.output_text)
    free = {"format": {"type": "json_schema", "name": "free", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}}
    for form in (free, {"format": {"type": "json_object"}}):
        error = refused(openai.BadRequestError, 400, ["text.format"], lambda form=form: ask(args, args.base, text=form))
        expect_that(error.param.startswith("text.format"), f"expected a parameter of text.format, found {error.param}")
    return response.output_text


def drawn(args):
    draw = {"temperature": 1.5, "top_p": 0.9}
    texts = [ask(args, args.base, extra_body={"seed": seed}, **draw).output_text for seed in (1, 2, 3, 1)]
    expect("drawn again", texts[3], texts[0])
    expect_that(len(set(texts)) > 1, f"expected other texts from other seeds, found {texts}")
    messages = [{"role": "user", "content": INPUT}]
    expect("as a chat draws", texts[0], chat(args, args.base, messages, seed=1, **draw).choices[0].message.content)
    return len(set(texts))


def other_headers(args):
    """The key as Azure's and Anthropic's clients show it, beside one that is not this server's."""
    for name in ("api-key", "x-api-key"):
        client = openai.OpenAI(base_url=f"{args.url}/v1/", api_key="another", default_headers={name: args.key or "none"}, max_retries=0)
        expect("models", [model.id for model in client.models.list().data][0], args.base)
        answer = client.responses.create(model=args.base, input=INPUT, temperature=0, max_output_tokens=2)
        expect("text", answer.output_text, ask(args, args.base, max_output_tokens=2).output_text)
    # Without /v1 in the base URL, and with Azure's paths, the error says what the right path is.
    for client in (openai.OpenAI(base_url=args.url, api_key=args.key or "none", max_retries=0),
                   openai.AzureOpenAI(azure_endpoint=args.url, api_key=args.key or "none", api_version="2024-06-01", max_retries=0)):
        refused(openai.NotFoundError, 404, ["did you mean /v1/chat/completions", f"{args.url}/v1"],
                lambda client=client: client.chat.completions.create(model=args.base, messages=[{"role": "user", "content": "x"}]))
    return True


def asynchronous(args):
    async def everyone():
        async with openai.AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.key or "none", max_retries=0) as client:
            async def one(model):
                stream = await client.responses.create(
                    model=model, input=INPUT, temperature=0, max_output_tokens=NEW_TOKENS, stream=True)
                return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
            return await asyncio.gather(*(one(model) for model in args.names * 4))

    expect("all at once", asyncio.run(everyone()), [ask(args, model).output_text for model in args.names] * 4)
    return 4 * len(args.names)


def errors(args):
    bad = [("temperature", 3), ("top_p", 2), ("max_output_tokens", 0), ("top_logprobs", 100), ("input", []), ("input", 5),
           ("previous_response_id", "resp_1"), ("background", True), ("tools", [{"type": "web_search"}]), ("truncation", "auto"),
           ("reasoning", {"effort": "low"}), ("conversation", "conv_1"), ("prompt", {"id": "pmpt_1"}), ("include", ["x"])]
    for name, value in bad:
        error = refused(openai.BadRequestError, 400, [name], lambda name=name, value=value: ask(args, args.base, **{name: value}))
        expect("param", error.param, name)
    refused(openai.NotFoundError, 404, ["nowhere"], lambda: ask(args, "nowhere"))
    refused(openai.NotFoundError, 404, ["resp_1", "not kept"], lambda: args.client.responses.retrieve("resp_1"))
    refused(openai.NotFoundError, 404, ["resp_1", "not kept"], lambda: args.client.responses.delete("resp_1"))
    error = refused(openai.BadRequestError, 400, [], lambda: ask(args, args.base, input="dog " * 100_000))
    expect("code of a long input", error.code, "context_length_exceeded")
    return len(bad)


if __name__ == "__main__":
    sys.exit(main())
