"""`diffalign arena`: every method from one base, with one budget, judged alike; a page of results.

Cells (method x seed) run apart from each other and leave a file each: a stopped arena goes on where it was.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from diffalign import config as cfg
from diffalign.arena import cell, page
from diffalign.arena.cell import Plan
from diffalign.arena.results import BASE, ArenaResults, Contrast, Entry, Label, Target, Trial, headline, write
from diffalign.arena.scores import Cell, Snapshot
from diffalign.arena.summary import summarise
from diffalign.comparison import means
from diffalign.errors import UserError, nearest
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
    unknown = sorted(set(config.only) - config.entries.keys())
    if unknown:
        raise UserError(f"only: no entry {unknown[0]!r}{nearest(unknown[0], config.entries)}")
    root = Path(config.dir)
    chosen = [name for name in config.entries if not config.only or name in config.only]
    trials = {name: _trials(config, name) for name in chosen}
    count = sum(map(len, trials.values())) + len(chosen) * len(config.seeds)
    if dry_run:
        print(f"would run {count} cells of {len(chosen)} methods into {root}, results into {config.out}")
        return root
    claim(root / "arena.json", config.model_dump(mode="json", include=SHARED), root)
    base = _base(config)
    with _Workers(config.workers) as workers:
        workers.run("tuning", [plan for plans in trials.values() for plan in plans])
        rates = {name: _chosen(plans) for name, plans in trials.items()}
        for seed in config.seeds:
            workers.run(f"seed {seed}", [_plan(config, name, seed, rates[name]) for name in chosen])
            results = report(config, base)
    print("\n".join(headline(results)))
    return Path(config.out) / page.PAGE


def _check(name: str, entry: cfg.ArenaEntry) -> None:
    resolve(**cfg.MethodConfig.model_validate(entry.method).model_dump())
    if entry.online is None and entry.build is None:
        raise UserError(f"entries.{name}: give `build` rules, `online` settings, or both")


def _quiet() -> None:
    """As the command line does it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Workers:
    """Processes that run cells, each on its share of the cores; a single one is this process."""

    def __init__(self, count: int) -> None:
        self._pool = None
        if count > 1:
            threads = max(1, (os.cpu_count() or 1) // count)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they load torch
            self._pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_quiet)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, what: str, plans: Iterable[Plan]) -> None:
        """All cells that have no result yet."""
        missing = [plan for plan in plans if not plan.result.is_file()]
        pools = [plan for plan in missing if plan.entry.build is not None]
        for plan in pools[:1]:  # before two cells want it at once
            cell.make_pool(plan)
        for index, _ in enumerate(self._finished(missing), 1):
            print(f"{what}: {index} of {len(missing)} cells")

    def _finished(self, plans: Sequence[Plan]) -> Iterator[None]:
        if self._pool is None:
            yield from map(cell.run, plans)
            return
        for future in as_completed([self._pool.submit(cell.run, plan) for plan in plans]):
            yield future.result()


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


def report(config: cfg.ArenaConfig, base: Snapshot) -> ArenaResults:
    """Put together what has run, as JSON and as a page."""
    how = config.evaluate
    main = how.judge.label or how.judge.name
    labels = {main: Label(title=f"held-out {main}", about="no guidance, as in training")}
    labels |= {
        one.label or one.name: Label(title=f"held-out {one.label or one.name}", about="no guidance")
        for one in how.panel
    }
    labels["guided"] = Label(title="guided", about=f"{main}, guidance {how.guided.guidance:g}")
    entries, cells, waiting = _found(config)
    ran = {BASE, *(entry.name for entry in entries)}
    contrasts = [Contrast.model_validate(one) for one in config.contrasts]
    targets = [Target.model_validate(one) for one in config.targets]
    notes = [*config.notes, *([f"Not run yet: {', '.join(waiting)}."] if waiting else [])]
    tuning = config.tuning
    results = summarise(
        config.title,
        base,
        entries,
        cells,
        labels=labels,
        contrasts=[one for one in contrasts if {one.first, one.second} <= ran],
        targets=[
            one.model_copy(update={"asked": [name for name in one.asked if name in ran]})
            for one in targets
            if {one.of, one.reference or BASE} <= ran
        ],
        main=main,
        trained=next(one.label or one.name for one in how.panel),
        tuning=f"{len(tuning.factors)} learning rates per method, {tuning.budget:,} network evaluations each, "
        f"judged on {tuning.prompts.source} with seed {tuning.seed}",
        settings=_described(config),
        notes=notes,
        command=" ".join(["diffalign", *sys.argv[1:]]),
    )
    out = Path(config.out)
    write(out / RESULTS, results)
    page.write(out / RESULTS)
    return results


def _found(config: cfg.ArenaConfig) -> tuple[list[Entry], list[Cell], list[str]]:
    """The entries that have run, their cells, and the names of the others."""
    entries, cells, waiting = [], [], []
    for name, entry in config.entries.items():
        plans = [_plan(config, name, seed, 0.0) for seed in config.seeds]
        done = [plan for plan in plans if plan.result.is_file()]
        if not done:
            waiting += [name] if not config.only or name in config.only else []
            continue
        tried = [
            Trial(learning_rate=plan.lr, score=_score(plan)) for plan in _trials(config, name) if plan.result.is_file()
        ]
        for plan in done:
            found, error, lr = cell.read(plan.result)
            cells.append(Cell(name, plan.seed, found, error))
        entries.append(
            Entry(name=name, title=entry.title, group=entry.group, note=entry.note, learning_rate=lr, tuning=tried)
        )
    return entries, cells, waiting


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
