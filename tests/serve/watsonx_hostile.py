"""Sends `gneiss watsonx` what no client should send: an error each, nothing outside the store, and flat memory.

    watsonx_hostile.py --url https://127.0.0.1:8443 --key K --pid PID --store DIR

The server allows bodies of 20,000 bytes, data assets of 100,000, 100 records of a kind and 256 connections, and waits a second for a
slow client. Prints a JSON summary; exit code 1, with what differed, if something did. Needs httpx.
"""

import argparse
import gzip
import json
import resource
import socket
import ssl
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx

BODY, ASSET = 20_000, 100_000
CONNECTIONS = 1000
SOCKETS, ALLOWED = 70, 64
MEMORY = 64 << 20
UNPACKED, READERS = 80 << 20, 50
ODD_NAMES = ["../../outside", "..", "/etc/passwd", "a/../../b", "%2e%2e%2f", "<script>alert(1)</script>", "\u202ename", "\U0001f415", "a\nb", " "]
BAD_NAMES = ["a\0b", "x" * 5000, 7, ["x"], {"a": 1}, True]
ROWS = [{"input": f"visit {i} was {'good' if i % 2 else 'bad'}", "output": str(i % 2)} for i in range(32)]


def expect_that(holds, text):
    if not holds:
        raise AssertionError(text)


class Attack:
    def __init__(self, args):
        self.args, self.url = args, urlsplit(args.url)
        self.client = httpx.Client(base_url=args.url, verify=False, timeout=60, headers={"authorization": f"Bearer {args.key}"})
        self.tls = ssl._create_unverified_context()

    def expect(self, statuses, method, path, **more):
        """Expects one of the statuses and, if it is an error, a message for people."""
        statuses = statuses if isinstance(statuses, tuple) else (statuses,)
        answer = self.client.request(method, path, **more)
        said = str(more.get("json", more.get("content", "")))[:80]
        expect_that(answer.status_code in statuses, f"{method} {path[:80]} {said}: expected {statuses}, found {answer.status_code} {answer.text[:300]}")
        if answer.status_code >= 400:
            body = answer.json()
            message = body["errors"][0]["message"] if "errors" in body else body["error"]["message"]
            expect_that(message and ".rs:" not in message and self.args.store not in message, f"expected a message for people, found {message}")
            return message
        return answer.json() if answer.content else {}

    def memory(self):
        return int(Path(f"/proc/{self.args.pid}/statm").read_text().split()[1]) * resource.getpagesize()

    def files(self):
        """Everything beside the store."""
        return sorted(str(path) for path in Path(self.args.store).parent.iterdir())

    def alive(self):
        expect_that(self.client.get("/health").status_code == 200, "expected a server that goes on")

    def connect(self):
        return socket.create_connection((self.url.hostname, self.url.port), timeout=60)

    def upload(self, content, status=201, name="rows", **more):
        made = self.expect(201, "POST", "/v2/assets", json={"metadata": {"name": name}})["asset_id"]
        attached = self.expect(201, "POST", f"/v2/assets/{made}/attachments", json={"name": name})
        message = self.expect(status, "PUT", attached["url1"], content=content, **more)
        if status != 201:
            self.expect(204, "DELETE", f"/v2/assets/{made}")
            return message
        self.expect(200, "POST", f"/v2/assets/{made}/attachments/{attached['attachment_id']}/complete")
        return made

    def training(self, asset, name="t", status=201, **tuning):
        base = self.expect(200, "GET", "/ml/v1/foundation_model_specs")["resources"][0]["model_id"]
        parameters = {"base_model": {"model_id": base}, "task_id": "classification", "batch_size": 8, "accumulate_steps": 1} | tuning
        body = {"name": name, "training_data_references": [{"type": "data_asset", "location": {"id": asset}}], "prompt_tuning": parameters}
        return self.expect(status, "POST", "/ml/v4/trainings", json=body)

    # ------------------------------------------------------------ what is sent

    def names(self):
        asset = self.upload(json.dumps(ROWS).encode())
        for name in ODD_NAMES:
            made = self.upload(b"[]", name=name)
            found = self.expect(200, "GET", f"/v2/assets/{made}")["metadata"]["name"]
            expect_that(found == name, f"expected the name {name!r}, found {found!r}")
            self.expect(204, "DELETE", f"/v2/assets/{made}")
            run = self.training(asset, name=name, num_epochs=1)["metadata"]["id"]
            self.expect(204, "DELETE", f"/ml/v4/trainings/{run}?hard_delete=true")
        for name in BAD_NAMES:
            self.expect(400, "POST", "/v2/assets", json={"metadata": {"name": name}})
            self.training(asset, name=name, status=400)
        for key in ("project_id", "space_id"):
            self.expect(400, "POST", f"/v2/assets?{key}={'x' * 5000}", json={"metadata": {"name": "n"}})
        for id in ["../../x", "..%2f..%2fsecret", "%00", "x" * 5000, "\u202e"]:
            for path in ("/v2/assets/", "/ml/v4/trainings/", "/ml/v4/models/", "/ml/v4/deployments/", "/v2/asset_files/data_asset/"):
                self.expect((400, 403, 404), "GET", path + id)
                self.expect((400, 403, 404, 405), "DELETE", path + id)
        return len(ODD_NAMES) + len(BAD_NAMES)

    def bodies(self):
        count = 0
        for path in ("/v2/assets", "/ml/v4/trainings", "/ml/v4/models", "/ml/v4/deployments", "/v2/asset_types/data_asset/search"):
            for content in (b"", b"{", b"[]", b"7", b'"x"', b"null", b"\xff\xfe", b"[" * 5000, b'{"metadata": 7, "training_id": [], "asset": 1, "query": {}}'):
                if path.endswith("search") and content == b"":
                    continue
                self.expect(400, "POST", path, content=content)
                count += 1
            self.expect(413, "POST", path, content=b" " * (BODY + 1))
        wrong = ["x", -1, 0, 1.5, [], {}, "1" * 400, 1e300, True]
        asset = self.upload(json.dumps(ROWS).encode())
        for key in ("num_epochs", "batch_size", "accumulate_steps", "max_input_tokens", "max_output_tokens"):
            for value in wrong:
                message = self.training(asset, status=400, **{key: value})
                expect_that(key in message, f"expected a message that names {key}, found {message}")
                count += 1
        for key, value in [("learning_rate", "x"), ("learning_rate", -1), ("verbalizer", "no place"), ("verbalizer", 7), ("init_method", "x"),
                           ("init_text", ["x"]), ("tuning_type", "lora"), ("base_model", {"model_id": "../x"}), ("base_model", 7)]:
            self.training(asset, status=400, **{key: value})
        self.expect((400, 404), "PATCH", "/ml/v4/deployments/x", content=b"{")
        return count

    def uploads(self):
        self.upload(b"x" * (ASSET + 1), status=413)
        self.upload((b"x" * 1000 for _ in range(ASSET // 1000 + 1)), status=413)
        for kind in ("multipart/form-data", f"multipart/form-data; boundary={'b' * 5000}", "multipart/form-data; boundary=b"):
            self.upload(b"--b\r\nno end", status=400, headers={"content-type": kind})
        states = []
        for content in (b"\x00\x01\x02" * 1000, b"[]", b"[{}]", b'[{"input": 1}]', b"{" * 1000, b"input\nx\n", b"\x1f\x8b broken", b"PAR1 broken"):
            asset = self.upload(content)
            self.expect(400, "GET", f"/v2/assets/{asset}/examples")
            run = self.training(asset, num_epochs=1)["metadata"]["id"]
            until = time.time() + 60
            while (status := self.expect(200, "GET", f"/ml/v4/trainings/{run}")["entity"]["status"])["state"] in ("pending", "running") and time.time() < until:
                time.sleep(0.05)
            states.append(status["state"])
            text = json.dumps(status)
            expect_that(status["state"] == "failed" and self.args.store not in text, f"{content[:20]}: expected a failure with its reason, found {text}")
        return states

    def readings(self):
        """Examples that unpack to more than a data asset may have, tasks that there are not, and readers that leave at once."""
        before = self.memory()
        asset = self.upload(gzip.compress(bytes(UNPACKED)))
        for answer in (self.expect(400, "GET", f"/v2/assets/{asset}/examples"), self.training(asset, status=400)):
            expect_that("--max-asset-bytes" in answer, f"expected a message that names the limit, found {answer}")
        for task in ("x", "", "classification%00", "classification&task=x", "x" * 5000):
            self.expect(400, "GET", f"/v2/assets/{asset}/examples?task={task}")
        for _ in range(READERS):
            with self.tls.wrap_socket(self.connect()) as connection:
                connection.sendall(f"GET /v2/assets/{asset}/examples HTTP/1.1\r\nhost: {self.url.netloc}\r\n"
                                   f"authorization: Bearer {self.args.key}\r\n\r\n".encode())
        self.expect(400, "GET", f"/v2/assets/{asset}/examples")
        growth = self.memory() - before
        expect_that(growth < MEMORY, f"expected at most {MEMORY} more bytes of memory, found {growth}")
        self.expect(204, "DELETE", f"/v2/assets/{asset}")
        return growth

    # ------------------------------------------------------------ who never finishes

    def connections(self):
        """Silent ones, and ones that stop in the handshake or in a request's head: there are places again after a second."""
        before = self.memory()
        with ExitStack() as stack:
            for i in range(CONNECTIONS):
                connection = stack.enter_context(self.connect())
                if i % 2:
                    connection.sendall(b"\x16\x03\x01\x02\x00\x01")
            slow = stack.enter_context(self.tls.wrap_socket(self.connect()))
            slow.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ")
            slow.settimeout(30)
            answer = slow.recv(1 << 16)
            expect_that(not answer or answer.startswith(b"HTTP/1.1 408"), f"expected a closed connection, found {answer}")
            growth = self.memory() - before
        self.alive()
        expect_that(growth < MEMORY, f"expected at most {MEMORY} more bytes of memory, found {growth}")
        return growth

    def slow_upload(self):
        made = self.expect(201, "POST", "/v2/assets", json={"metadata": {"name": "slow"}})["asset_id"]
        url = self.expect(201, "POST", f"/v2/assets/{made}/attachments", json={"name": "slow"})["url1"]
        with self.tls.wrap_socket(self.connect()) as connection:
            connection.sendall(f"PUT {url} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n[".encode())
            found = connection.recv(1 << 16)
        expect_that(found.startswith(b"HTTP/1.1 408"), f"expected 408, found {found[:200]}")
        self.expect(204, "DELETE", f"/v2/assets/{made}")
        return 408

    def handshake(self, path, key="AAAAAAAAAAAAAAAAAAAAAA==", more=""):
        authorization = "" if "authorization" in more else f"authorization: Bearer {self.args.key}\r\n"
        connection = self.tls.wrap_socket(self.connect())
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: {self.url.netloc}\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
                           f"sec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n{authorization}{more}\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += connection.recv(1)
        return connection, int(data.split()[1])

    def sockets(self):
        """WebSockets that never read, that send too much, and that are no WebSockets."""
        run = self.training(self.upload(json.dumps(ROWS).encode()), num_epochs=100_000)["metadata"]["id"]
        path = f"/ml/v4/trainings/{run}"
        for status, target, more in [
            (404, "/ml/v4/trainings/none", ""), (401, path, "authorization: Bearer wrong\r\n"), (403, path, "origin: https://evil.example\r\n"),
        ]:
            connection, found = self.handshake(target, more=more)
            connection.close()
            expect_that(found == status, f"{target} {more}: expected {status}, found {found}")
        before, found = self.memory(), []
        with ExitStack() as stack:
            opened = []
            for _ in range(SOCKETS):
                connection, status = self.handshake(path)
                opened.append(stack.enter_context(connection))
                found.append(status)
            expect_that(found == [101] * ALLOWED + [429] * (SOCKETS - ALLOWED), f"expected {ALLOWED} WebSockets, found {found}")
            try:
                opened[0].sendall(b"\x82\xff" + (1 << 20).to_bytes(8, "big") + b"mask" + b"x" * (1 << 20))
            except OSError:
                pass  # it was closed before all was sent
            self.alive()
            self.expect(204, "DELETE", path)
            opened[1].settimeout(60)
            sent = b""
            while b"the training is canceled" not in sent and (data := opened[1].recv(1 << 16)):
                sent += data
            expect_that(b"the training is canceled" in sent, f"expected the end of the run, found {sent[-200:]}")
            growth = self.memory() - before
        expect_that(growth < MEMORY, f"expected at most {MEMORY} more bytes of memory, found {growth}")
        self.expect(204, "DELETE", path + "?hard_delete=true")
        return growth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--url", "--key", "--store"):
        parser.add_argument(name, required=True)
    parser.add_argument("--pid", type=int, required=True)
    args = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096) if most > 0 else 4096, most))
    attack = Attack(args)
    summary, problems, before = {}, [], attack.files()
    for case in (attack.names, attack.bodies, attack.uploads, attack.readings, attack.connections, attack.slow_upload, attack.sockets):
        start = time.monotonic()
        try:
            summary[case.__name__] = case()
            attack.alive()
        except (AssertionError, httpx.HTTPError, OSError, KeyError, ValueError) as problem:
            problems.append(f"{case.__name__}: {problem!r}")
        print(f"{case.__name__}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    if attack.files() != before:
        problems.append(f"expected nothing beside the store, found {set(attack.files()) - set(before)}")
    print(json.dumps({"cases": summary, "failed": len(problems)}))
    for problem in problems:
        print(f"watsonx_hostile: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
