"""Experiment trackers: wandb, mlflow, trackio, or a function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Union

from ._run import Run

Log = Callable[[dict[str, Any], int], Any]
ReportTo = Union[None, str, Log, Iterable[Union[str, Log]]]
#: The names of metrics, by the keys of a step and of an epoch.
METRICS = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm",
           "train_loss": "train/epoch_loss", "validation_loss": "validation/loss"}


def _config(run: Run) -> dict[str, Any]:
    """The configuration with dotted keys; as text where Python has no reader of TOML (before 3.11)."""
    text = (run.path / "config.toml").read_text(encoding="utf-8")
    try:
        import tomllib
    except ImportError:
        return {"config.toml": text}
    flat: dict[str, Any] = {}
    for key, value in tomllib.loads(text).items():
        flat.update({f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value})
    return flat


class Tracker:
    """Passes metrics on to all targets of ``report_to``: one, several, or names with commas between them."""

    def __init__(self, report_to: ReportTo, project: str) -> None:
        several = report_to.split(",") if isinstance(report_to, str) else report_to or []
        targets: list[Any] = [several] if callable(several) else [t if callable(t) else str(t).strip() for t in several]
        names = [target for target in targets if not callable(target)]
        unknown = [name for name in names if name not in ("wandb", "mlflow", "trackio")]
        if unknown:
            raise ValueError(f"report_to: expected wandb, mlflow, trackio or a function, found {', '.join(unknown)}")
        # Imported at once, so that a missing module does not show after the model is loaded.
        self.modules: dict[str, Any] = {name: importlib.import_module(name) for name in names}
        self.logs: list[Log] = [target for target in targets if callable(target)]
        self.project, self.is_started = project, False

    def start(self, run: Run) -> None:
        """Begins the run in each tracker."""
        self.is_started = True
        for name, module in self.modules.items():
            if name == "mlflow":
                module.set_experiment(self.project)
                module.start_run(run_name=run.path.name)
                module.log_params(_config(run))
            else:
                module.init(project=self.project, name=run.path.name, config=_config(run))
            self.logs.append(module.log_metrics if name == "mlflow" else module.log)

    def log(self, record: dict[str, Any]) -> None:
        """A step or an epoch."""
        metrics = {name: record[key] for key, name in METRICS.items() if isinstance(record.get(key), (int, float))}
        for log in self.logs:
            log(metrics, record["step"])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        for name, module in self.modules.items() if self.is_started else ():
            if name == "mlflow":
                module.end_run("FAILED" if error else "FINISHED")
            else:
                module.finish(**({"exit_code": 1 if error else 0} if name == "wandb" else {}))
