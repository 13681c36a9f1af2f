"""Stands in for mlflow: notes the calls that gneiss_tune makes."""

from _journal import record

names = ("set_experiment", "start_run", "log_params", "log_metrics", "end_run")
set_experiment, start_run, log_params, log_metrics, end_run = (record(f"mlflow.{name}") for name in names)
