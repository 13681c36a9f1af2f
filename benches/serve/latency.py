"""The latency of text generation by `gneiss watsonx` while it tunes a prompt, beside the same requests while it does nothing else.

    python benches/serve/latency.py --gneiss target/release/gneiss --model models/SmolLM2-135M-Instruct.Q4_1.gguf
        [--requests 40] [--max-tokens 2] [--profile configs/watsonx/small-model.toml] [--seed 7]

Starts the server, asks one request after the other with pauses of up to a second, so that they meet all moments of a step, starts
a run of the tutorial, asks the same requests again, and cancels it. Prints one JSON object. Exit code 1 if a request fails, or the
run does not go on during all of the second requests. Uses only the standard library.
"""

import argparse
import csv
import http.client
import json
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
VERBALIZER = "classify {0, 1} {{input}}"
INIT_TEXT = "Extract the satisfaction from the comment. Return simple '1' for satisfied customer or '0' for unsatisfied. Comment:"
# The notebook's parameters.
TUNING = {
    "task_id": "classification", "tuning_type": "prompt_tuning", "accumulate_steps": 16, "batch_size": 8, "learning_rate": 0.001,
    "num_epochs": 12, "max_input_tokens": 128, "max_output_tokens": 2, "init_method": "text", "init_text": INIT_TEXT, "verbalizer": VERBALIZER,
}
LONGEST_WAIT = 300  # seconds for the first step


class Client:
    """One connection to the server."""

    def __init__(self, url):
        place = urlsplit(url)
        self.connection = http.client.HTTPSConnection(place.hostname, place.port, context=ssl._create_unverified_context(), timeout=600)

    def call(self, method, path, body=None):
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        self.connection.request(method, path, content, {"Authorization": "Bearer any.key", "Content-Type": "application/json"})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= 400:
            sys.exit(f"{method} {path}: expected success, found {answer.status} {text.decode()}")
        return json.loads(text) if text else {}

    def upload(self, path):
        asset = self.call("POST", "/v2/assets", {"metadata": {"name": path.name}})["asset_id"]
        attached = self.call("POST", f"/v2/assets/{asset}/attachments", {"name": path.name})
        self.call("PUT", attached["url1"], path.read_bytes())
        self.call("POST", f"/v2/assets/{asset}/attachments/{attached['attachment_id']}/complete", {})
        return asset

    def ask_all(self, model, texts, args):
        """Seconds of each request."""
        chance, seconds = random.Random(args.seed), []
        for text in texts:
            body = {"model_id": model, "input": VERBALIZER.replace("{{input}}", text),
                    "parameters": {"decoding_method": "greedy", "min_new_tokens": args.max_tokens, "max_new_tokens": args.max_tokens}}
            time.sleep(chance.uniform(0, 1))
            start = time.perf_counter()
            self.call("POST", "/ml/v1/text/generation", body)
            seconds.append(time.perf_counter() - start)
        return seconds


def summary(seconds):
    return {"median": statistics.median(seconds), "mean": statistics.fmean(seconds), "worst": max(seconds), "best": min(seconds)}


def seconds_of_steps(metrics):
    """The time between two steps, requests between them included."""
    times = {entry["iteration"]: datetime.fromisoformat(entry["timestamp"]) for entry in metrics}
    ordered = [times[number] for number in sorted(times)]
    return [(after - before).total_seconds() for before, after in zip(ordered, ordered[1:])]


def status(client, path):
    return client.call("GET", path)["entity"]["status"]


def measure(client, args):
    with (ROOT / "data" / "test.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["input"] for row in csv.DictReader(file)]
    texts = [texts[i % len(texts)] for i in range(args.requests)]
    asset = client.upload(ROOT / "data" / "train.csv")
    model = client.call("GET", "/ml/v1/foundation_model_specs")["resources"][0]["model_id"]
    client.ask_all(model, texts[:3], args)  # warms up
    idle = client.ask_all(model, texts, args)
    body = {"name": "latency", "training_data_references": [{"type": "data_asset", "location": {"id": asset}}],
            "prompt_tuning": TUNING | {"base_model": {"model_id": model}}}
    path = f"/ml/v4/trainings/{client.call('POST', '/ml/v4/trainings', body)['metadata']['id']}"
    until = time.monotonic() + LONGEST_WAIT
    while not status(client, path).get("metrics"):
        if time.monotonic() > until:
            sys.exit(f"expected a step within {LONGEST_WAIT} s, found {status(client, path)}")
        time.sleep(0.2)
    before = len(status(client, path)["metrics"])
    start = time.perf_counter()
    tuning = client.ask_all(model, texts, args)
    elapsed = time.perf_counter() - start
    after = status(client, path)
    if after["state"] != "running":
        sys.exit(f"expected a run that goes on during all requests, found one that is {after['state']}; hint: fewer --requests")
    client.call("DELETE", path)
    steps = seconds_of_steps(after["metrics"])
    return {"requests": args.requests, "max_tokens": args.max_tokens, "idle_seconds": summary(idle), "tuning_seconds": summary(tuning),
            "steps": len(after["metrics"]) - before, "steps_per_second": (len(after["metrics"]) - before) / elapsed,
            "step_seconds": summary(steps[before:])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gneiss", required=True)
    add("--model", required=True)
    add("--profile", default=str(ROOT / "configs" / "watsonx" / "small-model.toml"))
    add("--requests", type=int, default=40)
    add("--max-tokens", type=int, default=2)
    add("--seed", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        command = [args.gneiss, "watsonx", "--model", args.model, "--store", store, "--listen", "127.0.0.1:0", "--profile", args.profile]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = server.stdout.readline()
            if not line.startswith("listening on "):
                return f"expected a server that listens, found {line!r}"
            print(json.dumps(measure(Client(line.split()[-1]), args)))
        finally:
            server.terminate()
            server.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
