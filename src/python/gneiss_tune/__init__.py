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

from ._program import GneissError, GneissWarning, InputError, Interrupted, Program, find_program
from ._run import Run
from ._trackers import ReportTo, Tracker

__all__ = ["GneissError", "GneissWarning", "InputError", "Interrupted", "Run", "Server", "evaluate", "find_program", "serve",
           "sweep", "tune"]

PathLike = Union[str, "os.PathLike[str]"]
Record = dict[str, Any]


def _command(name: str, config: PathLike | None, set: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:  # noqa: A002
    """``set`` as ``--set KEY=VALUE``, and flags of the command by their names; a list is a flag for each of its values."""
    command = [name, *([] if config is None else [os.fspath(config)])]
    sets = [f"{key}={json.dumps(value) if isinstance(value, (bool, list)) else value}" for key, value in set.items()]
    for flag, value in {**flags, "set": sets}.items():
        option = f"--{flag.replace('_', '-')}"
        several = value if isinstance(value, list) else [value]
        command += [option if one is True else f"{option}={one}" for one in several if one is not None and one is not False]
    return command


def tune(config: PathLike | None = None, *, set: Mapping[str, Any] = {},  # noqa: A002, B006
         on_step: Callable[[Record], Any] | None = None, report_to: ReportTo = None, project_name: str = "gneiss",
         progress: bool = True, **flags: Any) -> Run:
    """Tunes a prompt and returns its run, as ``gneiss tune``, whose flags are keywords: ``model``, ``resume`` and so on.

    ``set`` changes keys of the configuration. ``on_step`` gets the record of each step. ``report_to`` is "wandb", "mlflow",
    "trackio", several of them, or a function of (metrics, step). Ctrl-C ends the run after the current step and raises
    :class:`Interrupted`, a KeyboardInterrupt, whose ``run`` can be given to ``resume``.
    """
    run: Run | None = None
    command = _command("tune", config, set, {"json": True, **flags})
    with Tracker(report_to, project_name) as tracker, Program(command, progress) as program:
        try:
            for event in program.events():
                kind = event.pop("event", None)
                if kind == "start":
                    run = Run(event["run"])
                    tracker.start(run)
                    program.bar.start("tuning", event["steps"], event["done"])
                elif kind in ("step", "epoch"):
                    tracker.log(event)
                if kind == "step":
                    program.bar.advance(f"loss {event['loss'] or float('nan'):.4f}")
                    if on_step:
                        on_step(event)
        except Interrupted as interrupted:
            interrupted.run = run
            raise
        return Run(program.result()["run"])


def sweep(config: PathLike | None = None, *, set: Mapping[str, Any] = {},  # noqa: A002, B006
          progress: bool = True, **flags: Any) -> Iterator[Record]:
    """Yields the records of ``gneiss sweep --json`` as they come: epochs, decisions, ended trials; the last one, "finished",
    has all trials and the folder of the ``best`` one, for :class:`Run`."""
    with Program(_command("sweep", config, set, {"json": True, **flags}), progress) as program:
        program.bar.start("sweep, epochs", None, 0)
        for event in program.events():
            if event.get("event") == "output":
                record = json.loads(event["text"])
                if record.get("event") == "epoch":
                    program.bar.advance(f"trial {record['trial']}")
                yield record


def evaluate(config: PathLike, adapters: PathLike | Iterable[PathLike], *,
             set: Mapping[str, Any] = {}, progress: bool = True, **flags: Any) -> Record:  # noqa: A002, B006
    """Compares tuned prompts with the base model on the test file; the content of evaluation.json. As ``gneiss eval``."""
    several = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
    stage = None
    with Program(_command("eval", config, set, {"json": True, "adapter": several, **flags}), progress) as program:
        for event in program.events():
            if event.get("event") == "progress":
                if event["stage"] != stage:
                    stage = event["stage"]
                    program.bar.start(stage, event["total"], 0)
                program.bar.advance(to=event["done"])
        return program.result()


class Server:
    """A server that accepts requests: ``url`` for watsonx's clients and a browser, ``base_url`` for OpenAI's."""

    def __init__(self, url: str) -> None:
        self.url, self.base_url = url, f"{url}/v1"


@contextlib.contextmanager
def serve(model: str, adapters: Mapping[str, PathLike] = {}, **flags: Any) -> Iterator[Server]:  # noqa: B006
    """Serves the base model and tuned prompts by name until the block ends; as ``gneiss serve``, on any free port unless
    ``listen`` says another address."""
    named = [f"{name}={os.fspath(adapter)}" for name, adapter in adapters.items()]
    command = _command("serve", None, {}, {"model": model, "listen": "127.0.0.1:0", "adapter": named, **flags})
    with Program(command) as program:
        for event in program.events():
            if event.get("event") == "output" and event["text"].startswith("listening on "):
                yield Server(event["text"][len("listening on ") :].strip())
                return
    raise GneissError("gneiss serve ended without the line `listening on`")
