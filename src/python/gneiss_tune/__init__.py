"""Tunes soft prompts for frozen language models with the program ``gneiss``, which is part of this package.

>>> import gneiss_tune
>>> run = gneiss_tune.tune("mine.toml", set={"train.num_epochs": 12})
>>> run.metrics, run.adapter, run.report()

Everything is done by the program: this package runs it, reads its files, and shows its progress.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Union

from ._program import Bar, GneissError, GneissWarning, InputError, Interrupted, Program, find_program
from ._run import Run
from ._trackers import ReportTo, tracker

__all__ = [
    "GneissError", "GneissWarning", "InputError", "Interrupted", "Run", "Server", "evaluate", "find_program", "serve",
    "sweep", "tune",
]

PathLike = Union[str, "os.PathLike[str]"]


def _flags(set: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:  # noqa: A002
    """``set`` as ``--set KEY=VALUE``, and flags of the command by their names."""
    text = lambda value: json.dumps(value) if isinstance(value, (bool, list)) else str(value)  # noqa: E731
    command = [f"--set={key}={text(value)}" for key, value in set.items()]
    for name, value in flags.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            command.append(f"--{name.replace('_', '-')}={_path(value)}")
    return command


def _path(value: Any) -> str:
    return str(value.path if isinstance(value, Run) else value)


def tune(
    config: PathLike | None = None,
    *,
    set: Mapping[str, Any] = {},  # noqa: A002, B006
    on_step: Callable[[dict[str, Any]], None] | None = None,
    report_to: ReportTo = None,
    project_name: str = "gneiss",
    progress: bool = True,
    **flags: Any,
) -> Run:
    """Tunes a prompt and returns its run, as ``gneiss tune``, whose flags are keywords: ``model``, ``resume`` and so on.

    ``set`` changes keys of the configuration. ``on_step`` gets the record of each step. ``report_to`` is "wandb", "mlflow",
    "trackio", several of them, or a function of (metrics, step). Ctrl-C ends the run after the current step and raises
    :class:`Interrupted`, a KeyboardInterrupt, whose ``run`` can be given to ``resume``.
    """
    command = ["tune", "--json", *_flags(set, flags), *([] if config is None else [_path(config)])]
    run: Run | None = None
    with tracker(report_to, project_name) as track, Bar(progress) as bar, Program(command) as program:
        try:
            for event in program.events():
                kind = event.pop("event", None)
                if kind == "start":
                    run = Run(event["run"])
                    track.start(run)
                    bar.start("tuning", event["steps"], event["done"])
                elif kind == "step":
                    bar.advance(f"loss {event['loss'] or float('nan'):.4f}")
                    track.log(event)
                    if on_step:
                        on_step(event)
                elif kind == "epoch":
                    track.log(event)
        except Interrupted as interrupted:
            interrupted.run = run
            raise
        return Run(program.result()["run"])


def sweep(
    config: PathLike | None = None,
    *,
    set: Mapping[str, Any] = {},  # noqa: A002, B006
    progress: bool = True,
    **flags: Any,
) -> Iterator[dict[str, Any]]:
    """Yields the records of ``gneiss sweep --json`` as they come: epochs, decisions, ended trials; the last one, "finished",
    has all trials and the folder of the ``best`` one, for :class:`Run`."""
    command = ["sweep", "--json", *_flags(set, flags), *([] if config is None else [_path(config)])]
    with Bar(progress) as bar, Program(command) as program:
        bar.start("sweep, epochs", None, 0)
        for event in program.events():
            if event.get("event") == "output":
                record = json.loads(event["text"])
                if record.get("event") == "epoch":
                    bar.advance(f"trial {record['trial']}")
                yield record


def evaluate(
    config: PathLike,
    adapters: PathLike | Run | Iterable[PathLike | Run],
    *,
    set: Mapping[str, Any] = {},  # noqa: A002, B006
    progress: bool = True,
    **flags: Any,
) -> dict[str, Any]:
    """Compares tuned prompts with the base model on the test file; the content of evaluation.json. As ``gneiss eval``."""
    several = [adapters] if isinstance(adapters, (str, os.PathLike, Run)) else adapters
    command = ["eval", _path(config), "--json", *_flags(set, flags)]
    command += [f"--adapter={_path(adapter)}" for adapter in several]
    stage = None
    with Bar(progress) as bar, Program(command) as program:
        for event in program.events():
            if event.get("event") == "progress":
                if event["stage"] != stage:
                    stage = event["stage"]
                    bar.start(stage, event["total"], 0)
                bar.advance(to=event["done"])
        return program.result()


class Server:
    """A server that accepts requests: ``url`` for watsonx's clients and a browser, ``base_url`` for OpenAI's."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.base_url = f"{url}/v1"


@contextlib.contextmanager
def serve(model: str, adapters: Mapping[str, PathLike | Run] = {}, **flags: Any) -> Iterator[Server]:  # noqa: B006
    """Serves the base model and tuned prompts by name until the block ends; as ``gneiss serve``, on any free port unless
    ``listen`` says another address."""
    command = ["serve", *_flags({}, {"model": model, "listen": "127.0.0.1:0", **flags})]
    command += [f"--adapter={name}={_path(adapter)}" for name, adapter in adapters.items()]
    with Program(command) as program:
        yield Server(program.wait_for("listening on "))
