"""Loads a completions server with classification requests and prints what came of it as one JSON object.

    python benches/serve/load.py --url http://127.0.0.1:8080 --model tutorial
        [--connections 32] [--requests 1000] [--max-tokens 2] [--pid PID] [--key KEY]

First the rows of --test are asked as they are, which warms the server up and gives its accuracy; then --requests more,
timed. Each connection asks again as soon as it has its answer. A timed prompt is a review of --test and --train with its own
number put into it, so that no two are alike and a cache of prompts has nothing to give; the seventh token or so is where
they part. With --pid the resident memory of that process is sampled. Exit code 1 where a request failed.

HTTP is spoken by hand, over connections that stay open, so that the client takes little of the machine it shares.
"""

import argparse
import asyncio
import csv
import json
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

VERBALIZER = "classify {0, 1} {{input}}"
COMMENT = "Comment: "  # how a review begins
SAMPLE_SECONDS = 0.2
LONGEST_WAIT = 300  # seconds for one answer


def main():
    args = arguments()
    report = asyncio.run(load(args))
    print(json.dumps(report))
    for text, times in report["failures"].items():
        print(f"load: {times} x {text}", file=sys.stderr)
    return 1 if report["failures"] else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", required=True, type=split_url, help="http://HOST:PORT")
    add("--model", required=True, help="name of the model to ask")
    add("--key", help="sent as a bearer token")
    add("--connections", type=positive, default=32)
    add("--requests", type=positive, default=1000, help="timed requests")
    add("--max-tokens", type=positive, default=2)
    add("--verbalizer", default=VERBALIZER)
    add("--test", type=Path, default=Path("data/test.csv"))
    add("--train", type=Path, default=Path("data/train.csv"))
    add("--pid", type=positive, help="process whose memory is sampled")
    return parser.parse_args()


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {value}")
    return value


def split_url(text):
    url = urlsplit(text)
    if url.scheme != "http" or not url.hostname or not url.port:
        raise argparse.ArgumentTypeError(f"expected http://HOST:PORT, found {text!r}")
    return url.hostname, url.port


# ---------------------------------------------------------------- prompts


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["input"], row["output"].strip()) for row in csv.DictReader(file)]


def numbered(text, number):
    """The review with a number of its own in front."""
    if not text.startswith(COMMENT):
        sys.exit(f"expected rows that begin with {COMMENT!r}, found {text[:40]!r}")
    return f"{COMMENT}Visit {number}. {text[len(COMMENT):]}"


def request(args, text):
    """The bytes of one request."""
    prompt = args.verbalizer.replace("{{input}}", text)
    body = json.dumps({"model": args.model, "prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0}).encode()
    host, port = args.url
    key = f"authorization: Bearer {args.key}\r\n" if args.key else ""
    head = (f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n{key}"
            f"content-length: {len(body)}\r\n\r\n")
    return head.encode() + body


# ---------------------------------------------------------------- the load


async def load(args):
    test = read(args.test)
    reviews = test + read(args.train)
    first = await ask_all(args, [request(args, text) for text, _ in test], None)
    correct = sum(answer is not None and answer.strip() == output for answer, (_, output) in zip(first["answers"], test))
    timed_requests = (request(args, numbered(reviews[n % len(reviews)][0], n)) for n in range(args.requests))
    memory = Memory(args.pid, args.requests) if args.pid else None
    timed = await ask_all(args, list(timed_requests), memory)
    latencies = sorted(timed["latencies"])
    report = {
        "connections": args.connections, "requests": args.requests, "completed": len(latencies),
        "seconds": timed["seconds"], "requests_per_second": len(latencies) / timed["seconds"],
        "latency_seconds": quantiles(latencies),
        "answers": Counter(answer for answer in timed["answers"] if answer is not None).most_common(20),
        "accuracy": {"correct": correct, "total": len(test)},
        "test_answers": first["answers"],
        "failures": dict(first["failures"] + timed["failures"]),
        "client_cpu_seconds": time.process_time(),
    }
    return report | ({"rss_bytes": memory.summary()} if memory else {})


def quantiles(ordered):
    if not ordered:
        return None
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return {"mean": statistics.fmean(ordered), "p50": at(0.50), "p90": at(0.90), "p99": at(0.99), "max": ordered[-1]}


async def ask_all(args, requests, memory):
    """Sends all requests over the connections; answers in the requests' order."""
    answers, latencies, failures = [None] * len(requests), [], Counter()
    todo = iter(enumerate(requests))
    start = time.perf_counter()
    sampling = asyncio.create_task(memory.sample(latencies)) if memory else None

    async def worker():
        channel = None
        for number, data in todo:
            sent = time.perf_counter()
            try:
                if channel is None or channel.closed:
                    channel = await Channel.open(*args.url)
                async with asyncio.timeout(LONGEST_WAIT):
                    status, body = await channel.ask(data)
                if status != 200:
                    raise ValueError(f"status {status}: {body[:200]!r}")
                answers[number] = json.loads(body)["choices"][0]["text"]
                latencies.append(time.perf_counter() - sent)
            except (OSError, ValueError, KeyError, IndexError, TimeoutError) as problem:
                failures[f"{type(problem).__name__}: {problem}"] += 1
                if channel is not None:
                    channel.close()
                channel = None
        if channel is not None:
            channel.close()

    await asyncio.gather(*(worker() for _ in range(min(args.connections, len(requests)))))
    seconds = time.perf_counter() - start
    if sampling:
        sampling.cancel()
        memory.take(len(latencies))
    return {"answers": answers, "latencies": latencies, "failures": failures, "seconds": seconds}


class Channel(asyncio.Protocol):
    """A connection on which one request at a time waits for its answer."""

    @classmethod
    async def open(cls, host, port):
        _, channel = await asyncio.get_running_loop().create_connection(cls, host, port)
        return channel

    def connection_made(self, transport):
        self.transport, self.waiting, self.data, self.closed = transport, None, bytearray(), False

    def ask(self, data):
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.waiting

    def data_received(self, data):
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next((line[15:] for line in lines if line.startswith("content-length:")), None)
        if length is None:
            return self.finish(ValueError(f"expected an answer with a content-length, found {lines}"))
        if len(rest) >= int(length):
            self.data = bytearray()
            self.finish((int(lines[0].split()[1]), bytes(rest)))

    def finish(self, outcome):
        if self.waiting is None or self.waiting.done():
            return
        if isinstance(outcome, Exception):
            self.waiting.set_exception(outcome)
        else:
            self.waiting.set_result(outcome)

    def connection_lost(self, problem):
        self.closed = True
        self.finish(problem or ConnectionError("the server closed the connection"))

    def close(self):
        self.closed = True
        self.transport.close()


class Memory:
    """Resident memory of a process over a run."""

    def __init__(self, pid, requests):
        self.path, self.requests, self.samples = Path(f"/proc/{pid}/statm"), requests, []
        self.take(0)

    def take(self, done):
        pages = int(self.path.read_text().split()[1])
        self.samples.append((done, pages * os.sysconf("SC_PAGE_SIZE")))

    async def sample(self, latencies):
        while True:
            self.take(len(latencies))
            await asyncio.sleep(SAMPLE_SECONDS)

    def summary(self):
        """At the start, when a tenth of the requests was done, at the end, and the most in between."""
        tenth = next(size for done, size in self.samples if done >= self.requests / 10 or done == self.samples[-1][0])
        return {"first": self.samples[0][1], "tenth": tenth, "last": self.samples[-1][1],
                "max": max(size for _, size in self.samples)}


if __name__ == "__main__":
    sys.exit(main())
