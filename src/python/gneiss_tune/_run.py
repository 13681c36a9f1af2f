"""A run folder."""

from __future__ import annotations

import contextlib
import html
import json
import os
from pathlib import Path
from typing import Any, cast


class Run(os.PathLike[str]):
    """A run, read from its folder whenever something of it is asked for. It can be given wherever a path can."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        #: The folder for ``PeftModel.from_pretrained``.
        self.adapter = self.path / "adapter"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def _json(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((self.path / name).read_text(encoding="utf-8")))

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: the settings and results of the run."""
        return self._json("summary.json")

    @property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json, which :func:`gneiss_tune.evaluate` writes."""
        return self._json("evaluation.json")

    def _records(self, are_epochs: bool) -> Any:
        with (self.path / "metrics.jsonl").open(encoding="utf-8") as lines:
            # The last line of a run that goes on may be incomplete.
            records = [json.loads(line) for line in lines if line.endswith("\n")]
        records = [record for record in records if ("best" in record) == are_epochs]
        with contextlib.suppress(ImportError):
            import pandas
            return pandas.DataFrame.from_records(records)
        return records

    @property
    def metrics(self) -> Any:
        """A row for each optimizer step: a pandas DataFrame, or a list of dicts if pandas is not installed."""
        return self._records(are_epochs=False)

    @property
    def epochs(self) -> Any:
        """A row for each epoch, as :attr:`metrics`."""
        return self._records(are_epochs=True)

    def report(self, height: int = 800) -> Any:
        """The report, shown inline in a notebook; its path if IPython is not installed."""
        path = self.path / "report.html"
        with contextlib.suppress(ImportError):
            from IPython.display import HTML
            page = html.escape(path.read_text(encoding="utf-8"), quote=True)
            return HTML(f'<iframe srcdoc="{page}" width="100%" height="{height}" style="border:0"></iframe>')
        return path

    def _repr_html_(self) -> str:
        summary, curve = self.summary, self.path / "curve.svg"
        rows = {"run": self.path, "status": summary["status"]["state"], "model": summary["model"]["id"],
                "steps": f"{summary['steps']} of {summary['total_steps']}"}
        losses = {key: summary.get(key) for key in ("train_loss", "validation_loss")}
        rows.update({key.replace("_", " "): f"{loss:.4f}" for key, loss in losses.items() if isinstance(loss, float)})
        rows["adapter"] = self.adapter
        cells = "".join(f"<tr><th>{key}</th><td>{html.escape(str(value))}</td></tr>" for key, value in rows.items())
        return f"<table>{cells}</table>{curve.read_text(encoding='utf-8') if curve.is_file() else ''}"
