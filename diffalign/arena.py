"""`diffalign arena`: every method from one base, with one budget, judged alike; a page of results.

Cells (method x seed) run apart from each other and leave a file each: a stopped arena goes on where it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from rich.progress import Progress

from diffalign import arena_cell as cell
from diffalign import arena_page
from diffalign import config as cfg
from diffalign.arena_cell import Plan
from diffalign.arena_results import Contrast, Entry, Label, Target, Trial, headline, write
from diffalign.arena_scores import Cell, Snapshot
from diffalign.arena_summary import summarise
from diffalign.comparison import means
from diffalign.errors import UserError
from diffalign.files import claim, write_json
from diffalign.methods import resolve

RESULTS = "results.json"
SHARED = {"model", "scorers", "reward", "pool", "pool_prompts", "pool_share", "candidates", "rounds", "optim"}
SHARED |= {"precision", "budget", "moments", "tuning", "evaluate"}
"""What no cell of a folder may differ in; entries and seeds may be added."""


def run(config: cfg.ArenaConfig, dry_run: bool = False) -> Path:
    """Run what is missing; returns the page."""
    for name, entry in config.entries.items():
        _check(name, entry)
    root = Path(config.dir)
    trials = {name: _trials(config, name) for name in config.entries}
    count = sum(map(len, trials.values())) + len(config.entries) * len(config.seeds)
    if dry_run:
        print(f"would run {count} cells of {len(config.entries)} methods into {root}, results into {config.out}")
        return root
    claim(root / "arena.json", config.model_dump(mode="json", include=SHARED), root)
    base = _base(config)
    with _Workers(config.workers) as workers:
        workers.run("tuning", [plan for plans in trials.values() for plan in plans])
        rates = {name: _chosen(plans) for name, plans in trials.items()}
        for seed in config.seeds:
            workers.run(f"seed {seed}", [_plan(config, name, seed, rates[name]) for name in config.entries])
            page = report(config, base, trials)
    return page


def _check(name: str, entry: cfg.ArenaEntry) -> None:
    resolve(**cfg.MethodConfig.model_validate(entry.method).model_dump())
    if entry.online is None and entry.build is None:
        raise UserError(f"entries.{name}: give `build` rules, `online` settings, or both")


class _Workers:
    """Processes that run cells, each on its share of the cores."""

    def __init__(self, count: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they load torch
        self._pool = ProcessPoolExecutor(count, get_context("spawn"))

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, what: str, plans: Iterable[Plan]) -> None:
        """All cells that have no result yet."""
        missing = [plan for plan in plans if not plan.result.is_file()]
        pools = [plan for plan in missing if plan.entry.build is not None]
        with Progress() as bar:
            task = bar.add_task(what, total=len(missing))
            if pools:  # before two cells want it at once
                self._pool.submit(cell.make_pool, pools[0]).result()
            for future in [self._pool.submit(cell.run, plan) for plan in missing]:
                future.result()
                bar.advance(task)


def _plan(config: cfg.ArenaConfig, name: str, seed: int, lr: float) -> Plan:
    folder = Path(config.dir) / "cells" / f"{name}-{seed}"
    moments = tuple(config.moments)
    return Plan(config, name, seed, lr, config.budget, config.evaluate.prompts, moments, folder, guided=True)


def _trials(config: cfg.ArenaConfig, name: str) -> list[Plan]:
    tuning, entry = config.tuning, config.entries[name]
    return [
        Plan(
            config,
            name,
            tuning.seed,
            entry.lr * factor,
            tuning.budget,
            tuning.prompts,
            (1.0,),
            Path(config.dir) / "tuning" / f"{name}-{factor:g}",
            guided=False,
        )
        for factor in tuning.factors
    ]


def _score(plan: Plan) -> float | None:
    """The judge's mean on training prompts; None for a trial that failed."""
    found, _, _ = cell.read(plan.result)
    label = plan.config.evaluate.judge.label or plan.config.evaluate.judge.name
    return means(found[-1].outcomes[label])["overall"] if found else None


def _chosen(plans: Sequence[Plan]) -> float:
    """The best learning rate; the middle one if all failed."""
    scores = {plan.lr: found for plan in plans if (found := _score(plan)) is not None}
    return max(scores, key=lambda lr: scores[lr]) if scores else plans[len(plans) // 2].lr


def _base(config: cfg.ArenaConfig) -> Snapshot:
    """The model that all cells start from."""
    plan = _plan(config, next(iter(config.entries)), config.seeds[0], 0.0)
    path = Path(config.dir) / "base.json"
    if not path.is_file():
        found = cell.judged(plan, None, 0, 0, 0.0, last=True)
        write_json(path, {"lr": 0.0, "snapshots": [cell.asdict(found)]})
    return cell.read(path)[0][0]


def report(config: cfg.ArenaConfig, base: Snapshot, trials: dict[str, list[Plan]]) -> Path:
    """Put together what there is; returns the page."""
    how = config.evaluate
    main = how.judge.label or how.judge.name
    labels = {main: Label(title=f"held-out {main}", about="no guidance, as in training")}
    labels |= {
        one.label or one.name: Label(title=f"held-out {one.label or one.name}", about="no guidance")
        for one in how.panel
    }
    labels["guided"] = Label(title="guided", about=f"{main}, guidance {how.guided.guidance:g}")
    cells, entries = [], []
    for name, entry in config.entries.items():
        rate = _chosen(trials[name])
        tried = [Trial(learning_rate=plan.lr, score=_score(plan)) for plan in trials[name]]
        entries.append(
            Entry(name=name, title=entry.title, group=entry.group, note=entry.note, learning_rate=rate, tuning=tried)
        )
        for seed in config.seeds:
            path = _plan(config, name, seed, rate).result
            if path.is_file():
                found, error, _ = cell.read(path)
                cells.append(Cell(name, seed, found, error))
    tuning = config.tuning
    results = summarise(
        config.title,
        base,
        entries,
        cells,
        labels=labels,
        contrasts=[Contrast.model_validate(one) for one in config.contrasts],
        targets=[Target.model_validate(one) for one in config.targets],
        main=main,
        trained=next(one.label or one.name for one in how.panel),
        tuning=f"{len(tuning.factors)} learning rates per method, {tuning.budget:,} network evaluations each, "
        f"judged on {tuning.prompts.source} with seed {tuning.seed}",
        settings=_described(config),
        notes=config.notes,
        command=" ".join(["diffalign", *sys.argv[1:]]),
    )
    out = Path(config.out)
    write(out / RESULTS, results)
    print("\n".join(headline(results)))
    return arena_page.write(out / RESULTS)


def _described(config: cfg.ArenaConfig) -> dict[str, object]:
    """What all entries share, for readers."""
    return {
        "model": config.model.path,
        "budget": config.budget,
        "reward": config.reward,
        "sampling": config.pool.model_dump(mode="json"),
        "rounds": config.rounds.model_dump(mode="json", exclude_unset=True),
        "pool": f"{config.pool_share:.0%} of the budget, {config.candidates} samples per prompt",
        "optimiser": config.optim,
        "precision": config.precision,
        "held-out prompts": config.evaluate.prompts.model_dump(mode="json", exclude_none=True),
    }
