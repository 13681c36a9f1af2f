"""What the documentation's script uses of Optuna, for three trials: the second is pruned after its second report."""
import time

_sleep = time.sleep
time.sleep = lambda seconds: _sleep(0.02 * seconds)


class TrialPruned(Exception):
    pass


class pruners:
    class SuccessiveHalvingPruner:
        def __init__(self, min_resource):
            assert min_resource == 2


class Trial:
    def __init__(self, number):
        self.number, self.params, self.reports, self.value, self.state = number, {}, [], None, "running"

    def suggest_float(self, name, low, high, log):
        assert low < high and log
        return self.params.setdefault(name, [0.02, 0.05, 1e38][self.number])

    def suggest_int(self, name, low, high):
        return self.params.setdefault(name, low)

    def report(self, value, step):
        assert step == len(self.reports) + 1, (step, self.reports)
        self.reports.append(value)

    def should_prune(self):
        return self.number == 1 and len(self.reports) >= 2


class Study:
    def optimize(self, objective, n_trials, catch):
        self.trials = [Trial(number) for number in range(3)]
        for trial in self.trials:
            try:
                trial.value, trial.state = objective(trial), "complete"
            except TrialPruned:
                trial.state = "pruned"
            except catch as error:
                trial.state = f"failed: {error}"
            print(trial.number, trial.state, len(trial.reports))
        self.best_trial = min((t for t in self.trials if t.value is not None), key=lambda t: t.value)
        self.best_params, self.best_value = self.best_trial.params, self.best_trial.value


def create_study(direction, pruner):
    assert direction == "minimize"
    return Study()
