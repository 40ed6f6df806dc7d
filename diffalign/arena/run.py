"""`diffalign arena`: fill the cells, then put together what they say.

Cells (method x seed) run apart from each other and leave a file each: a stopped arena goes on where it was.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from diffalign import build, comparison, score
from diffalign import config as cfg
from diffalign.arena import cell, page, pool
from diffalign.arena.judge import judged
from diffalign.arena.plan import Plan
from diffalign.arena.results import FILE, ArenaResults, Entry, Label, Trial, headline, write
from diffalign.arena.scores import Cell, Snapshot
from diffalign.arena.summary import summarise
from diffalign.config.arena import BASE
from diffalign.errors import UserError, nearest
from diffalign.files import claim
from diffalign.machine import described
from diffalign.methods import resolve
from diffalign.prompts import read_prompts
from diffalign.train import job

SHARED = {"model", "scorers", "reward", "pool", "pool_prompts", "pool_share", "candidates", "rounds", "optim"}
SHARED |= {"precision", "budget", "moments", "tuning", "evaluate"}
"""What no cell of a folder may differ in; entries and seeds may be added."""


def run(config: cfg.ArenaConfig, dry_run: bool = False) -> Path:
    """Run what is missing, failed cells again; returns the page.

    Raises:
        UserError: something of the config does not fit, or cells were made with other settings.
    """
    root = Path(config.dir)
    trials = {name: _trials(config, name) for name in config.entries}
    cells = {seed: [_plan(config, name, seed) for name in config.entries] for seed in config.seeds}
    _check(config, [own[0] for own in trials.values()])
    claim(root / "arena.json", config.model_dump(mode="json", include=SHARED), root, write=not dry_run)
    for plan in (plan for own in (*trials.values(), *cells.values()) for plan in own):
        _claim(plan, plan.identity(), write=False)
    chosen = config.only or list(config.entries)
    if dry_run:
        count = sum(len(trials[name]) for name in chosen) + len(chosen) * len(cells)
        print(f"would run {count} cells of {len(chosen)} methods into {root}, results into {config.out}")
        return root
    base = _base(config)
    with _Workers(config.workers or (1 if torch.cuda.is_available() else 2)) as workers:
        workers.run("tuning", [plan for name in chosen for plan in trials[name]])
        rates = {name: _tuned(trials[name]).rate for name in chosen}
        for seed, own in cells.items():
            workers.run(f"seed {seed}", [replace(plan, lr=rates[plan.name]) for plan in own if plan.name in rates])
            results = report(config, base)
    print("\n".join(headline(results)))
    return Path(config.out) / page.PAGE


def _claim(plan: Plan, identity: dict[str, Any], *, write: bool) -> None:
    """Refuse files that a cell of other settings left."""
    advice = f"delete {plan.folder}, choose another `dir`, or give the entry another name"
    claim(plan.result, identity, plan.folder / "train", write=write, advice=advice)


# --- what is refused ------------------------------------------------------------------------------------------------


def _check(config: cfg.ArenaConfig, plans: Iterable[Plan]) -> None:
    """Refuse before anything runs what a cell or the report would refuse after hours.

    Args:
        plans: one of every entry.
    """
    if config.model.lora is None:
        raise UserError("model.lora: an arena compares LoRAs; give its rank")
    for name in config.only:
        _known("only", name, config.entries)
    for plan in plans:
        _check_entry(plan)
    trained = score.by_label(config.scorers)
    labels = score.by_label([config.evaluate.judge, *config.evaluate.panel])
    if "guided" in labels:
        raise UserError("evaluate.panel: the label `guided` is that of the judge with guidance; choose another")
    for name in config.reward:
        _known("reward", name, trained)
    if not any(_weight(config, one) for one in config.evaluate.panel):
        raise UserError(f"evaluate.panel: follow one of the rewards that are trained on: {', '.join(trained)}")
    entries, scores = {BASE, *config.entries}, {*labels, "guided"}
    for index, contrast in enumerate(config.contrasts):
        _known(f"contrasts.{index}", contrast.first, entries)
        _known(f"contrasts.{index}", contrast.second, entries)
        _known(f"contrasts.{index}", contrast.label, scores)
        _known(f"contrasts.{index}", contrast.second_label or contrast.label, scores)
    for index, target in enumerate(config.targets):
        for name in (target.of, target.reference or BASE, *target.asked):
            _known(f"targets.{index}", name, entries)
        for name in (target.score, target.label):
            _known(f"targets.{index}", name, scores)


def _known(where: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise UserError(f"{where}: there is no {name!r}{nearest(name, names)}")


def _check_entry(plan: Plan) -> None:
    """An entry is a method, records or rounds for it, and settings that are those of the verbs."""
    where = f"entries.{plan.name}"
    if plan.name == BASE:
        raise UserError(f"{where}: is the name of the model that all start from; choose another")
    if plan.entry.online is None and plan.entry.build is None:
        raise UserError(f"{where}: give `build` rules, `online` settings, or both")
    try:
        training = plan.training(1)
        resolve(**training.method.model_dump())
        if training.online is not None:
            job.check(training)
        if training.online is not None and training.online.stop is not None:
            raise UserError("online.stop: would end before the budget; remove it")
        if plan.entry.build is not None:
            build.check(plan.building())
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# --- cells ----------------------------------------------------------------------------------------------------------


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


def _plan(config: cfg.ArenaConfig, name: str, seed: int) -> Plan:
    """A cell; its learning rate is that of the middle until tuning has chosen one."""
    moments, prompts = tuple(config.moments), config.evaluate.prompts
    folder = Path(config.dir) / "cells" / f"{name}-{seed}"
    return Plan(config, name, seed, config.entries[name].lr, config.budget, prompts, moments, folder, guided=True)


def _trials(config: cfg.ArenaConfig, name: str) -> list[Plan]:
    how, root = config.tuning, Path(config.dir) / "tuning"
    rates = {f"{name}-{factor:g}": config.entries[name].lr * factor for factor in how.factors}
    return [
        Plan(config, name, how.seed, lr, how.budget, how.prompts, (1.0,), root / folder, guided=False)
        for folder, lr in rates.items()
    ]


class _Tuned(NamedTuple):
    """The learning rates that were tried, and what cells train with: of the best one, the middle one if all failed."""

    trials: list[Trial]
    rate: float


def _tuned(plans: Sequence[Plan]) -> _Tuned:
    """The judge's means on training prompts, of the samples that it could judge in every trial."""
    label = plans[0].config.evaluate.judge.key
    found = {plan.lr: cell.read(plan.result)[0][-1].outcomes[label] for plan in plans if plan.result.is_file()}
    found = {lr: one for lr, one in found.items() if comparison.is_judged(one)}
    kept = comparison.common(*found.values())[0] if found else []
    scores = {lr: comparison.means(one)["overall"] for lr, one in zip(found, kept, strict=True)}
    trials = [Trial(learning_rate=plan.lr, score=scores.get(plan.lr)) for plan in plans]
    best = max(scores, key=lambda lr: scores[lr]) if scores else plans[len(plans) // 2].lr
    return _Tuned(trials, best * plans[0].config.tuning.scale)


def _base(config: cfg.ArenaConfig) -> Snapshot:
    """The model that all cells start from."""
    path = Path(config.dir) / "base.json"
    if not path.is_file():
        plan = _plan(config, next(iter(config.entries)), config.seeds[0])
        cell.write(path, 0.0, [judged(plan, None, 0, 0, 0.0, last=True)])
    return cell.read(path)[0][0]


# --- what came out --------------------------------------------------------------------------------------------------


def report(config: cfg.ArenaConfig, base: Snapshot) -> ArenaResults:
    """Put together what has run, as JSON and as a page."""
    how, tuning = config.evaluate, config.tuning
    entries, cells, waiting = _found(config)
    ran = {BASE, *(entry.name for entry in entries)}
    prompts = [str(record.prompt) for record in read_prompts(how.prompts, how.seed)]
    trained_on = _trained_on(config)
    results = summarise(
        config.title,
        base,
        entries,
        cells,
        labels=_labels(config),
        contrasts=[one for one in config.contrasts if {one.first, one.second} <= ran],
        targets=[
            one.model_copy(update={"asked": [name for name in one.asked if name in ran]})
            for one in config.targets
            if {one.of, one.reference or BASE} <= ran
        ],
        main=how.judge.key,
        trained=next(one.key for one in how.panel if _weight(config, one)),
        trained_prompts=len({*prompts} & trained_on),
        trained_samples=sum(prompt in trained_on for prompt in prompts),
        tuning=f"{len(tuning.factors)} learning rates per method, {tuning.budget:,} network evaluations each, "
        f"judged on {tuning.prompts.source} with seed {tuning.seed}; beside the budget"
        + (f"; trained with {tuning.scale:g} of the best" if tuning.scale != 1 else ""),
        settings=_described(config),
        waiting=waiting,
        machine=f"{datetime.date.today()}, {described()}",
        command=" ".join(["diffalign", *sys.argv[1:]]),
    )
    out = Path(config.out)
    write(out / FILE, results)
    page.write(out / FILE)
    return results


def _weight(config: cfg.ArenaConfig, spec: cfg.ScorerConfig) -> float:
    """What a scorer counts in the reward that is trained on, under whatever label."""
    alike = [one.key for one in config.scorers if (one.name, one.params) == (spec.name, spec.params)]
    return sum(config.reward.get(key, 0.0) for key in alike)


def _labels(config: cfg.ArenaConfig) -> dict[str, Label]:
    """The columns of the table."""
    how = config.evaluate
    found = {}
    for one in (how.judge, *how.panel):
        weight = _weight(config, one)
        trained = f", weight {weight:g} in the reward on training prompts" if weight else ", not in the reward"
        found[one.key] = Label(title=f"held-out {one.key}", about=f"{_sampled(how.sampling)}{trained}")
    return {**found, "guided": Label(title="guided", about=f"{how.judge.key}, {_sampled(how.guided)}")}


def _sampled(how: cfg.SamplingConfig) -> str:
    return f"{how.steps} steps, {'no guidance' if how.guidance == 1 else f'guidance {how.guidance:g}'}"


def _trained_on(config: cfg.ArenaConfig) -> set[str]:
    """Prompts that some method saw in training or tuning."""
    rounds = [{**config.rounds.model_dump(), **entry.online} for entry in config.entries.values() if entry.online]
    own = [cfg.PromptsConfig.model_validate(one["prompts"]) for one in rounds if one["prompts"]]
    sources = [config.pool_prompts, *([config.rounds.prompts] if config.rounds.prompts else []), *own]
    seeds = (*config.seeds, config.tuning.seed)
    found = {str(record.prompt) for source in sources for seed in seeds for record in read_prompts(source, seed)}
    return found | {str(record.prompt) for record in read_prompts(config.tuning.prompts, config.evaluate.seed)}


def _found(config: cfg.ArenaConfig) -> tuple[list[Entry], list[Cell], list[str]]:
    """The entries that have run, their cells, and the titles of the others."""
    entries, cells, waiting = [], [], []
    for name, entry in config.entries.items():
        plans = [_plan(config, name, seed) for seed in config.seeds]
        own = [found for found in map(_cell, plans) if found is not None]
        if not own:
            waiting += [entry.title] if not config.only or name in config.only else []
            continue
        rates = [cell.read(plan.result)[1] for plan in plans if plan.result.is_file()]
        tuned = _tuned(_trials(config, name))
        cells += own
        entries.append(
            Entry(
                name=name,
                title=entry.title,
                group=entry.group,
                note=entry.note,
                learning_rate=rates[0] if rates else tuned.rate,
                tuning=tuned.trials,
            )
        )
    return entries, cells, waiting


def _cell(plan: Plan) -> Cell | None:
    """What became of a cell, if it was run."""
    if plan.result.is_file():
        return Cell(plan.name, plan.seed, cell.read(plan.result)[0])
    if plan.failure.is_file():
        reason = plan.failure.read_text(encoding="utf-8").strip().splitlines()[-1]
        return Cell(plan.name, plan.seed, [], reason)
    return None


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
