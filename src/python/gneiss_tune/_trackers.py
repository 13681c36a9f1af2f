"""Experiment trackers: wandb, mlflow, trackio, or a function."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Union

from ._run import Run

Log = Callable[[dict, int], None]
ReportTo = Union[None, str, Log, Iterable[Union[str, Log]]]
#: The names of metrics, by the keys of a step and of an epoch.
METRICS = {
    "loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
    "train_loss": "train/epoch_loss", "validation_loss": "validation/loss",
}


def _config(run: Run) -> dict[str, Any]:
    """The configuration with dotted keys; as text where Python has no reader of TOML (before 3.11)."""
    text = (run.path / "config.toml").read_text(encoding="utf-8")
    try:
        import tomllib
    except ImportError:
        return {"config.toml": text}
    flat: dict[str, Any] = {}
    for key, value in tomllib.loads(text).items():
        flat.update({f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value})
    return flat


class Tracker:
    """Passes metrics on to all targets."""

    def __init__(self, targets: Iterable[str | Log], project: str) -> None:
        self.project = project
        self.logs: list[Log] = [target for target in targets if callable(target)]
        # Imported at once, so that a missing module does not show after the model is loaded.
        names = [target for target in targets if not callable(target)]
        unknown = [name for name in names if name not in ("wandb", "mlflow", "trackio")]
        if unknown:
            raise ValueError(f"report_to: expected wandb, mlflow, trackio or a function, found {', '.join(unknown)}")
        self.modules = {name: importlib.import_module(name) for name in names}
        self.started: list[str] = []

    def start(self, run: Run) -> None:
        for name, module in self.modules.items():
            if name == "mlflow":
                module.set_experiment(self.project)
                module.start_run(run_name=run.path.name)
                module.log_params(_config(run))
                self.logs.append(lambda metrics, step, m=module: m.log_metrics(metrics, step=step))
            else:
                module.init(project=self.project, name=run.path.name, config=_config(run))
                self.logs.append(lambda metrics, step, m=module: m.log(metrics, step=step))
            self.started.append(name)

    def log(self, record: dict[str, Any]) -> None:
        """A step or an epoch."""
        metrics = {name: record[key] for key, name in METRICS.items() if isinstance(record.get(key), (int, float))}
        for log in self.logs:
            log(metrics, record["step"])

    def finish(self, is_good: bool) -> None:
        for name in self.started:
            if name == "mlflow":
                self.modules[name].end_run("FINISHED" if is_good else "FAILED")
            elif name == "wandb":
                self.modules[name].finish(exit_code=0 if is_good else 1)
            else:
                self.modules[name].finish()


@contextlib.contextmanager
def tracker(report_to: ReportTo, project: str) -> Iterator[Tracker]:
    """A tracker for the targets of ``report_to``: one, several, or names with commas between them."""
    if report_to is None:
        report_to = []
    elif isinstance(report_to, str):
        report_to = [name.strip() for name in report_to.split(",")]
    elif callable(report_to):
        report_to = [report_to]
    tracker = Tracker(list(report_to), project)
    try:
        yield tracker
    except BaseException:
        tracker.finish(False)
        raise
    tracker.finish(True)
