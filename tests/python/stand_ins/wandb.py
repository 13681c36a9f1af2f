"""Stands in for wandb: notes the calls that gneiss_tune makes."""

from _journal import record

init, log, finish = (record(f"wandb.{name}") for name in ("init", "log", "finish"))
