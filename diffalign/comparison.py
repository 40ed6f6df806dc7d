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
AT_ONCE = 1_000  # resamples, to bound the memory of many prompts
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


def is_judged(model: Outcomes) -> bool:
    """Whether the scorer did not fail on every sample."""
    return any(math.isfinite(value) for prompts in model.values() for row in prompts.values() for value in row)


def common(*models: Outcomes) -> tuple[list[Outcomes], int]:
    """Outcomes without the samples that a scorer failed on, of every model alike, so that pairs stay pairs.

    Returns:
        The outcomes, and how many samples of each model were left out.

    Raises:
        UserError: the models were not judged on the same prompts, or nothing is left.
    """
    _refuse_unpaired(*models)
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


def _task_draws(task: Sequence[Mapping[str, Sequence[float]]], rng: np.random.Generator) -> np.ndarray:
    """(models, RESAMPLES) means over prompts drawn with replacement; a prompt brings all of its samples."""
    prompts = sorted(task[0])  # pairing must not hang on the order of a file
    counts = np.array([len(task[0][prompt]) for prompt in prompts])
    sums = np.array([[math.fsum(model[prompt]) for prompt in prompts] for model in task])
    parts = []
    for start in range(0, RESAMPLES, AT_ONCE):
        drawn = rng.integers(len(prompts), size=(min(AT_ONCE, RESAMPLES - start), len(prompts)))
        cells = drawn + len(prompts) * np.arange(len(drawn))[:, None]
        times = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape).astype(float)
        parts.append(sums @ times.T / (times @ counts))
    return np.concatenate(parts, axis=1)


def bootstrap(*models: Outcomes, seed: int = 0) -> dict[str, np.ndarray]:
    """Bootstrap distribution of every task's mean and of ``overall``, the unweighted mean over tasks (GenEval).

    Prompts are the unit: they are resampled within their task, with all their samples, the same ones for every model.
    The draws depend on ``seed``, the tasks' names and the number of prompts alone, so that those of two calls are
    paired where the prompts are the same.

    Returns:
        task -> (models, RESAMPLES).

    Raises:
        UserError: the models were not judged on the same prompts.
    """
    _refuse_unpaired(*models)
    draws = {}
    for index, task in enumerate(sorted(models[0])):
        draws[task] = _task_draws([model[task] for model in models], np.random.default_rng([seed, index]))
    return {**draws, "overall": np.mean(list(draws.values()), axis=0)}


def over_seeds(draws: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean over runs that differ in their seed alone, as the bootstrap sees it: seeds are resampled as well.

    Every resample draws one seed fewer than there are, with replacement; so few make the variance of the mean come out
    right, which as many as there are would understate by 1 in their number (Rao and Wu 1988,
    doi:10.1080/01621459.1988.10478591). The seeds of a resample depend on ``seed`` and their number alone: methods with
    the same seeds in the same order stay paired. Of one seed nothing is resampled.

    Args:
        draws: (seeds, RESAMPLES) as :func:`bootstrap` makes them, of the same prompts.

    Returns:
        (RESAMPLES,).
    """
    count = len(draws)
    rng = np.random.default_rng([seed, count])
    picked = rng.integers(count, size=(max(count - 1, 1), draws.shape[1]))
    return np.take_along_axis(draws, picked, axis=0).mean(axis=0)


def means(found: Outcomes) -> dict[str, float]:
    """Of every task over its samples, and ``overall``, the unweighted mean over tasks."""
    tasks = {task: float(np.mean(np.concatenate(list(prompts.values())))) for task, prompts in found.items()}
    return {**tasks, "overall": float(np.mean(list(tasks.values())))}


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap distribution."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def compare(policy: Outcomes, against: Outcomes | None = None) -> dict[str, Measured]:
    """Means with 95 % bootstrap intervals per task and ``overall``; with a baseline also the paired difference.

    Raises:
        UserError: the two were not judged on the same prompts.
    """
    models = [policy] if against is None else [policy, against]
    draws, found = bootstrap(*models), [means(model) for model in models]
    rows = {}
    for name, mean in found[0].items():
        row: dict[str, Any] = {"policy": mean, "interval": interval(draws[name][0])}
        if name in policy:
            row["n"] = sum(len(values) for values in policy[name].values())
        if against is not None:
            row["against"] = found[1][name]
            row["against_interval"] = interval(draws[name][1])
            row["difference"] = mean - found[1][name]
            row["difference_interval"] = interval(draws[name][0] - draws[name][1])
        rows[name] = Measured.model_validate(row)
    return rows


def _refuse_unpaired(*models: Outcomes) -> None:
    first = _counts(models[0])
    if any(_counts(model) != first for model in models[1:]):
        raise UserError("the two models were not judged on the same prompts and samples; evaluate them together")


def _counts(found: Outcomes) -> dict[str, dict[str, int]]:
    return {task: {prompt: len(values) for prompt, values in prompts.items()} for task, prompts in found.items()}
