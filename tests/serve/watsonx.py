"""The tutorial's step 9 with IBM's own SDK: asks a tuned deployment and the base model for every row of the test file, and holds
answers and accuracies against `gneiss eval`'s.

    watsonx.py --url URL --key KEY --deployment tutorial --base MODEL_ID --test data/test.csv --evaluation evaluation.json

The SDK takes https:// alone; for an http:// URL a TLS front with a certificate of its own stands before the server. Prints
a JSON summary. Exit code 1, with what differed, where something did. Needs ibm-watsonx-ai, and openssl for the front.
"""

import argparse
import asyncio
import csv
import json
import logging
import re
import ssl
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import checks
import httpx
from ibm_watsonx_ai import APIClient, Credentials
from ibm_watsonx_ai.foundation_models import ModelInference
from ibm_watsonx_ai.metanames import GenTextParamsMetaNames as GenParams
from ibm_watsonx_ai.wml_client_error import InvalidCredentialsError, WMLClientError

SPACE = "gneiss"
NEW_TOKENS = 12  # of the longer answers
NO_UUID = "00000000-0000-4000-8000-000000000000"
FAILURE = re.compile(r'(Status code: |"status_code":)5\d\d')  # of the server, in what the SDK raises; the port may have any digits


def main():
    warnings.simplefilter("ignore")
    logging.getLogger("ibm_watsonx_ai").setLevel(logging.CRITICAL)  # it logs each error that it raises
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        args.certificate, args.plain = True, args.url
        if urlsplit(args.url).scheme == "http":
            args.certificate = certificate(Path(folder))
            args.url = tls_front(args.url, args.certificate, Path(folder) / "key.pem")
        return checks.run("watsonx", (step_nine, streams, stops, options, seeds, tokens, chats, chat_streams, by_name, over_http, errors), args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", required=True)
    add("--key", required=True)
    add("--deployment", required=True, help="name of the tuned prompt")
    add("--base", required=True, help="id of the base model")
    add("--test", type=Path, required=True, help="CSV with the columns input and output")
    add("--evaluation", type=Path, required=True, help="evaluation.json of gneiss eval on the same file")
    add("--verbalizer", default="classify {0, 1} {{input}}")
    return parser.parse_args()


def expect(name, found, expected):
    if found != expected:
        raise AssertionError(f"{name}: expected {expected!r}, found {found!r}")


def expect_that(holds, text):
    if not holds:
        raise AssertionError(text)


# ---------------------------------------------------------------- the models


def client(args):
    credentials = Credentials(
        url=args.url, username="gneiss", api_key=args.key, instance_id="openshift", version="5.2", verify=args.certificate)
    return APIClient(credentials, space_id=SPACE)


def greedy(new_tokens, **more):
    return {GenParams.DECODING_METHOD: "greedy", GenParams.MAX_NEW_TOKENS: new_tokens, **more}


def tuned_model(args, new_tokens):
    api = client(args)
    found = api.deployments.get_details(serving_name=args.deployment)["resources"]
    expect("deployments of that serving name", len(found), 1)
    return ModelInference(deployment_id=api.deployments.get_id(found[0]), params=greedy(new_tokens), api_client=api)


def base_model(args, new_tokens):
    """With credentials in the constructor, as the tutorial has it."""
    credentials = Credentials(
        url=args.url, username="gneiss", api_key=args.key, instance_id="openshift", version="5.2", verify=args.certificate)
    return ModelInference(model_id=args.base, params=greedy(new_tokens), credentials=credentials, project_id=SPACE)


def virtual_tokens(args):
    """Of the tuned prompt, as the base and it count one text: the input_token_count of a deployment has them too."""
    text = args.verbalizer.replace("{{input}}", "a")
    counts = [model.generate(prompt=prompt)["results"][0]["input_token_count"]
              for model, prompt in ((tuned_model(args, 1), "a"), (base_model(args, 1), text))]
    expect_that(counts[0] > counts[1], f"expected virtual tokens among {counts[0]} of the input, found {counts[1]} without")
    return counts[0] - counts[1]


def rows(args):
    with args.test.open(newline="", encoding="utf-8") as file:
        return [(row["input"], row["output"].strip()) for row in csv.DictReader(file)]


# ---------------------------------------------------------------- checks


def accuracy(answers, outputs):
    """As the tutorial counts, but that what is no number is wrong where its int() would raise."""
    def right(answer, output):
        try:
            return int(answer.strip()) == int(output)
        except ValueError:
            return False

    return sum(map(right, answers, outputs)) / len(outputs)


def step_nine(args):
    evaluation = json.loads(args.evaluation.read_text())
    arms = {arm["name"]: arm["answers"] for arm in evaluation["arms"]}
    expect_that({"base", args.deployment} <= arms.keys(), f"{args.evaluation}: expected arms base and {args.deployment}, "
                f"found {sorted(arms)}")
    test = rows(args)
    outputs = [output for _, output in test]
    hard = evaluation["hard_prompt"]
    verbalized = [args.verbalizer.replace("{{input}}", text) for text, _ in test]
    asked = {
        args.deployment: (tuned_model(args, 2), [text for text, _ in test]),
        "base": (base_model(args, 2), [f"{hard} {text}" if hard else text for text in verbalized]),
    }
    found = {}
    for name, (model, prompts) in asked.items():
        answers = model.generate_text(prompt=prompts)
        predictions = arms[name]["predictions"]
        expect(f"{name}: rows", len(predictions), len(test))
        # A server gives whole characters; of a cut one at the end, eval shows a mark in its place.
        differ = [(p["line"], p["generated"], answer) for p, answer in zip(predictions, answers)
                  if p["generated"].rstrip("\ufffd") != answer.strip().rstrip("\ufffd")]
        expect_that(not differ, f"{name}: expected the answers of {args.evaluation}, found {len(differ)} others: (line, expected, "
                    f"found) {differ[:5]}")
        found[name] = accuracy(answers, outputs)
        expect(f"{name}: accuracy", found[name], arms[name]["generated"]["accuracy"])
    return {"accuracy": found, "rows": len(test)}


def streams(args):
    """A stream's pieces make up the answer that comes at once."""
    text = rows(args)[0][0]
    pieces = {}
    for model in (tuned_model(args, 2), base_model(args, NEW_TOKENS)):
        whole = model.generate(prompt=text)["results"][0]
        parts = list(model.generate_text_stream(prompt=text))
        expect("joined pieces of a stream", "".join(parts), whole["generated_text"])
        raw = [part["results"][0] for part in model.generate_text_stream(prompt=text, raw_response=True)]
        expect("reason of the last piece", raw[-1].get("stop_reason"), whole["stop_reason"])
        expect("tokens at the last piece", raw[-1].get("generated_token_count"), whole["generated_token_count"])
        early = {part.get("stop_reason", "not_finished").lower() for part in raw[:-1]}
        expect_that(early <= {"not_finished"}, f"expected no reason before the last piece, found {early}")
        pieces["tuned" if model.deployment_id else "base"] = len(parts)
    expect_that(max(pieces.values()) > 1, f"expected an answer in more than one piece, found {pieces}")
    return pieces


def stops(args):
    """A stop sequence ends the text: with it, or without where asked so."""
    model = base_model(args, NEW_TOKENS)
    text = rows(args)[0][0]
    whole = model.generate(prompt=text)["results"][0]
    expect("reason", whole["stop_reason"], "max_tokens")
    expect("tokens", whole["generated_token_count"], NEW_TOKENS)
    plain = whole["generated_text"]
    stop = plain[len(plain) // 2 :][:3]
    until = plain[: plain.index(stop)]
    found = model.generate(prompt=text, params=greedy(NEW_TOKENS, stop_sequences=[stop]))["results"][0]
    expect("reason", found["stop_reason"], "stop_sequence")
    expect("text to the stop sequence", found["generated_text"], until + stop)
    without = greedy(NEW_TOKENS, stop_sequences=["never comes", stop], include_stop_sequence=False)
    expect("text without it", model.generate_text(prompt=text, params=without), until)
    expect("streamed", "".join(model.generate_text_stream(prompt=text, params=without)), until)
    tuned = tuned_model(args, NEW_TOKENS).generate(prompt=text)["results"][0]
    reason = "max_tokens" if tuned["generated_token_count"] == NEW_TOKENS else "eos_token"
    expect(f"reason at the end of {tuned}", tuned["stop_reason"], reason)
    return {"plain": plain, "stop": stop}


def options(args):
    """return_options: the text in front of the answer, and tokens with log-probabilities and alternatives."""
    text, found = rows(args)[0][0], {}
    wanted = {"input_text": True, "generated_tokens": True, "input_tokens": True, "token_logprobs": True,
              "token_ranks": False, "top_n_tokens": 2}
    for model in (tuned_model(args, 2), base_model(args, 2)):
        virtual = virtual_tokens(args) if model.deployment_id else 0
        plain = model.generate(prompt=text)["results"][0]
        expect_that("generated_tokens" not in plain, f"expected no tokens unasked, found {plain}")
        full = model.generate(prompt=text, params=greedy(2, return_options=wanted))["results"][0]
        expect_that(full["generated_text"].endswith(plain["generated_text"]) and text in full["generated_text"],
                    f"expected input and answer {plain['generated_text']!r}, found {full['generated_text']!r}")
        tokens, inputs = full["generated_tokens"], full["input_tokens"]
        expect_that(len(tokens) in (full["generated_token_count"], full["generated_token_count"] - 1) and tokens,
                    f"expected {full['generated_token_count']} tokens, found {tokens}")
        expect("input tokens", len(inputs) + virtual, full["input_token_count"])
        for token in tokens:
            top = token["top_tokens"]
            expect("alternatives", len(top), 2)
            expect("the likeliest", (top[0]["text"], top[0]["logprob"]), (token["text"], token["logprob"]))
            expect_that(0 >= top[0]["logprob"] >= top[1]["logprob"], f"expected falling log-probabilities, found {top}")
        expect_that(all(token["logprob"] <= 0 for token in inputs[1:]), f"expected log-probabilities, found {inputs[:3]}")
        found["tuned" if model.deployment_id else "base"] = tokens
    return found


def seeds(args):
    """The same seed draws the same tokens; among several seeds some draw others."""
    model, text = base_model(args, NEW_TOKENS), rows(args)[0][0]

    def draw(seed):
        params = {"decoding_method": "sample", "temperature": 1.5, "top_k": 50, "top_p": 0.95, "random_seed": seed,
                  "repetition_penalty": 1.1, "min_new_tokens": 4, "max_new_tokens": NEW_TOKENS}
        return model.generate_text(prompt=text, params=params)

    drawn = [draw(seed) for seed in range(1, 5)]
    expect("drawn again", [draw(seed) for seed in range(1, 5)], drawn)
    expect_that(len(set(drawn)) > 1, f"expected other texts from other seeds, found {drawn}")
    narrow = {"decoding_method": "sample", "temperature": 1.0, "top_k": 1, "max_new_tokens": NEW_TOKENS, "random_seed": 3}
    expect("drawn among one", model.generate_text(prompt=text, params=narrow), model.generate_text(prompt=text))
    return drawn


def tokens(args):
    """tokenize counts what generation counts; a list, threads and async calls give one answer each."""
    model, text = base_model(args, NEW_TOKENS), rows(args)[0][0]
    found = model.tokenize(prompt=text, return_tokens=True)["result"]
    expect("tokens", len(found["tokens"]), found["token_count"])
    plain = model.generate(prompt=text)["results"][0]
    expect("tokens of the input", found["token_count"], plain["input_token_count"])

    async def later():
        try:
            return await model.agenerate(prompt=text)
        finally:
            await model.aclose_persistent_connection()

    expect("asynchronously", asyncio.run(later())["results"][0]["generated_text"], plain["generated_text"])
    cut = model.generate(prompt=text, params=greedy(2, truncate_input_tokens=5))["results"][0]
    expect("tokens of a cut input", cut["input_token_count"], 5)
    return found["token_count"]


MESSAGES = [{"role": "system", "content": "Say 1 or 0."},
            {"role": "user", "content": [{"type": "text", "text": "Long wait times.\nSatisfaction:"}]}]


def openai_chat(args, model, **more):
    """What POST /v1/chat/completions says to the same messages."""
    body = {"model": model, "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 0} | more
    headers = {"authorization": f"Bearer {args.key}"}
    verify = args.certificate if args.url != args.plain or args.plain.startswith("https") else True
    return httpx.post(f"{args.url}/v1/chat/completions", json=body, headers=headers, verify=verify, timeout=300).json()


def chats(args):
    """`chat` of a model and of a deployment, at once and asynchronously, says what OpenAI's API does."""
    params, found = {"max_tokens": NEW_TOKENS, "temperature": 0}, {}
    for model, name in ((base_model(args, 2), args.base), (tuned_model(args, 2), args.deployment)):
        answer, expected = model.chat(messages=MESSAGES, params=params), openai_chat(args, name)
        expect("choices", answer["choices"], expected["choices"])
        expect("usage", answer["usage"], expected["usage"])
        expect("model", answer["model_id"], name)
        expect_that(answer["created_at"].endswith("Z") and answer["id"], f"expected a time and an id, found {answer}")

        async def later(model=model):
            try:
                return await model.achat(messages=MESSAGES, params=params)
            finally:
                await model.aclose_persistent_connection()

        expect("asynchronously", asyncio.run(later())["choices"], expected["choices"])
        limited = model.chat(messages=MESSAGES, params=params | {"time_limit": 600_000, "n": 2, "logprobs": True, "top_logprobs": 2})
        expect("two", [choice["message"] for choice in limited["choices"]], [expected["choices"][0]["message"]] * 2)
        expect("alternatives", {len(token["top_logprobs"]) for token in limited["choices"][0]["logprobs"]["content"]}, {2})
        chosen = model.chat(messages=MESSAGES, params=params | {"guided_choice": ["yes", "no"]})["choices"][0]["message"]["content"]
        expect_that(chosen in ("yes", "no"), f"expected a choice, found {chosen!r}")
        found[name] = answer["choices"][0]["message"]["content"]
    said = base_model(args, 2)
    for what, call in {
        "tools": lambda: said.chat(messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]),
        "guided_regex": lambda: said.chat(messages=MESSAGES, params={"guided_regex": "a+"}),
        "messages": lambda: said.chat(messages=[]),
        "temperature": lambda: said.chat(messages=MESSAGES, params={"temperature": 3}),
    }.items():
        try:
            answer = call()
        except WMLClientError as error:
            expect_that(what in str(error), f"{what}: expected a message that names it, found {error}")
        else:
            raise AssertionError(f"{what}: expected an error, found {answer!r}")
    return found


def chat_streams(args):
    """The pieces of `chat_stream` make up the answer of `chat`; the last one tells the usage."""
    params, pieces = {"max_tokens": NEW_TOKENS, "temperature": 0}, {}
    for model, name in ((base_model(args, 2), args.base), (tuned_model(args, 2), args.deployment)):
        whole = model.chat(messages=MESSAGES, params=params)
        chunks = list(model.chat_stream(messages=MESSAGES, params=params))
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        text = "".join(part["delta"].get("content", "") for part in parts)
        expect("joined pieces of a stream", text, whole["choices"][0]["message"]["content"])
        expect("reason of the last piece", parts[-1]["finish_reason"], whole["choices"][0]["finish_reason"])
        expect("usage", chunks[-1]["usage"], whole["usage"])
        pieces[name] = len(parts)
    return pieces


def by_name(args):
    """A deployment answers to its serving name as to its id."""
    text = rows(args)[0][0]
    named = ModelInference(deployment_id=args.deployment, params=greedy(2), api_client=client(args), validate=False)
    expect("by name", named.generate_text(prompt=text), tuned_model(args, 2).generate_text(prompt=text))


def over_http(args):
    """Without TLS, through the SDK's own hook for an HTTP client."""
    if urlsplit(args.plain).scheme != "http":
        return None

    def plain(request):
        request.url = request.url.copy_with(scheme="http")

    with httpx.Client(event_hooks={"request": [plain]}, timeout=600) as through:
        credentials = Credentials(url=args.plain.replace("http:", "https:"), username="gneiss", api_key=args.key, version="5.2")
        api = APIClient(credentials, space_id=SPACE, httpx_client=through)
        model = ModelInference(deployment_id=args.deployment, params=greedy(2), api_client=api, validate=False)
        text = rows(args)[0][0]
        expect("over HTTP", model.generate_text(prompt=text), tuned_model(args, 2).generate_text(prompt=text))
    return True


def errors(args):
    """What the SDK raises says what was wrong."""
    api, text = client(args), rows(args)[0][0]
    params = greedy(2)
    said = {
        "a name": ("nowhere", lambda: ModelInference(
            deployment_id="nowhere", params=params, api_client=api, validate=False).generate_text(prompt=text)),
        "a name, streamed": ("nowhere", lambda: list(ModelInference(
            deployment_id="nowhere", params=params, api_client=api, validate=False).generate_text_stream(prompt=text))),
        "an id": (NO_UUID, lambda: ModelInference(deployment_id=NO_UUID, params=params, api_client=api)),
        "a model": ("nowhere", lambda: ModelInference(model_id="nowhere", params=params, api_client=api)),
        "a model, unchecked": ("nowhere", lambda: ModelInference(
            model_id="nowhere", params=params, api_client=api, validate=False).generate_text(prompt=text)),
    }
    bad = [("max_new_tokens", -1), ("max_new_tokens", "two"), ("temperature", -0.5), ("top_p", 2), ("top_k", -3),
           ("decoding_method", "beam"), ("repetition_penalty", -1), ("stop_sequences", "no list"), ("time_limit", -1)]
    base = base_model(args, 2)
    for name, value in bad:
        sample = {"decoding_method": "sample", "max_new_tokens": 2, name: value}
        said[f"{name} {value!r}"] = (name, lambda sample=sample: base.generate_text(prompt=text, params=sample))
    for what, (part, call) in said.items():
        try:
            answer = call()
        except WMLClientError as error:
            expect_that(part in str(error), f"{what}: expected a message that names {part!r}, found {error}")
            expect_that(not FAILURE.search(str(error)), f"{what}: expected no failure of the server, found {error}")
        else:
            raise AssertionError(f"{what}: expected an error that names {part!r}, found {answer!r}")
    try:
        APIClient(Credentials(url=args.url, username="gneiss", api_key=args.key + "x", version="5.2", verify=args.certificate))
    except InvalidCredentialsError:
        return len(said) + 1
    raise AssertionError("expected a wrong key to be refused, found a client")


# ---------------------------------------------------------------- TLS


def certificate(folder):
    """A certificate for this run and this machine, as a path."""
    path = folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out", path, "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return str(path)


def tls_front(url, certificate, key):
    """Starts a TLS front before an HTTP server; gives its https:// URL. It ends with this process."""
    target = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    ready, address = threading.Event(), []

    async def pipe(reader, writer):
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except (OSError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def connection(reader, writer):
        try:
            from_server, to_server = await asyncio.open_connection(target.hostname, target.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pipe(reader, to_server), pipe(from_server, writer))

    async def run():
        server = await asyncio.start_server(connection, "127.0.0.1", 0, ssl=context)
        address.append(server.sockets[0].getsockname()[1])
        ready.set()
        await server.serve_forever()

    threading.Thread(target=asyncio.run, args=(run(),), daemon=True).start()
    ready.wait()
    return f"https://127.0.0.1:{address[0]}"


if __name__ == "__main__":
    sys.exit(main())
