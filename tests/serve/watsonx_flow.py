"""IBM's tutorial "Prompt tune a Granite model in Python using watsonx" from the credentials to both scores, with IBM's own SDK
against `gneiss watsonx`. The calls are the notebook's, in its order; then come calls that people make next, then refusals.

    watsonx_flow.py --url https://127.0.0.1:8443 --base MODEL_ID --train train.json --test test.json
                    [--kind cpd|password|token|cloud] [--key K] [--verify cert.pem] [--set num_epochs=5]...
                    [--used learning_rate=0.02]... [--only tutorial|around|refusals]... [--least-accuracy 0.9] [--answers FILE]
                    [--also KEY=VALUE]...

SDK 1.1.26 needs `--also instance_id=openshift --also version=5.0 --verify cert.pem --no-warnings --only tutorial`.

Rows are JSON, JSON Lines or CSV with `input` and `output`. `--set` changes a parameter that the client asks for, `--used` says
what the server's profile makes of one. Prints a JSON summary; exit code 1, with what differed, if something did. Needs
ibm-watsonx-ai, pandas, matplotlib, ipython and tqdm: the SDK imports the last two and does not require them.
"""

import argparse
import builtins
import csv
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stdout
from datetime import datetime
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

INIT_TEXT = "Extract the satisfaction from the comment. Return simple '1' for satisfied customer or '0' for unsatisfied. Comment:"
TUNING = {
    "accumulate_steps": 16, "batch_size": 8, "learning_rate": 0.001, "max_input_tokens": 128, "max_output_tokens": 2,
    "num_epochs": 12, "init_method": "text", "init_text": INIT_TEXT, "verbalizer": "classify {0, 1} {{input}}",
}
NAME = "prompt tuning tutorial"
NO_ID = "00000000-0000-4000-8000-000000000000"


class ZMQInteractiveShell:
    """plot_learning_curve() draws in a notebook only, which it recognises by the name of this class."""


def expect(name, found, expected):
    if found != expected:
        raise AssertionError(f"{name}: expected {expected!r}, found {found!r}")


def expect_that(holds, text):
    if not holds:
        raise AssertionError(text)


def rows(path):
    text = Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".csv"):
        return [{"input": row["input"], "output": row["output"].strip()} for row in csv.DictReader(io.StringIO(text))]
    if str(path).endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def credentials(args):
    """A dictionary, as in the notebook's cell."""
    made = {"url": args.url} | dict(pair.split("=", 1) for pair in args.also)
    if args.verify is not None:
        made["verify"] = args.verify
    if args.kind == "cpd":
        return made | {"username": "me", "apikey": args.key}
    if args.kind == "password":
        return made | {"username": "me", "password": args.key}
    if args.kind == "token":
        return made | {"token": args.key}
    return made | {"apikey": args.key, "platform_url": args.url, "auth_url": args.url + "/identity/token"}


def number(answer):
    """The notebook's int(float(answer)), which ends the notebook if the answer is not a number."""
    try:
        return int(float(answer))
    except ValueError:
        return -1


def scores(truth, found):
    """Accuracy and macro-averaged F1, as scikit-learn computes them."""
    def f1(label):
        both = sum(a == b == label for a, b in zip(truth, found))
        return 2 * both / (truth.count(label) + found.count(label))
    labels = sorted(set(truth) | set(found))
    return sum(a == b for a, b in zip(truth, found)) / len(truth), sum(map(f1, labels)) / len(labels)


class Flow:
    """The steps in order; what a step makes is there for the next."""

    def __init__(self, args):
        self.args, self.folder = args, Path(tempfile.mkdtemp(prefix="watsonx-flow-"))
        self.train, self.test = rows(args.train), rows(args.test)
        self.file = self.folder / "dog_grooming_reviews_train_data.json"
        self.file.write_text(json.dumps(self.train))
        self.tuning = TUNING | args.set
        self.used = self.tuning | args.used

    # ------------------------------------------------------------ the tutorial

    def connect(self):
        from ibm_watsonx_ai import APIClient
        self.client = APIClient(credentials(self.args))
        expect("set.default_project", self.client.set.default_project(self.args.project), "SUCCESS")
        return self.client.CPD_version.cpd_version or "cloud"

    def upload(self):
        asset = self.client.data_assets.create(name=self.file.name, file_path=str(self.file))
        self.asset_id = self.client.data_assets.get_id(asset)
        expect_that(isinstance(self.asset_id, str) and self.asset_id, f"expected an id, found {self.asset_id!r}")
        expect("name of the data asset", asset["metadata"]["name"], self.file.name)
        return self.asset_id

    def configure(self):
        from ibm_watsonx_ai.experiment import TuneExperiment
        from ibm_watsonx_ai.helpers import DataConnection
        self.experiment = TuneExperiment(credentials(self.args), project_id=self.args.project)
        self.tuner = self.experiment.prompt_tuner(
            name=NAME, task_id=self.experiment.Tasks.CLASSIFICATION, base_model=self.args.base,
            tuning_type=self.experiment.PromptTuningTypes.PT, auto_update_model=True, **self.tuning)
        self.data = DataConnection(data_asset_id=self.asset_id)
        models = self.client.foundation_models.PromptTunableModels
        printed = io.StringIO()
        with redirect_stdout(printed):
            models.show()
        expect_that(self.args.base in {model.value for model in models} and self.args.base in printed.getvalue(),
                    f"expected {self.args.base} among the tunable models, found {printed.getvalue()}")
        return self.experiment.Tasks.CLASSIFICATION.value

    def run(self):
        printed = io.StringIO()
        with redirect_stdout(printed), warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            self.tuner.run(training_data_references=[self.data], background_mode=False)
        expect_that("finished successfully" in printed.getvalue(), f"expected a successful run, found {printed.getvalue()!r}")
        if self.args.no_warnings:
            return "an SDK that shows no warnings of the service"
        texts = {str(warning.message) for warning in shown}
        for key in self.args.used:
            expect_that(any(f"`{key}`" in text for text in texts), f"expected a warning about {key}, found {texts}")
        if self.args.stand_in:
            expect_that(any("stands in" in text for text in texts), f"expected a warning about the local model, found {texts}")
        return printed.getvalue().split("\n\n\n")[-1].strip().splitlines()[:-1]

    def status(self):
        expect("get_run_status", self.tuner.get_run_status(), "completed")
        parameters = self.tuner.get_run_details()["entity"]["prompt_tuning"]
        for key, value in self.used.items():
            expect(f"prompt_tuning.{key} of the details", parameters.get(key), value)
        metrics = self.tuner.get_run_details(include_metrics=True)["entity"]["status"]["metrics"]
        expect_that(len(metrics) >= 2 * self.used["num_epochs"], f"expected two metrics an epoch at least, found {len(metrics)}")
        return len(metrics)

    def summary(self):
        table = self.tuner.summary()
        expect("columns", list(table.columns), ["Enhancements", "Base model", "Auto store", "Epochs", "loss"])
        expect("name", list(table.index), ["model_" + self.tuner.id])
        line = table.iloc[0]
        expect("base model", line["Base model"], self.args.base)
        expect("stored", bool(line["Auto store"]), True)
        expect("epochs", int(line["Epochs"]), self.used["num_epochs"])
        expect_that(0 <= line["loss"] < 100, f"expected a loss, found {line['loss']}")
        return float(line["loss"])

    def learning_curve(self):
        import matplotlib.pyplot as plot
        if not hasattr(builtins, "get_ipython"):
            builtins.get_ipython = ZMQInteractiveShell
        with redirect_stdout(io.StringIO()):
            self.tuner.plot_learning_curve()
        figure = plot.gcf()
        curves = {axes.get_title(): list(axes.get_lines()[0].get_ydata()) for axes in figure.axes if axes.get_lines()}
        plot.close(figure)
        expect("plots", list(curves), ["Loss function", "Scalability of the model", "Performance of the model"])
        loss, times = curves["Loss function"], curves["Scalability of the model"]
        expect("epochs of the curve", (len(loss), len(times)), (self.used["num_epochs"],) * 2)
        expect_that(loss[-1] < loss[0], f"expected a falling loss, found {loss}")
        expect_that(all(seconds >= 0 for seconds in times), f"expected times from 0 on, found {times}")
        return [round(value, 4) for value in loss]

    def deploy(self):
        self.model_id = self.tuner.get_model_id()
        names = self.client.deployments.ConfigurationMetaNames
        self.serving_name = datetime.now().strftime("%Y_%m_%d_%H%M%S%f")
        with redirect_stdout(io.StringIO()):
            deployed = self.client.deployments.create(
                self.model_id, {names.NAME: "PROMPT TUNE DEPLOYMENT", names.ONLINE: {}, names.SERVING_NAME: self.serving_name})
        self.deployment_id = deployed["metadata"]["id"]
        expect("state of the deployment", deployed["entity"]["status"]["state"], "ready")
        return self.deployment_id

    def ask(self):
        from ibm_watsonx_ai.foundation_models import ModelInference
        prompts, truth = [row["input"] for row in self.test], [int(row["output"]) for row in self.test]
        tuned = ModelInference(deployment_id=self.deployment_id, api_client=self.client)
        base = ModelInference(model_id=self.args.base, api_client=self.client)
        found, kept = {}, {}
        for name, model in (("tuned", tuned), ("base", base)):
            kept[name] = answers = model.generate_text(prompt=prompts, concurrency_limit=2)
            expect(f"{name}: answers", len(answers), len(prompts))
            numbers = [number(answer) for answer in answers]
            accuracy, f1 = scores(truth, numbers)
            found[name] = {"accuracy": accuracy, "f1": f1, "answers that are not numbers": numbers.count(-1)}
        if self.args.answers:
            Path(self.args.answers).write_text(json.dumps({"answers": kept, "scores": found, "training": self.tuner.id}))
        expect_that(found["tuned"]["accuracy"] >= self.args.least_accuracy,
                    f"expected an accuracy of {self.args.least_accuracy} at least, found {found['tuned']}: {kept['tuned'][:5]}")
        return found

    TUTORIAL = (connect, upload, configure, run, status, summary, learning_curve, deploy, ask)

    # ------------------------------------------------------------ around it

    def history(self):
        runs = self.experiment.runs
        table = runs.list()
        expect_that(self.tuner.id in set(table["run_id"]), f"expected the run among {list(table['run_id'])}")
        expect("by name", set(self.experiment.runs(filter=NAME).list()["tuning name"]), {NAME})
        again = runs.get_tuner(self.tuner.id)
        expect("the run again", again.get_run_status(), "completed")
        expect("its model", again.get_model_id(), self.model_id)
        expect("its data", self.tuner.get_data_connections()[0].location.id, self.asset_id)
        listed = {one["metadata"]["id"] for one in self.client.training.get_details()["resources"]}
        expect_that(self.tuner.id in listed, f"expected the run among {listed}")
        expect_that(self.tuner.id in set(self.client.training.list()["ID (training)"]), "expected the run in training.list()")
        expect_that(self.client.training.get_metrics(self.tuner.id), "expected metrics")
        return len(table)

    def assets(self):
        details = self.client.data_assets.get_details(self.asset_id)
        expect("name", details["metadata"]["name"], self.file.name)
        expect("content", json.loads(self.client.data_assets.get_content(self.asset_id)), self.train)
        expect_that(self.asset_id in set(self.client.data_assets.list()["ASSET_ID"]), "expected the data asset in the list")
        extra = self.folder / "extra.jsonl"
        extra.write_text("".join(json.dumps(row) + "\n" for row in self.train[:8]))
        with redirect_stdout(io.StringIO()):
            second = self.client.data_assets.get_id(self.client.data_assets.create(name="extra", file_path=extra))
        self.client.data_assets.delete(second)
        return details["metadata"]["size"]

    def repository(self):
        details = self.client.repository.get_details(self.model_id)
        expect("id", details["metadata"]["id"], self.model_id)
        expect_that("prompt_tune" in details["entity"]["type"], f"expected a tuned prompt, found {details['entity']['type']}")
        expect_that(self.model_id in set(self.client.repository.list_models()["ID"]), "expected the model in the list")
        return details["entity"]["type"]

    def deployments(self):
        api = self.client.deployments
        by_name = api.get_details(serving_name=self.serving_name)["resources"]
        expect("by serving name", [one["metadata"]["id"] for one in by_name], [self.deployment_id])
        expect("taken", api.is_serving_name_available(self.serving_name), False)
        expect("free", api.is_serving_name_available("nobody_has_this"), True)
        text = api.generate_text(self.deployment_id, prompt=self.test[0]["input"], params={"max_new_tokens": 2})
        pieces = list(api.generate_text_stream(self.deployment_id, prompt=self.test[0]["input"], params={"max_new_tokens": 2}))
        expect("streamed", "".join(pieces), text)
        table = api.list()
        expect("kind of asset", table[table["ID"] == self.deployment_id]["ARTIFACT_TYPE"].iloc[0], "prompt_tune")
        with redirect_stdout(io.StringIO()):
            changed = api.update(self.deployment_id, {api.ConfigurationMetaNames.NAME: "renamed"})
        expect("name after an update", changed["entity"]["name"], "renamed")
        return text

    def store_by_hand(self):
        """A run whose model the client stores by itself. The SDK's clients of IBM Cloud look for it in an object store."""
        if self.args.kind == "cloud":
            return "not for clients of IBM Cloud"
        tuner = self.experiment.prompt_tuner(
            name="by hand", task_id="classification", base_model=self.args.base, auto_update_model=False,
            **(self.tuning | {"num_epochs": 1}))
        tuner.run(training_data_references=[self.data], background_mode=True)
        self.monitor(tuner)
        with redirect_stdout(io.StringIO()):
            stored = self.client.repository.store_model(training_id=tuner.id, meta_props={"name": "by hand"})
            model_id = stored["metadata"]["id"]
            expect("deleted", self.client.repository.delete(model_id), "SUCCESS")
        return model_id

    def monitor(self, tuner):
        """The steps of a run under way, printed as they come over a WebSocket that ends with the run."""
        printed = io.StringIO()
        with redirect_stdout(printed):
            self.client.training.monitor_metrics(tuner.id)
        steps = printed.getvalue().count("'ml_metrics'")
        expect_that(steps >= 2, f"expected the metrics of two steps at least, found {printed.getvalue()!r}")
        metrics = tuner.get_run_details(include_metrics=True)["entity"]["status"]["metrics"]
        expect("metrics over a WebSocket", steps, len({entry["iteration"] for entry in metrics}))
        expect("state after it", tuner.get_run_status(), "completed")

    def background(self):
        """A second run, ended and deleted while it is under way."""
        tuner = self.experiment.prompt_tuner(
            name="another", task_id="classification", base_model=self.args.base, auto_update_model=False,
            **(self.tuning | {"num_epochs": 50}))
        details = tuner.run(training_data_references=[self.data], background_mode=True)
        state = details["entity"]["status"]["state"]
        expect_that(state in ("pending", "queued", "running"), f"expected a run under way, found {state}")
        tuner.cancel_run()
        until = time.time() + 60
        while (state := tuner.get_run_status()) != "canceled" and time.time() < until:
            time.sleep(1)
        expect("state of a canceled run", state, "canceled")
        with redirect_stdout(io.StringIO()):
            tuner.cancel_run()  # prints that the run has ended
        tuner.cancel_run(hard_delete=True)
        return state

    def undeploy(self):
        expect("deleted", self.client.deployments.delete(self.deployment_id), "SUCCESS")
        left = {one["metadata"]["id"] for one in self.client.deployments.get_details()["resources"]}
        expect_that(self.deployment_id not in left, "expected the deployment to be gone")
        expect("deleted model", self.client.repository.delete(self.model_id), "SUCCESS")
        self.client.training.delete(self.tuner.id)
        left = {one["metadata"]["id"] for one in self.client.training.get_details()["resources"]}
        expect_that(self.tuner.id not in left, "expected the run to be gone")
        return "SUCCESS"

    AROUND = (history, assets, repository, deployments, store_by_hand, background)

    # ------------------------------------------------------------ refusals

    def refusals(self):
        from ibm_watsonx_ai.helpers import DataConnection
        from ibm_watsonx_ai.wml_client_error import WMLClientError

        def refused(name, word, call):
            try:
                with redirect_stdout(io.StringIO()):
                    answer = call()
            except WMLClientError as error:
                expect_that(word in str(error), f"{name}: expected {word!r} in the message, found {error}")
            else:
                raise AssertionError(f"{name}: expected a refusal, found {answer!r}")

        tune = self.experiment.prompt_tuner
        refused("a model", "nobody/has-this", lambda: tune(name="x", task_id="classification", base_model="nobody/has-this"))
        refused("a run", NO_ID, lambda: self.client.training.get_details(NO_ID))
        refused("a model to deploy", NO_ID, lambda: self.client.deployments.create(NO_ID, {"name": "x", "online": {}}))
        base = {"task_id": "classification", "base_model": self.args.base}
        odd = tune(name="x", **base, **(self.tuning | {"verbalizer": "no place for the text"}))
        refused("a verbalizer", "{{input}}", lambda: odd.run(training_data_references=[self.data], background_mode=True))
        # Data that can't be used ends the run, and not the server.
        printed, broken = io.StringIO(), self.folder / "broken.json"
        broken.write_text('[{"question": "?", "answer": "!"}]')
        tuner = tune(name="broken", **base, **self.tuning)
        with redirect_stdout(printed):
            asset = self.client.data_assets.get_id(self.client.data_assets.create(name="broken.json", file_path=str(broken)))
            tuner.run(training_data_references=[DataConnection(data_asset_id=asset)], background_mode=False)
        expect("state of a run on broken data", tuner.get_run_status(), "failed")
        text = printed.getvalue()
        expect_that("failed with status" in text and "input" in text, f"expected the reason, found {text!r}")
        expect_that("broken.json" in text and "/trainings/" not in text, f"expected the asset's name and no path, found {text!r}")
        return "refused"


def do(flow, steps, summary, problems):
    """Runs steps of which each needs the one before; whether all succeeded."""
    for step in steps:
        began = time.time()
        try:
            summary[step.__name__] = step(flow)
        except Exception as problem:
            where = "" if isinstance(problem, AssertionError) else traceback.format_exc(limit=-4)
            problems.append((step.__name__, f"{type(problem).__name__}: {problem}", where))
            return False
        finally:
            summary.setdefault("seconds", {})[step.__name__] = round(time.time() - began, 1)
    return True


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", required=True)
    add("--base", required=True, help="id of the base model, as the server's foundation_model_specs has it")
    add("--stand-in", action="store_true", help="the base model's id is that of another model")
    add("--train", required=True)
    add("--test", required=True)
    add("--kind", choices=["cpd", "password", "token", "cloud"], default="cpd", help="kind of credentials")
    add("--key", default="any.key", help="key, password or token; the SDK sends a token without a dot as `Basic`")
    add("--verify", help="certificate to trust; without it the SDK trusts any")
    add("--project", default="gneiss")
    add("--only", choices=["tutorial", "around", "refusals"], action="append")
    add("--least-accuracy", type=float, default=0.9)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a parameter of the tuning")
    add("--used", action="append", default=[], metavar="KEY=VALUE", help="what the server's profile makes of a parameter")
    add("--no-warnings", action="store_true", help="an SDK that shows no warnings of the service, such as 1.1.26")
    add("--also", action="append", default=[], metavar="KEY=VALUE", help="a further credential, such as instance_id=openshift")
    add("--answers", help="file for the answers and scores")
    args = parser.parse_args()
    for name in ("set", "used"):
        pairs = (pair.split("=", 1) for pair in getattr(args, name))
        setattr(args, name, {key: json.loads(value) if value[:1] in "0123456789.-" else value for key, value in pairs})
    args.only = args.only or ["tutorial", "around", "refusals"]
    return args


def main():
    warnings.simplefilter("ignore")
    logging.getLogger("ibm_watsonx_ai").setLevel(logging.CRITICAL)
    args = arguments()
    flow, summary, problems = Flow(args), {}, []
    if do(flow, Flow.TUTORIAL, summary, problems):
        if "refusals" in args.only:
            do(flow, (Flow.refusals,), summary, problems)
        if "around" in args.only:
            for step in Flow.AROUND:
                do(flow, (step,), summary, problems)
            do(flow, (Flow.undeploy,), summary, problems)
    print(json.dumps(summary | {"failed": len(problems)}, indent=1))
    for name, problem, where in problems:
        print(f"watsonx_flow: {name}: {problem}\n{where}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
