"""Two trials, each in a folder of its own: the second is stopped at its second report."""
import os
import tempfile
import time
from types import SimpleNamespace

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(0.02 * seconds)
_reports, _trial = [], 0


def report(metrics):
    _reports.append(metrics)
    if _trial == 1 and len(_reports) == 2:
        raise SystemExit(0)


def loguniform(low, high):
    return low


def choice(values):
    return values[0]


def with_resources(trainable, resources):
    return trainable


class TuneConfig:
    def __init__(self, metric, mode, num_samples, scheduler):
        assert mode == "min" and num_samples == 16
        self.metric = metric


class Tuner:
    def __init__(self, trainable, param_space, tune_config):
        self.trainable, self.space, self.metric = trainable, param_space, tune_config.metric

    def fit(self):
        global _trial
        results = []
        for _trial, rate in enumerate([0.02, 0.05]):
            _reports.clear()
            config = {**self.space, "train.learning_rate": rate}
            os.chdir(tempfile.mkdtemp())
            try:
                self.trainable(config)
                state = "complete"
            except SystemExit:
                state = "stopped"
            print(_trial, state, len(_reports))
            results.append(SimpleNamespace(config=config, metrics=_reports[-1]))
        best = min(results[:1], key=lambda result: result.metrics[self.metric])
        return SimpleNamespace(get_best_result=lambda: best)
