"""Two models on the same prompts: means per task, win rates, paired bootstrap intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign import records as store
from diffalign.errors import UserError
from diffalign.results import Measured

RESAMPLES = 10_000
Outcomes = Mapping[str, Mapping[str, Sequence[float]]]
"""task -> prompt -> one number per sample; NaN where the scorer failed."""


def outcomes(path: Path, label: str) -> dict[str, dict[str, list[float]]]:
    """Read the judge's label of every sample, grouped by task and prompt, in file order."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in store.read(path):
        task = str(record.meta.get("tag", "all"))
        for candidate in record.candidates:
            value = candidate.labels.get(label, math.nan if label in candidate.errors else None)
            if value is None:
                raise UserError(f"{path}: record {record.id!r} has a candidate without the label {label!r}")
            if isinstance(value, list):
                raise UserError(
                    f"{path}: record {record.id!r}: {label!r} has a value per unit, expected one per sample"
                )
            found[task][str(record.prompt)].append(value)
    return {task: dict(prompts) for task, prompts in found.items()}


def common(*models: Outcomes) -> tuple[list[Outcomes], int]:
    """Outcomes without the samples that a scorer failed on, of every model alike, so that pairs stay pairs.

    Returns:
        The outcomes, and how many samples of each model were left out.

    Raises:
        UserError: the models were not judged on the same prompts, or nothing is left.
    """
    if any(_counts(model) != _counts(models[0]) for model in models):
        raise UserError("the two models were not judged on the same prompts and samples; evaluate them together")
    kept: list[dict[str, dict[str, list[float]]]] = [{} for _ in models]
    failed = 0
    for task, prompts in models[0].items():
        for prompt in prompts:
            rows = list(zip(*(model[task][prompt] for model in models), strict=True))
            sound = [row for row in rows if all(map(math.isfinite, row))]
            failed += len(rows) - len(sound)
            for own, values in zip(kept, zip(*sound, strict=True), strict=False):
                own.setdefault(task, {})[prompt] = list(values)
    if not kept[0]:
        raise UserError("the scorer failed on every sample")
    return list(kept), failed


def wins(policy: Outcomes, against: Outcomes) -> Outcomes:
    """1 where a sample beats that of the other model from the same noise, half for a tie: their mean is a win rate."""
    return {
        task: {
            prompt: [(a > b) + 0.5 * (a == b) for a, b in zip(values, against[task][prompt], strict=True)]
            for prompt, values in prompts.items()
        }
        for task, prompts in policy.items()
    }


def _task_draws(prompts: Mapping[str, Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES,) means of a task over prompts drawn with replacement; a prompt brings all of its samples."""
    drawn = [prompts[prompt] for prompt in sorted(prompts)]  # pairing must not hang on the order of a file
    sums, counts = np.array([np.sum(values) for values in drawn]), np.array([len(values) for values in drawn])
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    return sums[drawn].sum(1) / counts[drawn].sum(1)


def bootstrap(found: Outcomes, seed: int = 0) -> dict[str, np.ndarray]:
    """Bootstrap distribution of every task's mean and of ``overall``, the unweighted mean over tasks (GenEval).

    Prompts are the unit: they are resampled within their task, with all their samples. The draws depend on ``seed``
    and the task's name alone, so two models judged on the same prompts get paired draws.
    """
    draws = {}
    for index, (task, prompts) in enumerate(sorted(found.items())):
        draws[task] = _task_draws(prompts, np.random.default_rng([seed, index]))
    return {**draws, "overall": np.mean(list(draws.values()), axis=0)}


def _means(found: Outcomes) -> dict[str, float]:
    tasks = {task: float(np.mean(np.concatenate(list(prompts.values())))) for task, prompts in found.items()}
    return {**tasks, "overall": float(np.mean(list(tasks.values())))}


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def compare(policy: Outcomes, against: Outcomes | None = None) -> dict[str, Measured]:
    """Means with 95 % bootstrap intervals per task and ``overall``; with a baseline also the paired difference.

    Raises:
        UserError: the two were not judged on the same prompts.
    """
    if against is not None and _counts(policy) != _counts(against):
        raise UserError("the two models were not judged on the same prompts and samples; evaluate them together")
    means, draws = _means(policy), bootstrap(policy)
    base_means, base_draws = (_means(against), bootstrap(against)) if against is not None else ({}, {})
    rows = {}
    for name, mean in means.items():
        row: dict[str, Any] = {"policy": mean, "interval": _interval(draws[name])}
        if name in policy:
            row["n"] = sum(len(values) for values in policy[name].values())
        if against is not None:
            row["against"] = base_means[name]
            row["against_interval"] = _interval(base_draws[name])
            row["difference"] = mean - base_means[name]
            row["difference_interval"] = _interval(draws[name] - base_draws[name])
        rows[name] = Measured.model_validate(row)
    return rows


def _counts(found: Outcomes) -> dict[str, dict[str, int]]:
    return {task: {prompt: len(values) for prompt, values in prompts.items()} for task, prompts in found.items()}
