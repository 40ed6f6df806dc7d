"""`diffalign eval`: generate -> score with the judge -> mean per task, mean over tasks, with paired intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from diffalign import config as cfg
from diffalign import generate, score
from diffalign import records as store
from diffalign.errors import UserError
from diffalign.files import write_json
from diffalign.generate import sampling_config
from diffalign.prompts import read_prompts
from diffalign.results import Measured, Results, table

RESAMPLES = 10_000
SCORED = "scored.jsonl"
Outcomes = Mapping[str, Mapping[str, Sequence[float]]]
"""task -> prompt -> one number per sample."""


def outcomes(path: Path, label: str) -> dict[str, dict[str, list[float]]]:
    """Read the judge's label of every sample, grouped by task and prompt, in file order."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in store.read(path):
        task = str(record.meta.get("tag", "all"))
        for candidate in record.candidates:
            value = candidate.labels[label]
            if isinstance(value, list):
                raise UserError(
                    f"{path}: record {record.id!r}: {label!r} has a value per unit, expected one per sample"
                )
            found[task][str(record.prompt)].append(value)
    return {task: dict(prompts) for task, prompts in found.items()}


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


def _print(results: Results) -> None:
    paired = results.overall.against is not None
    out = Table(title=f"{results.name}: {results.judge} ({results.metric}), {results.prompts} prompts")
    for column in ("task", "n", *(("before",) if paired else ()), "score", "95 % interval"):
        out.add_column(column, justify="left" if column == "task" else "right")
    for row in table(results):
        before = (row.before.value,) if row.before else ()
        interval = f"{row.difference.value} ({row.difference.interval})" if row.difference else row.after.interval
        out.add_row(row.task, str(row.n), *before, row.after.value, interval)
    Console().print(out)


def _judge(config: cfg.EvalConfig, model: cfg.ModelConfig, out: Path) -> Outcomes:
    """Generate and score one model's samples below ``out``; both stages resume."""
    shared = {name: getattr(config, name) for name in ("prompts", "candidates", "sampling", "decoding", "seed")}
    made = generate.run(cfg.GenerateConfig(model=model, out=str(out), **shared), title=f"sample {out.name}")
    scored = score.run(cfg.ScoreConfig(records=str(made), out=str(out / SCORED), scorers=[config.judge]))
    return outcomes(scored, config.judge.label or config.judge.name)


def run(config: cfg.EvalConfig, dry_run: bool = False) -> Path:
    """Evaluate a model, and its baseline on the same prompts and noise; returns the results file."""
    settings = sampling_config(config, config.model.family)
    prompts = read_prompts(config.prompts, config.seed)
    out = Path(config.out)
    if dry_run:
        models = 1 if config.against is None else 2
        print(f"would judge {models} model(s) on {len(prompts)} prompts x {config.candidates} samples into {out}")
        return out / "results.json"
    policy = _judge(config, config.model, out / "policy")
    against = _judge(config, config.against, out / "against") if config.against else None
    rows = compare(policy, against)
    overall = rows.pop("overall")
    results = Results(
        name=out.resolve().name,
        judge=config.judge.name,
        metric=str(config.judge.params.get("metric", config.judge.label or config.judge.name)),
        note=config.note or f"prompts: {config.prompts.source}",
        sampling=settings.model_dump(mode="json"),
        seed=config.seed,
        n=sum(row.n or 0 for row in rows.values()),
        prompts=sum(len(found) for found in policy.values()),
        overall=overall,
        tasks=rows,
    )
    write_json(out / "results.json", results.model_dump(mode="json", exclude_none=True))
    _print(results)
    return out / "results.json"
