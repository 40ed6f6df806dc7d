"""What the cells of an arena say: its results and their page."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from diffalign import config as cfg
from diffalign.arena import cell, page
from diffalign.arena.checks import weight
from diffalign.arena.plan import Plan, planned, trials
from diffalign.arena.results import FILE, ArenaResults, Entry, Label, write
from diffalign.arena.scores import Cell, Snapshot
from diffalign.arena.summary import summarise
from diffalign.arena.tuning import tuned
from diffalign.config.arena import BASE
from diffalign.machine import described
from diffalign.prompts import read_prompts


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
        trained=next(one.key for one in how.panel if weight(config, one)),
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


def _labels(config: cfg.ArenaConfig) -> dict[str, Label]:
    """The columns of the table."""
    how = config.evaluate
    found = {}
    for one in (how.judge, *how.panel):
        share = weight(config, one)
        trained = f", weight {share:g} in the reward on training prompts" if share else ", not in the reward"
        found[one.key] = Label(title=f"held-out {one.key}", about=f"{_sampled(how.sampling)}{trained}")
    return {**found, "guided": Label(title="guided", about=f"{how.judge.key}, {_sampled(how.guided)}")}


def _sampled(how: cfg.SamplingConfig) -> str:
    return f"{how.steps} steps, {'no guidance' if how.guidance == 1 else f'guidance {how.guidance:g}'}"


def _trained_on(config: cfg.ArenaConfig) -> set[str]:
    """Prompts that some method saw in training or tuning."""
    rounds = [{**config.rounds.model_dump(), **entry.online} for entry in config.entries.values() if entry.online]
    own = [cfg.PromptsConfig.model_validate(one["prompts"]) for one in rounds if one["prompts"]]
    named = {repr(one): one for one in (config.pool_prompts, *filter(None, [config.rounds.prompts]), *own)}
    seeds = (*config.seeds, config.tuning.seed)
    found = {str(record.prompt) for source in named.values() for seed in seeds for record in read_prompts(source, seed)}
    return found | {str(record.prompt) for record in read_prompts(config.tuning.prompts, config.evaluate.seed)}


def _found(config: cfg.ArenaConfig) -> tuple[list[Entry], list[Cell], list[str]]:
    """The entries that have run, their cells, and the titles of the others."""
    entries, cells, waiting = [], [], []
    for name, entry in config.entries.items():
        plans = [planned(config, name, seed) for seed in config.seeds]
        own = [found for found in map(_cell, plans) if found is not None]
        if not own:
            waiting += [entry.title] if not config.only or name in config.only else []
            continue
        rates = [rate for _, rate in own if rate is not None]
        tuning = tuned(trials(config, name))
        cells += [found for found, _ in own]
        entries.append(
            Entry(
                name=name,
                title=entry.title,
                group=entry.group,
                note=entry.note,
                learning_rate=rates[0] if rates else tuning.rate,
                tuning=tuning.trials,
            )
        )
    return entries, cells, waiting


def _cell(plan: Plan) -> tuple[Cell, float | None] | None:
    """What became of a cell and its learning rate, None if it failed; None if it was not run."""
    if plan.result.is_file():
        found, rate = cell.read(plan.result)
        return Cell(plan.name, plan.seed, found), rate
    if plan.failure.is_file():
        reason = plan.failure.read_text(encoding="utf-8").strip().splitlines()[-1]
        return Cell(plan.name, plan.seed, [], reason), None
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
