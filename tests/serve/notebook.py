"""Runs the steps of IBM's notebook against `gneiss watsonx`, with a profile by which a small model learns: `make notebook`.

    notebook.py --gneiss target/release/gneiss --model models/SmolLM2-135M-Instruct.Q4_1.gguf [--least-accuracy 0.9]
                [--store DIR] [--old-sdk] [options of watsonx_flow.py]...

The store is deleted at the end, unless --store names it. `--old-sdk` is for the SDK 1.1.26 of 2024: `make notebook-old-sdk`.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "data"
NAME = "ibm/granite-13b-instruct-v2"
PROFILE = HERE.parent.parent / "configs" / "watsonx" / "small-model.toml"
# Keys of [train] for which watsonx has a parameter.
PARAMETERS = {"learning_rate", "accumulate_steps", "batch_size", "num_epochs"}
# The small model reached 0.983 with the profile's 12 epochs and 0.966 with 3 (bf16, one CPU); another CPU or dtype changes a few answers.
LEAST_ACCURACY = "0.9"
OLD_SDK = ["--also", "instance_id=openshift", "--also", "version=5.0", "--no-warnings", "--only", "tutorial"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gneiss", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", default=str(PROFILE))
    parser.add_argument("--least-accuracy", default=LEAST_ACCURACY)
    parser.add_argument("--store")
    parser.add_argument("--old-sdk", action="store_true")
    args, more = parser.parse_known_args()
    with ExitStack() as stack:
        store = args.store or stack.enter_context(tempfile.TemporaryDirectory())
        command = [args.gneiss, "watsonx", "--model", args.model, "--as", NAME, "--store", store, "--listen", "127.0.0.1:0",
                   "--profile", args.profile]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = server.stdout.readline()
            if not line.startswith("listening on "):
                return f"expected a server that listens, found {line!r}"
            train = tomllib.loads(Path(args.profile).read_text())["watsonx"].get("train", {})
            used = [word for key, value in train.items() if key in PARAMETERS for word in ("--used", f"{key}={value}")]
            old = [*OLD_SDK, "--verify", str(Path(store) / "tls" / "certificate.pem")] if args.old_sdk else []
            files = ["--train", str(DATA / "train.csv"), "--test", str(DATA / "test.csv")]
            flow = [sys.executable, str(HERE / "watsonx_flow.py"), "--url", line.split()[-1], "--base", NAME, "--stand-in"]
            least = ["--least-accuracy", args.least_accuracy]
            return subprocess.run([*flow, *files, *used, *least, *old, *more]).returncode
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
