"""`diffalign eval`: generate -> score with judge and panel -> means per task, paired intervals, and a card."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffalign import config as cfg
from diffalign import generate, geneval_layout, models, overoptimisation, score
from diffalign.comparison import Outcomes, common, compare, outcomes, wins
from diffalign.errors import UserError
from diffalign.files import write_json
from diffalign.generate import sampling_config
from diffalign.machine import versions
from diffalign.prompts import read_prompts
from diffalign.results import Measured, Results, headline, table
from diffalign.train.run import snapshots

SCORED = "scored.jsonl"
RESULTS = "results.json"
JUDGE = "judge.json"
"""Beside the scored samples of a model: which label was the judge's."""


def run(config: cfg.EvalConfig, dry_run: bool = False) -> Path:
    """Evaluate a model, and its baseline on the same prompts and noise, or the snapshots of a run; the results file."""
    sampling_config(config, config.model.family)
    prompts = read_prompts(config.prompts, config.seed)
    out = Path(config.out)
    labels = _labels(config)
    if config.snapshots is not None:
        return _over_training(config, out, labels, dry_run)
    if dry_run:
        count = 1 if config.against is None else 2
        print(f"would judge {count} model(s) on {len(prompts)} prompts x {config.candidates} samples into {out}")
        return out / RESULTS
    folders = [_judge(config, config.model, out / "policy")]
    if config.against:
        folders.append(_judge(config, config.against, out / "against"))
    results = summarise(out.resolve().name, folders, labels[0], labels[1:])
    results = results.model_copy(update=_described(config, folders[0]))
    _write(results, out)
    if config.layout == "geneval":
        for folder in folders:
            geneval_layout.write_layout(folder / SCORED, folder / "geneval", labels[0])
            print(geneval_layout.report(geneval_layout.summary(folder / "geneval" / "results.jsonl")))
    return out / RESULTS


def compare_runs(first: str, second: str) -> None:
    """`diffalign eval A B`: the judged samples of two evaluations against each other; prints who wins.

    Raises:
        UserError: a folder holds no judged samples, or the two are of other prompts or judges.
    """
    folders = [_judged_folder(Path(name)) for name in (first, second)]
    judges = [_judge_of(folder) for folder in folders]
    if judges[0] != judges[1]:
        raise UserError(f"{first} was judged by {judges[0]}, {second} by {judges[1]}; evaluate both with one judge")
    label = judges[0]["label"]
    results = summarise(f"{first} against {second}", folders, label, [])
    _print(results)
    print(f"{winner(results.overall, first, second)} (judge: {label}, n = {results.n})")


def winner(difference: Measured, first: str, second: str) -> str:
    """Who is better, and whether the interval says so."""
    assert difference.difference is not None
    assert difference.difference_interval is not None
    low, high = difference.difference_interval
    ahead = first if difference.difference > 0 else second
    size = f"{abs(difference.difference):.4f}, 95 % interval of the difference {low:+.4f} to {high:+.4f}"
    if low > 0 or high < 0:
        return f"{ahead} wins by {size}: significant"
    return f"no significant difference: {ahead} is ahead by {size}" if difference.difference else "no difference at all"


def _judged_folder(path: Path) -> Path:
    for folder in (path, path / "policy"):
        if (folder / SCORED).is_file():
            return folder
    raise UserError(f"{path}: holds no judged samples ({SCORED}); give the folder that `diffalign eval` wrote")


def _judge_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / JUDGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder}: has no readable {JUDGE}; run `diffalign eval` again into it") from None


def _labels(config: cfg.EvalConfig) -> list[str]:
    """The judge's label and those of the panel."""
    return list(score.by_label([config.judge, *config.panel]))


def _judge(config: cfg.EvalConfig, model: cfg.ModelConfig, out: Path) -> Path:
    """Generate and score one model's samples below ``out``; both stages resume."""
    shared = {name: getattr(config, name) for name in ("prompts", "candidates", "sampling", "decoding", "seed")}
    made = generate.run(cfg.GenerateConfig(model=model, out=str(out), **shared), title=f"sample {out.name}")
    scorers = [config.judge, *config.panel]
    score.run(cfg.ScoreConfig(records=str(made), out=str(out / SCORED), scorers=scorers, failures=config.failures))
    label = config.judge.key
    write_json(out / JUDGE, {"label": label, "name": config.judge.name, "params": config.judge.params})
    return out


def summarise(name: str, folders: Sequence[Path], judge: str, panel: Sequence[str]) -> Results:
    """The results of one model, or of two of which the second is the baseline."""
    found, failed = common(*(outcomes(folder / SCORED, judge) for folder in folders))
    rows = compare(*found)
    overall = rows.pop("overall")
    return Results(
        name=name,
        judge=judge,
        metric=judge,
        n=sum(row.n or 0 for row in rows.values()),
        prompts=sum(len(prompts) for prompts in found[0].values()),
        failed=failed,
        overall=overall,
        tasks=rows,
        wins=_pooled(wins(*found)) if len(found) == 2 else None,
        panel={label: _measure(folders, label) for label in panel},
    )


def _measure(folders: Sequence[Path], label: str) -> Measured:
    """Mean of a label over all samples, paired with the baseline's."""
    found, _ = common(*(outcomes(folder / SCORED, label) for folder in folders))
    return _pooled(*found)


def _pooled(*found: Outcomes) -> Measured:
    """All tasks as one."""
    return compare(*({"all": {f"{t}|{p}": v for t, ps in one.items() for p, v in ps.items()}} for one in found))["all"]


def _described(config: cfg.EvalConfig, folder: Path) -> dict[str, Any]:
    """What the results say of how they came about."""
    settings = sampling_config(config, config.model.family)
    return {
        "judge": config.judge.name,
        "metric": str(config.judge.params.get("metric", config.judge.key)),
        "note": config.note or f"prompts: {config.prompts.source}",
        "sampling": settings.model_dump(mode="json"),
        "seed": config.seed,
        "card": card(config, folder),
    }


def card(config: cfg.EvalConfig, folder: Path) -> dict[str, Any]:
    """Everything it takes to measure again: models with digests, sampling, seeds, precision, versions."""
    found: dict[str, Any] = {"command": " ".join(["diffalign", *sys.argv[1:]])}
    for role, model in (("model", config.model), ("against", config.against)):
        if model is not None:
            found[role] = {"family": model.family, "dtype": model.dtype, **models.origin(model)}
    settings = sampling_config(config, config.model.family).model_dump(mode="json")
    prompts = config.prompts.model_dump(mode="json", exclude_none=True)
    seeds = f"from {config.seed}, the record and the number of the sample"
    return {
        **found,
        "sampling": settings,
        "candidates per prompt": config.candidates,
        "prompts": {**prompts, "sha256": score.file_digest(folder / generate.RECORDS)[:16]},
        "seeds": seeds,
        "judge": config.judge.model_dump(mode="json", exclude_none=True),
        "versions": versions(),
    }


def _write(results: Results, out: Path) -> None:
    write_json(out / RESULTS, results.model_dump(mode="json", exclude_none=True))
    _print(results)
    print(headline(results))


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
    if results.failed:
        print(f"{results.failed} samples could not be judged and are left out of the table")
    shown: Mapping[str, Measured] = {**results.panel, **({"win rate": results.wins} if results.wins else {})}
    for label, row in shown.items():
        low, high = row.interval
        line = f"{label}: {row.policy:.4f} ({low:.4f} to {high:.4f})"
        if row.difference is not None and row.difference_interval is not None:
            low, high = row.difference_interval
            line += f", before {row.against:.4f}, difference {row.difference:+.4f} ({low:+.4f} to {high:+.4f})"
        print(line)


def _over_training(config: cfg.EvalConfig, out: Path, labels: Sequence[str], dry_run: bool) -> Path:
    """The judge and the panel at every snapshot of a run, on the same prompts and noise, and when to stop."""
    if config.trained is None or config.trained not in labels:
        known = ", ".join(labels)
        raise UserError(f"trained: which label was trained on? {config.trained!r} is none of {known}")
    assert config.snapshots is not None
    found = snapshots(Path(config.snapshots))
    if not found:
        raise UserError(f"snapshots: {config.snapshots} holds none; train with run.snapshots=true and run.save_every")
    if dry_run:
        print(f"would judge step 0 and {len(found)} snapshots into {out}")
        return out / overoptimisation.FILE
    folders = {0: _judge(config, config.model, out / "step-000000")}
    for step, adapter in found.items():
        model = config.model.model_copy(update={"adapter": str(adapter)})
        folders[step] = _judge(config, model, out / f"step-{step:06d}")
    measured = {step: {label: outcomes(f / SCORED, label) for label in labels} for step, f in folders.items()}
    trajectory = overoptimisation.follow(out.resolve().name, measured, config.trained, config.note)
    write_json(out / overoptimisation.FILE, trajectory.model_dump(mode="json", exclude_none=True))
    print(overoptimisation.verdict(trajectory))
    return out / overoptimisation.FILE
