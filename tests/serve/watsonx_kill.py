"""Kills `gneiss watsonx` at random moments: after each restart everything that it acknowledged is there, and the run ends with the
bits of one that nothing stopped.

    watsonx_kill.py --gneiss target/release/gneiss --folder DIR --model base --rounds 100 [--seed 7]

DIR gets the stores. In every round a client uploads data, starts a training and deploys the models that exist, until the server is
killed. Prints a JSON summary; exit code 1 if something was lost. Needs httpx.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

TUNING = {
    "task_id": "classification", "tuning_type": "prompt_tuning", "accumulate_steps": 1, "batch_size": 8, "learning_rate": 0.1,
    "num_epochs": 3, "max_input_tokens": 64, "max_output_tokens": 2, "init_method": "text", "init_text": "Say 1 or 0.",
    "verbalizer": "classify {0, 1} {{input}}",
}
PLACE = {"project_id": "p"}


class Server:
    """A process, and a client of it."""

    def __init__(self, args, store):
        command = [args.gneiss, "watsonx", "--model", args.model, "--device", "cpu", "--dtype", "f32", "--store", str(store),
                   "--listen", "127.0.0.1:0", "--set", "prompt.num_virtual_tokens=8", "--set", "train.checkpoint_steps=2"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=args.folder)
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            raise AssertionError(f"expected a server that listens, found {line!r}")
        self.client = httpx.Client(base_url=line.split()[-1], verify=False, timeout=60, headers={"authorization": "Bearer x"})

    def call(self, method, path, *, status, **more):
        answer = self.client.request(method, path, **more)
        if answer.status_code != status:
            raise AssertionError(f"{method} {path}: expected {status}, found {answer.status_code} {answer.text}")
        return answer

    def upload(self, name, content):
        made = self.call("POST", "/v2/assets", status=201, params=PLACE, json={"metadata": {"name": name}}).json()["asset_id"]
        attached = self.call("POST", f"/v2/assets/{made}/attachments", status=201, json={"name": name}).json()
        self.call("PUT", attached["url1"], status=201, content=content)
        self.call("POST", f"/v2/assets/{made}/attachments/{attached['attachment_id']}/complete", status=200)
        return made

    def train(self, asset):
        body = PLACE | {"name": "t", "auto_update_model": True, "training_data_references": [{"type": "data_asset", "location": {"id": asset}}],
                        "prompt_tuning": TUNING | {"base_model": {"model_id": self.base()}}}
        return self.call("POST", "/ml/v4/trainings", status=201, json=body).json()["metadata"]["id"]

    def base(self):
        return self.call("GET", "/ml/v1/foundation_model_specs", status=200).json()["resources"][0]["model_id"]

    def training(self, id):
        return self.call("GET", f"/ml/v4/trainings/{id}", status=200).json()["entity"]

    def deploy(self, model):
        body = PLACE | {"name": "d", "online": {}, "asset": {"id": model}}
        return self.call("POST", "/ml/v4/deployments", status=202, json=body).json()["metadata"]["id"]

    def kill(self, worker=None):
        self.process.kill()
        self.process.wait()
        if worker is not None:
            worker.join()
        self.client.close()


class Acknowledged:
    """What the server has said to have stored."""

    def __init__(self):
        self.assets, self.trainings, self.models, self.deployments = {}, [], {}, {}

    def check(self, server):
        for asset, content in self.assets.items():
            details = server.call("GET", f"/v2/assets/{asset}", status=200).json()
            attachment = details["attachments"][0]["id"]
            url = server.call("GET", f"/v2/assets/{asset}/attachments/{attachment}", status=200).json()["url"]
            found = server.call("GET", url, status=200).content
            if found != content:
                raise AssertionError(f"asset {asset}: expected {len(content)} bytes, found {len(found)} other ones")
        for training in self.trainings:
            state = server.training(training)["status"]["state"]
            if state not in ("pending", "running", "storing", "completed"):
                raise AssertionError(f"training {training}: expected one that goes on or is completed, found {state}")
        for model, training in self.models.items():
            found = server.call("GET", f"/ml/v4/models/{model}", status=200).json()["entity"]["training_id"]
            if found != training or server.training(training)["model_id"] != model:
                raise AssertionError(f"model {model}: expected that of {training}, found that of {found}")
        for deployment, model in self.deployments.items():
            found = server.call("GET", f"/ml/v4/deployments/{deployment}", status=200).json()["entity"]["asset"]["id"]
            if found != model:
                raise AssertionError(f"deployment {deployment}: expected model {model}, found {found}")


def work(server, acknowledged, number):
    """Creates things until the server is gone."""
    content = json.dumps([{"input": f"visit {number % 1000} of {i} was {'good' if i % 2 else 'bad'}", "output": str(i % 2)} for i in range(40)]).encode()
    try:
        asset = server.upload(f"rows {number}", content)
        acknowledged.assets[asset] = content
        if len(acknowledged.trainings) < 1 + number // 3:
            acknowledged.trainings.append(server.train(first_asset(acknowledged)))
        while True:
            for training in acknowledged.trainings:
                model = server.training(training).get("model_id")
                if model and model not in acknowledged.models:
                    acknowledged.models[model] = training
                    acknowledged.deployments[server.deploy(model)] = model
            time.sleep(0.02)
    except httpx.HTTPError:
        pass


def first_asset(acknowledged):
    """All trainings use the same data, so that all have the same result."""
    return next(iter(acknowledged.assets))


def prompt(store, training):
    return (store / "trainings" / training / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


def finish(server, trainings):
    until = time.time() + 300
    while {server.training(training)["status"]["state"] for training in trainings} != {"completed"}:
        if time.time() > until:
            raise AssertionError(f"expected completed trainings, found {[server.training(one)['status'] for one in trainings]}")
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gneiss", required=True)
    add("--folder", type=Path, required=True)
    add("--model", required=True)
    add("--rounds", type=int, default=100)
    add("--seed", type=int, default=7)
    add("--longest", type=float, default=1.0, help="most seconds from a start to the kill")
    args = parser.parse_args()
    chance, store, acknowledged = random.Random(args.seed), args.folder / "killed", Acknowledged()
    for number in range(args.rounds):
        server = Server(args, store)
        acknowledged.check(server)
        worker = threading.Thread(target=work, args=(server, acknowledged, number))
        worker.start()
        time.sleep(chance.uniform(0, args.longest))
        server.kill(worker)
    server = Server(args, store)
    acknowledged.check(server)
    if not acknowledged.trainings:
        raise AssertionError("expected trainings that were acknowledged before a kill, found none")
    finish(server, acknowledged.trainings)
    state = {one: server.training(one) for one in acknowledged.trainings}
    server.kill()
    undisturbed = args.folder / "undisturbed"
    server = Server(args, undisturbed)
    first = server.train(server.upload("rows", acknowledged.assets[first_asset(acknowledged)]))
    finish(server, [first])
    steps = len(server.training(first)["status"]["metrics"])
    server.kill()
    expected = prompt(undisturbed, first)
    for training in acknowledged.trainings:
        if prompt(store, training) != expected:
            raise AssertionError(f"training {training}: expected the bits of a run that nothing stopped")
        found = len(state[training]["status"]["metrics"])
        if found != steps:
            raise AssertionError(f"training {training}: expected {steps} metrics, found {found}")
    counts = {key: len(value) for key, value in vars(acknowledged).items()}
    print(json.dumps(counts | {"rounds": args.rounds, "lost": 0}))


if __name__ == "__main__":
    try:
        main()
    except AssertionError as problem:
        print(f"watsonx_kill: {problem}", file=sys.stderr)
        sys.exit(1)
