"""`diffalign arena`: fill the cells, then put together what they say.

Cells (method x seed) run apart from each other and leave a file each: a stopped arena goes on where it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from diffalign import config as cfg
from diffalign.arena import cell, page, pool
from diffalign.arena.checks import check
from diffalign.arena.judge import judged
from diffalign.arena.plan import Plan, planned, trials
from diffalign.arena.report import report
from diffalign.arena.results import headline
from diffalign.arena.scores import Snapshot
from diffalign.arena.tuning import tuned
from diffalign.errors import UserError
from diffalign.files import claim

SHARED = {"model", "scorers", "reward", "pool", "pool_prompts", "pool_share", "candidates", "rounds", "optim"}
SHARED |= {"precision", "budget", "moments", "tuning", "evaluate"}
"""What no cell of a folder may differ in; entries and seeds may be added."""


def run(config: cfg.ArenaConfig, dry_run: bool = False) -> Path:
    """Run what is missing, failed cells again; returns the page.

    Raises:
        UserError: something of the config does not fit, cells were made with other settings, or cells failed, which
            leaves a page of the others.
    """
    root = Path(config.dir)
    tried = {name: trials(config, name) for name in config.entries}
    cells = {seed: [planned(config, name, seed) for name in config.entries] for seed in config.seeds}
    plans = [plan for own in (*tried.values(), *cells.values()) for plan in own]
    check(config, [own[0] for own in tried.values()])
    claim(root / "arena.json", config.model_dump(mode="json", include=SHARED), root, write=not dry_run)
    for plan in plans:
        _claim(plan, plan.identity(), write=False)
    chosen = config.only or list(config.entries)
    if dry_run:
        count = sum(len(tried[name]) for name in chosen) + len(chosen) * len(cells)
        print(f"would run {count} cells of {len(chosen)} methods into {root}, results into {config.out}")
        return root
    base = _base(config)
    with _Workers(config.workers or (1 if torch.cuda.is_available() else 2)) as workers:
        workers.run("tuning", [plan for name in chosen for plan in tried[name]])
        rates = {name: tuned(tried[name]).rate for name in chosen}
        for seed, own in cells.items():
            workers.run(f"seed {seed}", [replace(plan, lr=rates[plan.name]) for plan in own if plan.name in rates])
            results = report(config, base)
    print("\n".join(headline(results)))
    out = Path(config.out) / page.PAGE
    failed = [plan for plan in plans if plan.failure.is_file()]
    if failed:
        raise UserError(
            f"{len(failed)} of the cells failed, such as {failed[0].failure}; the same command runs them again"
        )
    return out


def _claim(plan: Plan, identity: dict[str, Any], *, write: bool) -> None:
    """Refuse files that a cell of other settings left."""
    advice = f"delete {plan.folder}, choose another `dir`, or give the entry another name"
    claim(plan.result, identity, plan.folder / "train", write=write, advice=advice)


def _base(config: cfg.ArenaConfig) -> Snapshot:
    """The model that all cells start from."""
    path = Path(config.dir) / "base.json"
    if not path.is_file():
        plan = planned(config, next(iter(config.entries)), config.seeds[0])
        cell.write(path, 0.0, [judged(plan, None, 0, 0, 0.0, last=True)])
    return cell.read(path)[0][0]


def _begin(threads: int) -> None:
    """A worker: quiet as the command line is, on its share of the cores."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(threads)


class _Workers:
    """Processes that run cells, each on its share of the cores; a single one is this process."""

    def __init__(self, count: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // count)
        self._pool = (
            ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin, initargs=(threads,))
            if count > 1
            else None
        )

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, what: str, plans: Iterable[Plan]) -> None:
        """All cells that have no result yet."""
        missing = [plan for plan in plans if not plan.result.is_file()]
        for plan in missing:
            _claim(plan, {**plan.identity(), "chosen": plan.lr}, write=True)
        pools = {plan.pool: plan for plan in missing if plan.entry.build is not None}
        for plan in pools.values():  # before two cells want it at once
            pool.make(plan)
        for index, _ in enumerate(self._finished(missing), 1):
            print(f"{what}: {index} of {len(missing)} cells")

    def _finished(self, plans: Sequence[Plan]) -> Iterator[None]:
        if self._pool is None:
            yield from map(cell.run, plans)
            return
        for future in as_completed([self._pool.submit(cell.run, plan) for plan in plans]):
            yield future.result()
