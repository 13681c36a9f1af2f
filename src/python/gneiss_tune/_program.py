"""The program as a process: its events, its result, its errors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

LOG = logging.getLogger("gneiss_tune")
INTERRUPTED = 130


class GneissError(RuntimeError):
    """The program failed; the message is its own. ``exit_code`` is its exit code."""

    exit_code = 1


class InputError(GneissError, ValueError):
    """Bad usage or bad input."""

    exit_code = 2


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run, whose state is saved; the message says how to continue. ``run`` is the run, if it has begun."""

    run: Any = None


class GneissWarning(UserWarning):
    """A warning of the program."""


def find_program() -> str:
    """The path of ``gneiss``: GNEISS_PROGRAM, or the one that was installed with this package, or the one on PATH."""
    folders = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable), sysconfig.get_path("scripts", f"{os.name}_user")]
    paths = [os.path.join(folder, "gneiss" + (sysconfig.get_config_var("EXE") or "")) for folder in folders if folder]
    found = os.environ.get("GNEISS_PROGRAM") or next(filter(os.path.isfile, paths), None) or shutil.which("gneiss")
    if not found:
        raise FileNotFoundError(f"gneiss: expected the program in one of {', '.join(paths)} or on PATH, found none")
    return found


class Program:
    """A running command, with a bar for its progress. Leaving the block ends it."""

    def __init__(self, command: Sequence[str], progress: bool = False) -> None:
        # A session of its own: Ctrl-C reaches this process, which passes it on, on a terminal as in a notebook.
        self.process = subprocess.Popen(
            [find_program(), "--progress=json", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", start_new_session=True)
        self.bar, self.output = Bar(progress), ""
        self.messages: list[str] = []
        self.queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        for pipe in (self.process.stdout, self.process.stderr):
            threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def _read(self, pipe: Any) -> None:
        with pipe:
            for line in pipe:
                event = {"event": "message", "text": line.rstrip("\n")}
                if pipe is self.process.stdout:
                    event = {"event": "output", "text": line}
                elif line.startswith("{"):
                    with contextlib.suppress(ValueError):
                        event = json.loads(line)
                self.queue.put(event)
        self.queue.put(None)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a command that still runs: a run saves its state first."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        self.bar.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """The events until the program ends; raises its error. Warnings and messages go to Python's."""
        ended, error = 0, ""
        while ended < 2:
            try:
                event = self.queue.get()
            except KeyboardInterrupt:
                self.process.send_signal(signal.SIGINT)
                continue
            if event is None:
                ended += 1
                continue
            kind, text = event.get("event"), event.get("text", "")
            if kind in ("error", "interrupted"):
                error = text
                continue
            if kind == "output":
                self.output += text
            elif kind == "warning":
                warnings.warn(text, GneissWarning, stacklevel=3)
            elif kind == "message":
                LOG.info("%s", text)
                self.messages.append(text)
            yield event
        code = self.process.wait()
        if code == INTERRUPTED:
            raise Interrupted(error or "interrupted")
        if code != 0:
            error_type = InputError if code == InputError.exit_code else GneissError
            raised = error_type(error or "\n".join(self.messages[-20:]) or f"gneiss ended with code {code}")
            raised.exit_code = code
            raise raised

    def result(self) -> dict[str, Any]:
        """What the program printed, as JSON."""
        return cast("dict[str, Any]", json.loads(self.output))


class Bar:
    """A bar of tqdm, in a terminal or a notebook; nothing if tqdm is not installed or ``is_shown`` is false."""

    def __init__(self, is_shown: bool) -> None:
        self.is_shown = is_shown
        self.bar: Any = None

    def start(self, name: str, total: int | None, done: int) -> None:
        """Begins a stage, after the end of the last one."""
        self.close()
        if self.is_shown:
            with contextlib.suppress(ImportError):
                from tqdm.auto import tqdm
                self.bar = tqdm(desc=name, total=total, initial=done)

    def advance(self, text: str = "", to: int | None = None) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1 if to is None else to - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
