"""The program as a process: its events, its result, its errors."""

from __future__ import annotations

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
from typing import Any

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
    name = "gneiss" + (sysconfig.get_config_var("EXE") or "")
    folders = [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
    folders.append(sysconfig.get_path("scripts", f"{os.name}_user"))
    paths = [os.path.join(folder, name) for folder in folders if folder]
    named = os.environ.get("GNEISS_PROGRAM")
    found = named or next(filter(os.path.isfile, paths), None) or shutil.which("gneiss")
    if not found:
        raise FileNotFoundError(f"gneiss: expected the program in one of {', '.join(paths)} or on PATH, found none")
    return found


class Program:
    """A running command. Leaving the block ends it."""

    def __init__(self, command: Sequence[str]) -> None:
        # A session of its own: Ctrl-C reaches this process, which passes it on, on a terminal as in a notebook.
        self.process = subprocess.Popen(
            [find_program(), "--progress=json", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )
        self.output: list[str] = []
        self.messages: list[str] = []
        self.lines: queue.Queue[tuple[str, str | None]] = queue.Queue()
        for name in ("stdout", "stderr"):
            threading.Thread(target=self._read, args=(name,), daemon=True).start()

    def _read(self, name: str) -> None:
        with getattr(self.process, name) as pipe:
            for line in pipe:
                self.lines.put((name, line))
        self.lines.put((name, None))

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a command that still runs: a run saves its state first."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()

    def _next(self) -> tuple[str, str | None]:
        while True:
            try:
                return self.lines.get()
            except KeyboardInterrupt:
                self.process.send_signal(signal.SIGINT)

    def events(self) -> Iterator[dict[str, Any]]:
        """The events until the program ends; raises its error. Warnings and messages go to Python's."""
        ended, error = 0, None
        while ended < 2:
            name, line = self._next()
            if line is None:
                ended += 1
            elif name == "stdout":
                self.output.append(line)
                yield {"event": "output", "text": line}
            else:
                event = self._event(line)
                if event.get("event") in ("error", "interrupted"):
                    error = event["text"]
                else:
                    yield event
        code = self.process.wait()
        if code == INTERRUPTED:
            raise Interrupted(error or "interrupted")
        if code != 0:
            kind = InputError if code == InputError.exit_code else GneissError
            raised = kind(error or "\n".join(self.messages[-20:]) or f"gneiss ended with code {code}")
            raised.exit_code = code
            raise raised

    def _event(self, line: str) -> dict[str, Any]:
        try:
            event = json.loads(line)
        except ValueError:
            event = {"event": "message", "text": line.rstrip("\n")}
        if event.get("event") == "warning":
            warnings.warn(event["text"], GneissWarning, stacklevel=4)
        elif event.get("event") == "message":
            LOG.info("%s", event["text"])
            self.messages.append(event["text"])
        return event

    def result(self) -> dict[str, Any]:
        """What the program printed, as JSON."""
        return json.loads("".join(self.output))

    def wait_for(self, start: str) -> str:
        """What follows ``start`` on the first line of stdout that begins so."""
        for event in self.events():
            if event.get("event") == "output" and event["text"].startswith(start):
                return event["text"][len(start) :].strip()
        raise GneissError(f"gneiss ended without a line {start!r}")


class Bar:
    """A bar of tqdm, in a terminal or a notebook; nothing if tqdm is not installed or ``is_shown`` is false."""

    def __init__(self, is_shown: bool) -> None:
        self.is_shown, self.bar = is_shown, None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def start(self, name: str, total: int | None, done: int) -> None:
        """Begins a stage, after the end of the last one."""
        if not self.is_shown:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return
        self.__exit__()
        self.bar = tqdm(desc=name, total=total, initial=done)

    def advance(self, text: str = "", to: int | None = None) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(1 if to is None else to - self.bar.n)
