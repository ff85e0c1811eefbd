"""What predictions say of a model, each figure with its 95 % interval: pure functions and a Markdown table.

An interval is a bootstrap over questions, not over completions: those of one question are no independent evidence.
Suffixes: _Q questions, _F figures, _R resamples.
"""

from collections import defaultdict
from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np

from sail_rl.eval import Prediction

RESAMPLES, BLOCK = 2000, 100  # a block of resamples is in memory at once
# Columns by whose values figures are given, where predictions have them.
GROUPED = ("mode", "kind", "benchmark", "source", "type", "category", "answer_type", "family", "form", "difficulty")
# Figure -> what it is the mean of.
MEANS = {
    "well_formed": "well_formed",
    "thinking_rate": "thought",
    "truncation_rate": "truncated",
    "length": "length",
}
Figures = dict[str, Any]


def pass_at(k: int, right: int, samples: int) -> float:
    """The chance that of `k` completions, drawn without replacement from `samples`, at least one is right: unbiased."""
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def resampled_means(values_QF: np.ndarray, seed: int) -> np.ndarray:
    """[R, F] means over as many questions as there are, drawn with replacement."""
    draws, count = np.random.default_rng(seed), len(values_QF)
    even_Q = np.full(count, 1 / count)
    blocks = [draws.multinomial(count, even_Q, size=BLOCK) @ values_QF / count for _ in range(RESAMPLES // BLOCK)]
    return np.concatenate(blocks)


def by_question(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """The completions of each question, in the order of the questions."""
    found: dict[int, list[Prediction]] = defaultdict(list)
    for one in predictions:
        found[one["position"]].append(one)
    return [found[position] for position in sorted(found)]


def share_right(completions: Sequence[Prediction]) -> float:
    """Of the completions of one question."""
    return sum(one["correct"] for one in completions) / len(completions)


def tried(samples: int) -> list[int]:
    """The k of pass@k: 1, 2, 4, ... and all samples."""
    return sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})


def figures_of(predictions: Sequence[Prediction], seed: int) -> Figures:
    """Of a set of questions, which have equally many completions each."""
    questions = by_question(predictions)
    samples = len(questions[0])
    rights = [sum(one["correct"] for one in completions) for completions in questions]
    columns = {f"pass@{k}": [pass_at(k, right, samples) for right in rights] for k in tried(samples)}
    if samples > 1:
        columns[f"avg@{samples}"] = [right / samples for right in rights]
    for name, key in MEANS.items():
        if all(one.get(key) is not None for one in predictions):  # those of another tool lack some
            columns[name] = [sum(one[key] for one in completions) / samples for completions in questions]
    means_RF = resampled_means(np.array(list(columns.values())).T, seed)
    low_F, high_F = np.quantile(means_RF, [0.025, 0.975], axis=0)
    estimates = {
        name: {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}
        for (name, values), low, high in zip(columns.items(), low_F, high_F, strict=True)
    }
    return {"questions": len(questions), "samples": samples} | estimates


def groups_of(predictions: Sequence[Prediction]) -> dict[str, dict[str, list[Prediction]]]:
    """column -> value -> its predictions, for all columns of `GROUPED` that the data has."""
    found: dict[str, dict[str, list[Prediction]]] = {}
    for column in GROUPED:
        values: dict[str, list[Prediction]] = defaultdict(list)
        for one in predictions:
            if one.get(column) is not None:
                values[str(one[column])].append(one)
        if values:
            found[column] = dict(sorted(values.items()))
    return found


def all_figures(predictions: Sequence[Prediction], seed: int) -> Figures:
    """Of all questions, and by the columns that tell them apart."""
    groups = {
        column: {value: figures_of(members, seed) for value, members in values.items()}
        for column, values in groups_of(predictions).items()
    }
    return {"all": figures_of(predictions, seed), "groups": groups}


def markdown_table(figures: Figures) -> str:
    """All questions in the first line, then the groups; a column with one value only would repeat the first line."""
    names = [name for name in figures["all"] if name not in ("questions", "samples")]
    names = [name for name in names if not name.startswith("avg@")]  # the same number as pass@1
    lines = ["| | questions | " + " | ".join(map(heading, names)) + " |", "|---|" + "---:|" * (len(names) + 1)]
    rows = [("all", figures["all"])]
    for column, values in figures["groups"].items():
        rows += [(f"{column}: {value}", found) for value, found in values.items()] if len(values) > 1 else []
    for label, found in rows:
        cells = " | ".join(cell(found[name], name) for name in names)
        lines.append(f"| {escaped(label)} | {found['questions']} | {cells} |")
    return "\n".join(lines) + "\n"


def heading(name: str) -> str:
    """A figure's name for people."""
    return name.replace("_", " ")


def escaped(text: str) -> str:
    """Text of the data in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def cell(estimate: dict[str, float], name: str = "") -> str:
    """A mean and its interval."""
    digits = 1 if name == "length" else 3
    return f"{estimate['mean']:.{digits}f} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"
