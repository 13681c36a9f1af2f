"""Executes docs/tutorial.ipynb with a small model, and compares what its cells show with the outputs that are kept in it.

    check_notebook.py FOLDER

FOLDER has configs/, data/ and the model, which GNEISS_NOTEBOOK_MODEL names; tests/cli/python.rs makes it. Texts and figures differ from
the kept ones, which are those of another model: the kinds of outputs and the tables' rows and columns are compared. Needs nbclient,
ipykernel, pandas and tqdm. Exit code 1, with what differs.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parent.parent.parent / "docs" / "tutorial.ipynb"
CELL_SECONDS = 300


def shape(output):
    """What a reader sees of an output, without texts and figures: a stream by its name, data by its kinds and a table's heads."""
    if output.output_type == "stream":
        return output.name
    data = output.data
    heads = re.findall(r"<th>([^<]*)</th>", data.get("text/html", "")) if "<table" in data.get("text/html", "") else []
    # Rows that are numbered depend on the data, and the names of prompts are the same.
    return sorted(data), [head for head in heads if not re.fullmatch(r"\d*", head)], "<svg" in data.get("text/html", "")


def shapes(cell):
    # Bars and warnings may or may not be written to stderr: they depend on the time that a cell takes.
    return [shape(output) for output in cell.outputs if output.get("name") != "stderr"]


def problems(kept, executed):
    for number, (before, after) in enumerate(zip(kept.cells, executed.cells), 1):
        if before.cell_type != "code":
            continue
        if before.execution_count is None or any(output.output_type == "error" for output in before.outputs):
            yield f"cell {number}: its kept outputs are not those of a complete execution"
        if shapes(before) != shapes(after):
            yield f"cell {number}: kept {shapes(before)}, found {shapes(after)}"
    kept_text = NOTEBOOK.read_text(encoding="utf-8")
    for path in re.findall(r"(?:/home/|/root/|/tmp/|/Users/)[^\"\\\s<]*", kept_text):
        yield f"a kept output names a path of the machine that executed it: {path}"


def main():
    kept = nbformat.read(NOTEBOOK, as_version=4)
    if kept.nbformat_minor < 5 or not any(cell.cell_type == "code" for cell in kept.cells):
        return f"{NOTEBOOK.name}: expected cells with code and ids"
    executed = nbformat.read(NOTEBOOK, as_version=4)
    try:
        NotebookClient(executed, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": sys.argv[1]}}).execute()
    except CellExecutionError as error:
        return f"a cell failed: {error}"
    found = list(problems(kept, executed))
    print(f"{sum(cell.cell_type == 'code' for cell in kept.cells)} cells executed")
    return "\n".join(found) or 0


if __name__ == "__main__":
    sys.exit(main())
