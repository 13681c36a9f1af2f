"""A run folder."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any


class Run:
    """A run, read from its folder whenever something of it is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def adapter(self) -> Path:
        """The folder for ``PeftModel.from_pretrained``."""
        return self.path / "adapter"

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: the settings and results of the run."""
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json, which :func:`gneiss_tune.evaluate` writes."""
        return json.loads((self.path / "evaluation.json").read_text(encoding="utf-8"))

    def _records(self, kind: str) -> Any:
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        # The last line of a run that goes on may be incomplete.
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        records = [record for record in map(json.loads, lines) if ("best" in record) == (kind == "epochs")]
        try:
            import pandas
        except ImportError:
            return records
        return pandas.DataFrame.from_records(records)

    @property
    def metrics(self) -> Any:
        """A row for each optimizer step: a pandas DataFrame, or a list of dicts if pandas is not installed."""
        return self._records("steps")

    @property
    def epochs(self) -> Any:
        """A row for each epoch, as :attr:`metrics`."""
        return self._records("epochs")

    def report(self, height: int = 800) -> Any:
        """The report, shown inline in a notebook; its path if IPython is not installed."""
        path = self.path / "report.html"
        try:
            from IPython.display import HTML
        except ImportError:
            return path
        page = html.escape(path.read_text(encoding="utf-8"), quote=True)
        return HTML(f'<iframe srcdoc="{page}" width="100%" height="{height}" style="border:0"></iframe>')

    def _repr_html_(self) -> str:
        summary = self.summary
        rows = {"run": self.path, "status": summary["status"]["state"], "model": summary["model"]["id"]}
        rows["steps"] = f"{summary['steps']} of {summary['total_steps']}"
        for key in ("train_loss", "validation_loss"):
            if isinstance(summary.get(key), float):
                rows[key.replace("_", " ")] = f"{summary[key]:.4f}"
        rows["adapter"] = self.adapter
        cells = "".join(f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in rows.items())
        curve = self.path / "curve.svg"
        return f"<table>{cells}</table>{curve.read_text(encoding='utf-8') if curve.is_file() else ''}"
