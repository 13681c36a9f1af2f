"""HTTP by hand, for requests that no HTTP library would send."""

import json
import socket
from contextlib import closing

ANSWER_SECONDS = 120
COMPLETIONS = "/v1/completions"


def expect(name, found, expected):
    if found != expected:
        raise AssertionError(f"{name}: expected {expected!r}, found {found!r}")


def connect(args):
    return closing(socket.create_connection((args.url.hostname, args.url.port), timeout=ANSWER_SECONDS))


def head(args, method, path, length, kind="application/json", more=""):
    key = f"authorization: Bearer {args.key}\r\n" if args.key and "authorization:" not in more else ""
    size = f"content-length: {length}\r\n" if length is not None else ""
    kind = f"content-type: {kind}\r\n" if kind else ""
    return f"{method} {path} HTTP/1.1\r\nhost: {args.url.netloc}\r\n{kind}{key}{size}{more}\r\n".encode("latin-1")


def receive(connection):
    """(status, headers, body) of one answer; (None, {}, b"") where the server closed without one."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            piece = connection.recv(1 << 16)
            if not piece:
                break
            data += piece
        start, found, body = data.partition(b"\r\n\r\n")
        if not found:
            return None, {}, data
        first, *lines = start.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if ": " in line)}
        while len(body) < int(headers.get("content-length", 1 << 40)):
            piece = connection.recv(1 << 16)
            if not piece:
                break
            body += piece
    except (ConnectionResetError, BrokenPipeError):
        return None, {}, data
    return int(first.split()[1]), headers, body


def ask(args, body, path=COMPLETIONS, method="POST", **more):
    """The answer to one request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with connect(args) as connection:
        try:
            connection.sendall(head(args, method, path, len(body), **more) + body)
        except (ConnectionResetError, BrokenPipeError):
            pass  # the answer may have come before all was sent
        return receive(connection)


def alive(args):
    """Checks /health and gives the greedy answer to one prompt."""
    status, _, body = ask(args, b"", "/health", "GET", kind=None)
    expect("status of /health", status, 200)
    status, _, body = ask(args, {"model": args.model, "prompt": "The quick brown fox", "max_tokens": 4, "temperature": 0})
    if status != 200:
        raise AssertionError(f"expected a completion, found {status}: {body[:300]!r}")
    return json.loads(body)["choices"][0]["text"]


def check_error(path, status, expected, headers, body):
    """Expects one of the statuses, and an error of the API's form that says something and shows no source file."""
    if status not in expected:
        raise AssertionError(f"expected status {expected}, found {status}: {body[:300]!r}")
    expect("content-type", headers.get("content-type", "").split(";")[0], "application/json")
    try:
        found = json.loads(body)
        message = found["errors"][0]["message"] if path.startswith("/ml/") else found["error"]["message"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise AssertionError(f"expected an error of the API's form, found {body[:300]!r}") from None
    if not message or "panicked" in message or ".rs:" in message:
        raise AssertionError(f"expected a message for people, found {message!r}")
    return f"{status} {message[:120]}"
