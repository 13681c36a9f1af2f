"""Runs the steps of IBM's notebook against `gneiss watsonx`, with a profile by which a small model learns: `make notebook`.

    notebook.py --gneiss target/release/gneiss --model models/SmolLM2-135M-Instruct.Q4_1.gguf [--least-accuracy 0.9]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "data"
NAME = "ibm/granite-13b-instruct-v2"
# The steps, the rate and the number of virtual tokens of configs/tutorial.toml.
PROFILE = ["train.learning_rate=0.01", "train.accumulate_steps=1", "prompt.num_virtual_tokens=0"]
USED = ["learning_rate=0.01", "accumulate_steps=1"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gneiss", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--least-accuracy", default="0.9")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sets = [word for pair in PROFILE for word in ("--set", pair)]
        command = [args.gneiss, "watsonx", "--model", args.model, "--as", NAME, "--store", folder, "--listen", "127.0.0.1:0", *sets]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = server.stdout.readline()
            if not line.startswith("listening on "):
                return f"expected a server that listens, found {line!r}"
            used = [word for pair in USED for word in ("--used", pair)]
            files = ["--train", str(DATA / "train.csv"), "--test", str(DATA / "test.csv")]
            flow = [sys.executable, str(HERE / "watsonx_flow.py"), "--url", line.split()[-1], "--base", NAME, "--stand-in"]
            return subprocess.run([*flow, *files, *used, "--least-accuracy", args.least_accuracy]).returncode
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
