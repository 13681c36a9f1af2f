"""Writes metrics.json: what scikit-learn, SciPy, statsmodels, rouge-score and torchmetrics say of small sets of answers.

    python tests/golden/metrics.py

README.md names the versions. Nothing here draws a random number but SciPy's bootstrap, whose seed is fixed.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from statsmodels.stats.contingency_tables import mcnemar
from torchmetrics.functional.text import squad

HERE = Path(__file__).resolve().parent
# A prediction that is none of the labels, as scikit-learn sees it.
NO_LABEL = "\0"
RESAMPLES = 200_000

# Expected and predicted labels, each row an entry; a row's own text where it is no label.
CLASSIFICATION = [
    ("binary", ["0", "1"], "1 1 1 0 0 0 0 1 1 0".split(), "1 0 1 0 1 0 0 1 1 1".split()),
    (
        "three classes", ["bad", "fair", "good"],
        "good good good fair fair fair fair bad bad bad bad bad good".split(),
        "good fair good fair bad fair good bad bad bad fair bad bad".split(),
    ),
    ("a class that is never predicted", ["0", "1"], "1 0 1 0 0".split(), "1 1 1 1 1".split()),
    ("a class that is never expected", ["a", "b", "c"], "a b a b a b".split(), "a c b b c a".split()),
    ("a class that is neither", ["a", "b", "c"], "a b a b".split(), "a b b b".split()),
    ("answers that are no label", ["0", "1"], "1 1 1 0 0 0".split(), ["1", "0", "1.", "0", "1", ""]),
    ("no answer is a label", ["0", "1"], "1 0 0".split(), "x y z".split()),
    ("all right", ["0", "1"], "1 0 0 1 1 1 0".split(), "1 0 0 1 1 1 0".split()),
    ("one row, right", ["1"], ["1"], ["1"]),
    ("one row, wrong", ["0", "1"], ["1"], ["0"]),
]

SHARES = [(0, 1), (1, 1), (0, 116), (58, 116), (112, 116), (116, 116), (3, 7), (499_999, 1_000_000)]

LONG = "the groomer was kind and the dog came home clean and happy"
# Expected and generated text.
TEXTS = [
    ("The dog was happy.", "the dog was happy"),
    ("The dog was happy.", "The dog was happy."),
    ("satisfied", ""),
    ("a", "the"),
    ("a", "dog"),
    ("...!?", "--"),
    ("...!?", "word"),
    ("the the dog dog dog", "dog the dog"),
    ("red green blue", "blue green red"),
    ("Größe: 42 cm, très élégant", "größe 42 CM tres élégant"),
    ("狗 很 高兴", "狗 很 高兴"),
    ("don't re-groom; it's O.K.", "dont regroom its ok"),
    ("an apple—a day", "apple — day\u00a0\u2003now"),
    ("snake_case a_b the_end", "snakecase ab theend"),
    ("İstanbul ΟΔΟΣ ǅ", "i̇stanbul οδος ǆ"),
    ("line one\nline\ttwo\x1fthree", "line one line two three"),
    (LONG, "happy and clean came the dog home and the groomer was very kind to the dog"),
    (LONG, " ".join([LONG] * 4)),
    ("1 2 3 4 5 6 7 8 9 10", "10 1 9 2 8 3 7 4 6 5"),
]

# Rows that only the tuned prompt and that only the base got right.
DISCORDANT = [
    (0, 0), (1, 0), (0, 1), (5, 5), (56, 2), (2, 56), (7, 3), (112, 0), (30, 31), (1000, 900), (5000, 5000),
    (100_000, 99_000), (60_000, 10_000),
]

# Rows that both got right, only the tuned prompt, only the base, neither.
PAIRED = [(56, 56, 2, 2), (0, 112, 0, 4), (30, 5, 5, 10), (3, 4, 1, 2), (400, 150, 80, 370), (1, 0, 0, 0)]

# Scores of the base and of the tuned prompt.
SCORES = [
    (
        [0.1, 0.5, 0.25, 0.0, 0.75, 0.3, 0.6, 0.2, 0.4, 0.9, 0.15, 0.35],
        [0.4, 0.5, 0.75, 0.1, 0.7, 0.9, 0.65, 0.8, 0.4, 1.0, 0.0, 0.45],
    ),
]


def classification(name, labels, expected, predicted):
    mapped = [p if p in labels else NO_LABEL for p in predicted]
    options = dict(labels=labels, zero_division=0)
    precision, recall, f1, support = precision_recall_fscore_support(expected, mapped, average=None, **options)
    macro = precision_recall_fscore_support(expected, mapped, average="macro", **options)[:3]
    right = sum(e == p for e, p in zip(expected, mapped))
    return {
        "name": name, "labels": labels, "expected": expected, "predicted": predicted,
        "accuracy": accuracy_score(expected, mapped), "interval": wilson(right, len(expected)),
        "macro": list(map(float, macro)),
        "precision": precision.tolist(), "recall": recall.tolist(), "f1": f1.tolist(), "support": support.tolist(),
        # The row of expected answers that are no label has no entry.
        "confusion": confusion_matrix(expected, mapped, labels=[*labels, NO_LABEL])[:-1].tolist(),
    }


def wilson(part, of):
    interval = stats.binomtest(part, of).proportion_ci(0.95, method="wilson")
    return [float(interval.low), float(interval.high)]


def text(expected, generated):
    answer = {"prediction_text": generated, "id": "0"}
    truth = {"answers": {"answer_start": [0], "text": [expected]}, "id": "0"}
    rouge = RougeScorer(["rougeL"], use_stemmer=False).score(target=expected, prediction=generated)["rougeL"]
    return {
        "expected": expected, "generated": generated,
        "token_f1": f1(answer, truth), "rouge_l": float(rouge.fmeasure),
    }


def f1(answer, truth):
    return float(squad([answer], [truth])["f1"]) / 100


def p_value(fixed, broken):
    """SciPy's, after statsmodels has said the same."""
    if fixed + broken == 0:
        return 1.0
    theirs = mcnemar([[0, fixed], [broken, 0]], exact=True).pvalue
    p = stats.binomtest(fixed, fixed + broken).pvalue
    assert abs(p - theirs) <= 1e-9 * p, (fixed, broken, p, theirs)
    return float(p)


def bootstrap(differences):
    """The percentile interval of the mean of paired differences, and the mean's standard error."""
    differences = np.asarray(differences, dtype=float)
    if len(differences) == 1:
        return [float(differences[0])] * 2, 0.0
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile",
        rng=np.random.default_rng(1),
    )
    interval = found.confidence_interval
    return [float(interval.low), float(interval.high)], float(found.standard_error)


def paired(both, fixed, broken, neither):
    interval, error = bootstrap([0] * both + [1] * fixed + [-1] * broken + [0] * neither)
    return {
        "both": both, "fixed": fixed, "broken": broken, "neither": neither,
        "interval": interval, "standard_error": error,
    }


def scores(base, tuned):
    differences = [t - b for b, t in zip(base, tuned)]
    interval, error = bootstrap(differences)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "base": base, "tuned": tuned, "better": better, "worse": worse, "p_value": p_value(better, worse),
        "difference": float(np.mean(differences)), "interval": interval, "standard_error": error,
    }


def main():
    packages = ["numpy", "rouge-score", "scikit-learn", "scipy", "statsmodels", "torchmetrics"]
    golden = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "classification": [classification(*case) for case in CLASSIFICATION],
        "wilson": [{"part": k, "of": n, "interval": wilson(k, n)} for k, n in SHARES],
        "texts": [text(*case) for case in TEXTS],
        "mcnemar": [{"fixed": f, "broken": b, "p_value": p_value(f, b)} for f, b in DISCORDANT],
        "bootstrap": {
            "resamples": RESAMPLES,
            "answers": [paired(*case) for case in PAIRED],
            "scores": [scores(*case) for case in SCORES],
        },
    }
    lines = []
    for key, value in golden.items():
        if isinstance(value, list):
            entries = ",\n".join("  " + json.dumps(entry, ensure_ascii=True) for entry in value)
            lines.append(f' "{key}": [\n{entries}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value, ensure_ascii=True)}')
    (HERE / "metrics.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
