"""Stands in for trackio: notes the calls that gneiss_tune makes."""

from _journal import record

init, log, finish = (record(f"trackio.{name}") for name in ("init", "log", "finish"))
