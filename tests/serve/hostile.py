"""Sends a server what no client should send, and expects the proper error each time and a server that goes on.

    hostile.py --url http://HOST:PORT --model NAME [--key KEY] [--seconds 60] [--pid PID]

After each case /health and one completion are asked for, and have to be what they were at the start. --seconds is the
longest time that a slow or silent client may hold a connection. With --pid the server's open files are counted before and
after. Sockets and nothing else. Prints a JSON summary. Exit code 1, with what differed, where something did.
"""

import argparse
import base64
import gzip
import json
import os
import socket
import struct
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from urllib.parse import urlsplit

from raw import COMPLETIONS, alive, ask, check_error, connect, expect, head, receive

GENERATION = "/ml/v1/text/generation"
HANG_UPS = 60
NO_READERS = 500


def main():
    args = arguments()
    summary, problems = {}, []
    args.first = alive(args)
    files = open_files(args)
    for name, check in cases(args):
        start = time.monotonic()
        try:
            summary[name] = check()
        except Exception as problem:  # each case is its own; the rest still runs
            where = "" if isinstance(problem, AssertionError) else traceback.format_exc(limit=-2)
            problems.append(f"{name}: {problem}\n{where}")
        try:
            answer = alive(args)
            expect("a completion afterwards", answer, args.first)
        except Exception as problem:
            problems.append(f"{name}: the server did not go on: {problem!r}")
        if (passed := time.monotonic() - start) > 5:
            print(f"{name}: {passed:.1f} s", file=sys.stderr)
    if files is not None:
        # Connections that were left are closed when their time is over.
        end = time.monotonic() + args.seconds
        while open_files(args) > files + 2 and time.monotonic() < end:
            time.sleep(0.5)
        summary["open_files"] = [files, open_files(args)]
        if open_files(args) > files + 2:
            problems.append(f"expected about {files} open files at the end, found {open_files(args)}")
    print(json.dumps({"cases": summary, "failed": len(problems)}))
    for problem in problems:
        print(f"hostile: {problem}", file=sys.stderr)
    return 1 if problems else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", required=True, type=urlsplit)
    add("--model", required=True)
    add("--key")
    add("--seconds", type=float, default=60.0)
    add("--pid", type=int)
    return parser.parse_args()


def open_files(args):
    return len(os.listdir(f"/proc/{args.pid}/fd")) if args.pid else None


# ---------------------------------------------------------------- cases


def cases(args):
    """(name, check) of each case."""
    yield from bodies(args)
    yield from values(args)
    yield from texts(args)
    yield from requests(args)
    if args.key:
        yield from keys(args)
    yield "hang-ups in streams", partial(hang_ups, args, True)
    yield "hang-ups before the answer", partial(hang_ups, args, False)
    yield "many requests and no reader", partial(no_reader, args)
    yield "half-open connections", partial(half_open, args)
    yield "requests in one go", partial(pipelined, args)
    yield "slow and silent clients", partial(slow_clients, args)


def refuse(args, expected, body, path=COMPLETIONS, method="POST", **more):
    """Expects an error with one of the statuses."""
    expected = expected if isinstance(expected, tuple) else (expected,)
    status, headers, found = ask(args, body, path, method, **more)
    if status is None and None in expected:
        return "closed"
    return check_error(path, status, expected, headers, found)


def refuse_raw(args, *data):
    """Expects what is no request to be refused, or its connection to be closed."""
    with connect(args) as connection:
        try:
            connection.sendall(b"".join(data))
        except (ConnectionResetError, BrokenPipeError):
            pass
        status, _, body = receive(connection)
    if status not in (None, 400, 411, 413, 414, 431, 501, 505):
        raise AssertionError(f"expected a refusal or a closed connection, found {status}: {body[:300]!r}")
    return status or "closed"


def answer(args, body, path=COMPLETIONS, packed=False, **more):
    status, _, found = ask(args, gzip.compress(body) if packed else body, path, **more)
    if status != 200:
        raise AssertionError(f"expected an answer, found {status}: {found[:300]!r}")
    return status


def asked(args, **more):
    return {"model": args.model, "prompt": "a", "max_tokens": 2, "temperature": 0} | more


def watsonx(args, **parameters):
    return {"model_id": args.model, "input": "a", "parameters": {"max_new_tokens": 2} | parameters}


def spelled(body, key, value):
    """A body with JSON at `key` that json.dumps does not write."""
    return json.dumps(body | {key: "HERE"}).replace('"HERE"', value).encode()


def bodies(args):
    """Bodies that are too large, or no JSON object with a model and a prompt."""
    good = json.dumps(asked(args)).encode()
    yield "a prompt of 10 MB", lambda: refuse(args, 413, asked(args, prompt="dog " * 2_500_000))
    yield "a body of 100 MB", lambda: refuse(args, (413, None), b'{"prompt": "' + b"a" * 100_000_000 + b'"}')
    yield "10 TB announced", partial(announced, args, 10**13)
    yield "no body", partial(refuse, args, 400, b"")
    packed = gzip.compress(good)
    for name, expected, body, encoding in [
        ("a gzip bomb", 413, gzip.compress(b'{"prompt": "' + b"a" * 100_000_000 + b'"}'), "gzip"),
        ("gzip that is cut", 400, packed[:-9], "gzip"), ("text behind gzip", 400, packed + b"x" * 20, "gzip"),
        ("JSON that is no gzip", 400, good, "gzip"), ("no gzip at all", 400, b"", "gzip"), ("gzip unsaid", 400, packed, "identity"),
        ("gzip in gzip", 415, gzip.compress(packed), "gzip, gzip"), ("brotli", 415, packed, "br"),
        ("an encoding of odd letters", 415, packed, "g\xefp,;"),
    ]:
        yield name, partial(refuse, args, expected, body, more=f"content-encoding: {encoding}\r\n")
    yield "gzip", partial(answer, args, good, more="content-encoding: gzip\r\n", packed=True)
    for name, body in {
        "malformed JSON": b'{"model": ', "truncated JSON": good[:-7], "text behind JSON": good + b"x", "a list": b"[]",
        "null": b"null", "a number": b"7", "no model": b'{"prompt": "a"}',
        "no prompt": json.dumps({"model": args.model}).encode(), "invalid UTF-8": good.replace(b'"a"', b'"\xff\xfe\x80"'),
        "UTF-16": good.decode().encode("utf-16"), "100,000 lists in each other": b"[" * 100_000,
        "objects in each other": b'{"a":' * 100_000, "a NUL before": b"\0" + good,
        "closed lists in each other": spelled(asked(args), "prompt", "[" * 100_000 + "]" * 100_000),
        "a high surrogate alone": spelled(asked(args), "prompt", '"\\ud800"'),
        "a low surrogate alone": spelled(asked(args), "prompt", '"a\\udc00b"'),
        "temperature NaN": spelled(asked(args), "temperature", "NaN"),
        "temperature -Infinity": spelled(asked(args), "temperature", "-Infinity"),
        "temperature 1e999": spelled(asked(args), "temperature", "1e999"),
        "temperature NaN as text": json.dumps(asked(args, temperature="NaN")).encode(),
    }.items():
        yield name, partial(refuse, args, 400, body)
    yield "a surrogate alone, watsonx", partial(refuse, args, 400, spelled(watsonx(args), "input", '"\\ud800"'), GENERATION)
    yield "truncated JSON, watsonx", partial(refuse, args, 400, json.dumps(watsonx(args)).encode()[:-3], GENERATION)


def values(args):
    """Parameters of wrong types and out of range."""
    for key, wrong in {
        "model": [5, [], None], "prompt": [5, {}, [{}], [[]], [], ["a", 5], [1, "a"], [-1], [10**9], [1.5], None, True],
        "max_tokens": ["x", -1, 1.5, 10**9, 10**30, [], {}], "temperature": [-1, 1e9, "hot", []], "top_p": [0, 2, -1, "x"],
        "n": [0, -1, 10_000, 10**30, "x"], "logprobs": [-1, 10**6, "x"],
        "stop": [5, [5], [""], "", ["a"] * 17, ["a"] * 100_000], "seed": ["x", 1.5, 10**40], "stream": [1, "yes"],
        "logit_bias": [{"99999999": 1}, {"-1": 1}, {"x": 1}, {"1": 1e9}, {"1": "x"}, [], 5], "presence_penalty": [9, "x"],
        "frequency_penalty": [-9], "echo": ["x"], "stream_options": [5],
    }.items():
        for value in wrong:
            yield f"{key} {json.dumps(value)[:40]}", partial(refuse, args, 400, asked(args, **{key: value}))
    for key, wrong in {
        "max_new_tokens": [-1, "x", 10**9, 10**30], "temperature": [-1, "x"], "top_p": [2], "top_k": [-1],
        "random_seed": ["x", -1], "repetition_penalty": [0, -1, "x"], "stop_sequences": ["x", [5], [""], ["a"] * 1000],
        "time_limit": [-1, "x"], "decoding_method": ["beam", 5], "min_new_tokens": [5, -1],
        "truncate_input_tokens": [-1, "x"], "return_options": [5],
    }.items():
        for value in wrong:
            yield f"{key} {json.dumps(value)[:40]}, watsonx", partial(
                refuse, args, 400, watsonx(args, **{key: value}), GENERATION)
    yield "input 5", partial(refuse, args, 400, watsonx(args) | {"input": 5}, GENERATION)
    yield "parameters 5", partial(refuse, args, 400, watsonx(args) | {"parameters": 5}, GENERATION)
    for messages in (5, [], [5], [{}], [{"role": "user", "content": 5}], [{"role": 5, "content": "a"}]):
        yield f"messages {json.dumps(messages)}", partial(
            refuse, args, 400, {"model": args.model, "messages": messages}, "/v1/chat/completions")


def texts(args):
    """Texts that are odd, and texts that are too long."""
    yield "a prompt beyond the context", lambda: refuse(args, 400, asked(args, prompt="dog " * 200_000))
    yield "one of two prompts beyond the context", lambda: refuse(args, 400, asked(args, prompt=["a", "dog " * 200_000]))
    yield "an empty prompt", partial(refuse, args, 400, asked(args, prompt=""))
    yield "an empty input", partial(refuse, args, 400, watsonx(args) | {"input": ""}, GENERATION)
    yield "an unknown model", partial(refuse, args, 404, asked(args, model="nowhere"))
    yield "an unknown model with odd letters", partial(refuse, args, 404, asked(args, model="../../etc/passwd\n\u202e\0"))
    yield "an unknown deployment", partial(
        refuse, args, 404, {"input": "a"}, "/ml/v1/deployments/nowhere%2F..%2F/text/generation")
    for name, odd in {
        "special tokens": "<|im_start|><|im_end|><|endoftext|><s></s>", "controls": "\0\x01\x1b[31m\r\n\t",
        "emoji": "\U0001f9d1\u200d\U0001f680" * 4, "one letter, often": "a" * 60, "spaces": " " * 60,
        "no characters": "\ufffe\uffff\U0010ffff", "marks": "e" + "\u0301" * 20, "templates": "{{input}}{% raw %}{{",
    }.items():
        yield f"a prompt of {name}", partial(answer, args, asked(args, prompt=odd))
        yield f"an input of {name}", partial(answer, args, watsonx(args) | {"input": odd}, GENERATION)
    yield "a long stop", partial(answer, args, asked(args, stop=["x" * 100_000]))


def requests(args):
    """Paths, methods, headers, and what is no HTTP."""
    good = json.dumps(asked(args)).encode()
    yield "an unknown path", partial(refuse, args, 404, good, "/v1/nothing")
    yield "an unknown path of watsonx", partial(refuse, args, 404, good, "/ml/v1/nothing")
    yield "a path upwards", partial(refuse, args, 404, b"", "/../../etc/passwd", "GET")
    yield "a path with odd bytes", partial(refuse, args, (400, 404), b"", "/v1/models/%ff%00%0d%0a", "GET")
    yield "a long path", partial(refuse, args, (404, 414, 431), b"", "/" + "a" * 20_000, "GET")
    yield "a wrong method", partial(refuse, args, 405, b"", COMPLETIONS, "GET")
    yield "another wrong method", partial(refuse, args, 405, good, "/v1/models", "DELETE")
    yield "a wrong method of watsonx", partial(refuse, args, 405, b"", GENERATION, "GET")
    yield "a made-up method", partial(refuse, args, (400, 405), good, COMPLETIONS, "BREW")
    for kind in ("text/plain", "multipart/form-data", None):
        yield f"content type {kind}", partial(other_type, args, good, kind)
    yield "a length that is no number", partial(refuse_raw, args, head(args, "POST", COMPLETIONS, "many"))
    yield "two lengths", partial(refuse_raw, args, head(args, "POST", COMPLETIONS, 5, more="content-length: 6\r\n"), good)
    yield "a large header", partial(refuse_raw, args, head(args, "GET", "/health", None, more=f"x: {'a' * 1_000_000}\r\n"))
    yield "many headers", partial(refuse_raw, args, head(args, "GET", "/health", None, more="x: a\r\n" * 5_000))
    yield "no HTTP", partial(refuse_raw, args, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", bytes(range(256)), b"\r\n\r\n")
    yield "lines that are no HTTP", partial(refuse_raw, args, b"hello\r\nyou\r\n\r\n")
    yield "another version of HTTP", partial(refuse_raw, args, b"POST / HTTP/9.9\r\n\r\n")
    yield "a chunk of no size", partial(refuse_raw, args, chunked(args), b"zz\r\nabc\r\n")
    yield "an endless size of a chunk", partial(refuse_raw, args, chunked(args), b"f" * 100_000)


def keys(args):
    for name, value in {
        "no key": None, "a wrong key": f"Bearer {args.key}x", "a shorter key": f"Bearer {args.key[:-1]}",
        "the scheme alone": "Bearer ", "a long key": "Bearer " + "a" * 10_000, "a token that is none": "Bearer a.b.c",
        "a forged token": f"Bearer {forged()}", "a key that is no text": "Bearer \xff\xfe",
    }.items():
        more = f"authorization: {value}\r\n" if value else "x-authorization: none\r\n"
        for method, path in (("POST", COMPLETIONS), ("POST", GENERATION), ("GET", "/v1/models"), ("GET", "/metrics")):
            yield f"{name}, {path}", partial(refuse, args, 401, b"{}", path, method, more=more)


def forged():
    """A token as IBM's SDK gets one, that nobody signed."""
    parts = ({"alg": "none"}, {"sub": "gneiss", "exp": 4_000_000_000})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


# ---------------------------------------------------------------- connections


def announced(args, length):
    """A body is refused by its announced length before it comes."""
    with connect(args) as connection:
        connection.sendall(head(args, "POST", COMPLETIONS, length) + b'{"model": "')
        status, headers, body = receive(connection)
    return check_error(COMPLETIONS, status, (413,), headers, body)


def other_type(args, body, kind):
    """Another content type is taken for JSON, or refused as such."""
    status, headers, found = ask(args, body, kind=kind)
    return status if status == 200 else check_error(COMPLETIONS, status, (415,), headers, found)


def chunked(args):
    return head(args, "POST", COMPLETIONS, None, more="transfer-encoding: chunked\r\n")


def hang_ups(args, streamed):
    """Clients that ask for long answers and leave, half of them without a goodbye."""
    body = json.dumps(asked(args, max_tokens=100, stream=streamed, temperature=1.0)).encode()
    for number in range(HANG_UPS):
        with connect(args) as connection:
            connection.sendall(head(args, "POST", COMPLETIONS, len(body)) + body)
            if streamed:
                first = connection.recv(64)
                if b" 200 " not in first:
                    raise AssertionError(f"expected a stream, found {first!r}")
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return HANG_UPS


def no_reader(args):
    """Clients that ask for several short answers in one go and leave while they are written."""
    one = head(args, "GET", "/v1/models", None, kind=None)
    for number in range(NO_READERS):
        with connect(args) as connection:
            connection.sendall(one * (1 + number % 20))
    return NO_READERS


def half_open(args):
    """Many connections that say a part of a request, or nothing, while others are served."""
    body = json.dumps(asked(args)).encode()
    starts = [b"", b"POST", head(args, "POST", COMPLETIONS, len(body))[:-2], head(args, "POST", COMPLETIONS, len(body)) + body[:5]]
    with ExitStack() as stack:
        held = [stack.enter_context(connect(args)) for _ in range(200)]
        for number, connection in enumerate(held):
            connection.sendall(starts[number % len(starts)])
        expect("a completion among them", alive(args), args.first)
        for connection in held[::3]:
            connection.shutdown(socket.SHUT_WR)
        expect("a completion behind half of them", alive(args), args.first)
    return len(held)


def pipelined(args):
    """Requests behind each other in one piece are answered in order."""
    prompts = ["a", "b", "c", "d"]
    bodies_of = [json.dumps(asked(args, prompt=text, max_tokens=0, echo=True)).encode() for text in prompts]
    with connect(args) as connection:
        connection.sendall(b"".join(head(args, "POST", COMPLETIONS, len(body)) + body for body in bodies_of))
        file, found = connection.makefile("rb"), []
        for _ in prompts:
            length = 0
            while (line := file.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            found.append(json.loads(file.read(length))["choices"][0]["text"])
    expect("answers in order", found, prompts)
    return len(found)


def slow_clients(args):
    """Clients that send a byte every 0.2 s, or nothing, lose their connection in time; others are served meanwhile."""
    each = {
        "a body byte by byte": (head(args, "POST", COMPLETIONS, 100_000), b"a"),
        "chunks without end": (chunked(args), b"5\r\naaaaa\r\n"),
        "a head byte by byte": (b"POST /v1/completions HTTP/1.1\r\nx: ", b"a"),
        "a head of many lines": (b"POST /v1/completions HTTP/1.1\r\n", b"x: a\r\n"),
        "nothing": (b"", b""),
    }
    with ThreadPoolExecutor(len(each)) as threads:
        ended = {name: threads.submit(slow, args, *data) for name, data in each.items()}
        while not all(future.done() for future in ended.values()):
            expect("a completion meanwhile", alive(args), args.first)
            time.sleep(1)
        return {name: future.result() for name, future in ended.items()}


def slow(args, start, piece):
    """How a connection ended, and after how many seconds."""
    began = time.monotonic()
    with connect(args) as connection:
        connection.settimeout(0.2)
        data = start
        while (passed := time.monotonic() - began) < args.seconds:
            try:
                connection.sendall(data)
                found = connection.recv(1 << 16)
            except TimeoutError:
                data = piece
                continue
            except OSError:
                found = b""
            status = int(found.split()[1]) if found else None
            if status not in (None, 400, 408, 413):
                raise AssertionError(f"expected 408 or a closed connection, found {found[:200]!r}")
            return [status or "closed", round(passed, 1)]
    raise AssertionError(f"expected {start[-40:]!r} and {piece!r} again and again to end within {args.seconds} s, found it open")


if __name__ == "__main__":
    sys.exit(main())
