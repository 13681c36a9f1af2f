"""Runs `docs/notebooks/prompt-tuning.ipynb` in a Jupyter kernel against a server, and looks at what its cells show.

    watsonx_jupyter.py --url https://127.0.0.1:8443 --key K --train train.json --test test.json [--epochs 12]

Exit code 1, with what differed, if a cell failed or shows something else. Needs nbclient and ipykernel beside IBM's SDK.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parent.parent.parent / "docs" / "notebooks" / "prompt-tuning.ipynb"
CELL_SECONDS = 600


def outputs(notebook, call):
    """What the cell with this call shows: texts and kinds of data."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code" and call in cell.source)
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(texts), {kind for output in cell.outputs for kind in output.get("data", {})}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--url", "--key", "--train", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--epochs", default="12")
    args = parser.parse_args()
    os.environ.update(GNEISS_URL=args.url, GNEISS_KEY=args.key, GNEISS_TRAIN=args.train, GNEISS_TEST=args.test, GNEISS_EPOCHS=args.epochs)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3").execute()
    except CellExecutionError as error:
        return f"a cell failed: {error}"
    for call, words in [
        ("PromptTunableModels.show()", "granite-13b-instruct-v2"), ("tuner.run(", "finished successfully"), ("get_run_status", "completed"),
        ("tuner.summary()", "granite-13b-instruct-v2"), ("deployments.create", "ready"),
    ]:
        text, _ = outputs(notebook, call)
        if words not in text:
            return f"{call}: expected {words!r}, found {text!r}"
    if "image/png" not in (kinds := outputs(notebook, "plot_learning_curve")[1]):
        return f"expected a picture of the learning curve, found {kinds}"
    text, _ = outputs(notebook, "generate_text")
    scores = dict(re.findall(r"(tuned|base): ([\d.]+)", text))
    if len(scores) != 2 or float(scores["tuned"]) < 0.5 or float(scores["tuned"]) <= float(scores["base"]):
        return f"expected a tuned prompt that is better than the base model, found {text!r}"
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
