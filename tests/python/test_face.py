"""The package gneiss_tune against the program; runs in a folder with a small model, dogs.toml and its files.

tests/cli/python.rs makes the folder and names the program in GNEISS_PROGRAM.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import unittest
import urllib.request
import warnings
from pathlib import Path

import gneiss_tune
from gneiss_tune import GneissError, InputError, Interrupted, Run

sys.path.insert(0, str(Path(__file__).parent / "stand_ins"))
import _journal  # noqa: E402

warnings.simplefilter("ignore", gneiss_tune.GneissWarning)


def tune(name, **options):
    options.setdefault("set", {})["name"] = name
    return gneiss_tune.tune("dogs.toml", progress=False, **options)


class Face(unittest.TestCase):
    def test_tune_returns_a_run_and_reports_every_step(self):
        steps = []
        run = tune("first", set={"train.num_epochs": 2, "train.shuffle": False}, on_step=steps.append)
        self.assertEqual(run.path, Path("runs/first"))
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        self.assertEqual(steps, [line for line in lines if "best" not in line])
        self.assertEqual(len(steps), 6)
        self.assertTrue((run.adapter / "adapter_config.json").is_file())
        self.assertEqual(run.summary["steps"], 6)
        self.assertEqual((len(run.metrics), len(run.epochs)), (6, 2))
        self.assertIn("<svg", run._repr_html_())
        self.assertIn("first", run._repr_html_())
        self.assertFalse(json.loads(json.dumps(run.summary))["status"]["state"] != "completed")
        report = run.report()
        shown = report._repr_html_() if hasattr(report, "_repr_html_") else report.read_text()
        self.assertIn("iframe" if hasattr(report, "_repr_html_") else "<html", shown)

        self.assertEqual((os.fspath(run), f"{run}", repr(run)), ("runs/first", "runs/first", "Run('runs/first')"))

        evaluation = gneiss_tune.evaluate("dogs.toml", run, progress=False)
        self.assertEqual([arm["name"] for arm in evaluation["arms"]], ["base", "first"])
        self.assertEqual(evaluation, run.evaluation)

    def test_a_list_is_a_flag_for_each_value(self):
        runs = [tune(name, set={"train.max_steps": 1}) for name in ("one", "two")]
        for adapters in (runs, iter(["runs/one", runs[1].path])):
            evaluation = gneiss_tune.evaluate("dogs.toml", adapters, progress=False, device="cpu", ensemble=True)
            self.assertEqual([arm["name"] for arm in evaluation["arms"]], ["base", "one", "two"])
            self.assertTrue(evaluation["ensemble"])

    @unittest.skipUnless(__import__("importlib.util").util.find_spec("pandas"), "pandas is not installed")
    def test_metrics_are_tables(self):
        frame = tune("table", set={"train.max_steps": 2}).metrics
        self.assertEqual(list(frame["step"]), [1, 2])
        self.assertTrue((frame["loss"] > 0).all())

    def test_errors_are_the_program_s(self):
        with self.assertRaisesRegex(InputError, "cats.toml.*o such file") as caught:
            gneiss_tune.tune("cats.toml")
        self.assertEqual(caught.exception.exit_code, 2)
        self.assertIsInstance(caught.exception, ValueError)
        # Bad usage, which is reported before there is a stream of JSON.
        with self.assertRaisesRegex(InputError, "--nonsense"):
            tune("none", nonsense=True)
        with self.assertRaisesRegex(GneissError, "train.learning_rate"):
            tune("high", set={"train.learning_rate": "1e38"})
        with self.assertRaisesRegex(InputError, "did you mean"):
            tune("typo", set={"train.lerning_rate": 1})

    def test_warnings_are_python_s(self):
        with self.assertWarns(gneiss_tune.GneissWarning), warnings.catch_warnings():
            warnings.simplefilter("always")
            tune("short", set={"train.max_steps": 1})

    def test_ctrl_c_ends_the_run_which_can_go_on(self):
        # A shell starts programs in the background with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt = lambda record: record["step"] == 3 and os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        options = {"train.num_epochs": 40, "train.early_stopping": 0}
        # In on_step the interrupt ends the block: the program is told to end, and saves the run.
        with self.assertRaises(KeyboardInterrupt):
            tune("stopped", set=dict(options), on_step=interrupt)
        self.assertEqual(Run("runs/stopped").summary["status"]["state"], "interrupted")
        # While this process waits for the program, the program gets it.
        timer = None

        def later(record):
            nonlocal timer
            if record["step"] == 1:
                timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()

        with self.assertRaises(KeyboardInterrupt) as caught:
            tune("later", set={**options, "train.num_epochs": 4000}, on_step=later)
        if isinstance(caught.exception, Interrupted):
            self.assertIn("--resume runs/later", str(caught.exception))
            self.assertEqual(caught.exception.run.path, Path("runs/later"))
        steps = Run("runs/later").summary["steps"]
        run = gneiss_tune.tune(resume=Run("runs/later"), set={"train.num_epochs": steps // 3 + 2}, progress=False)
        self.assertEqual(run.summary["status"]["state"], "completed")
        self.assertEqual(run.summary["resumed"], 1)

    def test_metrics_go_to_trackers(self):
        _journal.calls.clear()
        own = []
        tune("tracked", report_to=["wandb", "trackio", "mlflow", lambda *call: own.append(call)], project_name="p",
             set={"train.num_epochs": 1})
        calls = _journal.calls
        names = [name for name, _, _ in calls]
        self.assertEqual(names[:2], ["wandb.init", "trackio.init"])
        config = calls[0][2]
        self.assertEqual((config["project"], config["name"]), ("p", "tracked"))
        if sys.version_info >= (3, 11):
            self.assertEqual(config["config"]["train.batch_size"], 4)
        self.assertEqual(calls[2], ("mlflow.set_experiment", ("p",), {}))
        for name in ("wandb.log", "trackio.log", "mlflow.log_metrics"):
            logged = [positional for called, positional, _ in calls if called == name]
            self.assertEqual(logged, own)
        self.assertEqual([step for _, step in own], [1, 2, 3, 3])
        self.assertEqual(set(own[0][0]), {"train/loss", "train/learning_rate", "train/grad_norm"})
        self.assertIn("validation/loss", own[-1][0])
        self.assertEqual(names[-3:], ["wandb.finish", "trackio.finish", "mlflow.end_run"])
        self.assertEqual(calls[-3][2], {"exit_code": 0})

        _journal.calls.clear()
        with self.assertRaises(GneissError):
            tune("lost", report_to="wandb, mlflow", set={"train.learning_rate": "1e38"})
        self.assertEqual([call[1:] for call in _journal.calls[-2:]], [((), {"exit_code": 1}), (("FAILED",), {})])
        with self.assertRaisesRegex(ValueError, "report_to.*tensorbord"):
            tune("none", report_to="tensorbord")

    def test_a_sweep_yields_its_records(self):
        records = list(gneiss_tune.sweep("sweep.toml", set={"name": "swept", "train.num_epochs": 1}, progress=False))
        self.assertEqual(records[-1]["event"], "finished")
        self.assertEqual(len(records[-1]["trials"]), 2)
        self.assertEqual({record["trial"] for record in records if record["event"] == "ended"}, {1, 2})
        self.assertTrue(Run(records[-1]["best"]).adapter.is_dir())

    def test_a_server_answers_until_the_block_ends(self):
        run = tune("served", set={"train.max_steps": 2})
        with gneiss_tune.serve("model", {"served": run}, device="cpu") as server:
            with urllib.request.urlopen(f"{server.base_url}/models") as answer:
                names = [model["id"] for model in json.load(answer)["data"]]
            self.assertEqual(names, ["model", "served"])
        with self.assertRaises(OSError):
            urllib.request.urlopen(f"{server.base_url}/models")
        with self.assertRaisesRegex(InputError, "none"):
            with gneiss_tune.serve("./none"):
                self.fail("a server without a model")

    @unittest.skipUnless(__import__("importlib.util").util.find_spec("tqdm"), "tqdm is not installed")
    def test_bars_are_tqdm_s(self):
        import tqdm.auto

        bars = []

        class Noted(tqdm.auto.tqdm):
            def close(self):
                if not self.disable:
                    bars.append((self.desc.rstrip(": "), self.n, self.total))
                super().close()

        before, tqdm.auto.tqdm = tqdm.auto.tqdm, Noted
        try:
            run = gneiss_tune.tune("dogs.toml", set={"name": "barred", "train.num_epochs": 1})
            gneiss_tune.evaluate("dogs.toml", run)
        finally:
            tqdm.auto.tqdm = before
        self.assertIn(("tuning", 3, 3), bars)
        self.assertIn(("barred, answers", 6, 6), bars)

    def test_the_module_is_the_program(self):
        for args, code in ((["-V"], 0), (["tune"], 2)):
            own = subprocess.run([sys.executable, "-m", "gneiss_tune", *args], capture_output=True, text=True)
            program = subprocess.run([gneiss_tune.find_program(), *args], capture_output=True, text=True)
            self.assertEqual((own.returncode, own.stdout, own.stderr), (code, program.stdout, program.stderr))


if __name__ == "__main__":
    unittest.main(verbosity=2)
