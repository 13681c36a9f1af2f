"""Runs the steps of IBM's notebook against `gneiss watsonx`, with a profile by which a small model learns: `make notebook`.

    notebook.py --gneiss target/release/gneiss --model models/SmolLM2-135M-Instruct.Q4_1.gguf [--least-accuracy 0.9]
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "data"
NAME = "ibm/granite-13b-instruct-v2"
PROFILE = HERE.parent.parent / "configs" / "watsonx" / "small-model.toml"
# Keys of [train] for which watsonx has a parameter.
PARAMETERS = {"learning_rate", "accumulate_steps", "batch_size", "num_epochs"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gneiss", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", default=str(PROFILE))
    parser.add_argument("--least-accuracy", default="0.9")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [args.gneiss, "watsonx", "--model", args.model, "--as", NAME, "--store", folder, "--listen", "127.0.0.1:0",
                   "--profile", args.profile]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = server.stdout.readline()
            if not line.startswith("listening on "):
                return f"expected a server that listens, found {line!r}"
            train = tomllib.loads(Path(args.profile).read_text())["watsonx"].get("train", {})
            used = [word for key, value in train.items() if key in PARAMETERS for word in ("--used", f"{key}={value}")]
            files = ["--train", str(DATA / "train.csv"), "--test", str(DATA / "test.csv")]
            flow = [sys.executable, str(HERE / "watsonx_flow.py"), "--url", line.split()[-1], "--base", NAME, "--stand-in"]
            return subprocess.run([*flow, *files, *used, "--least-accuracy", args.least_accuracy]).returncode
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
