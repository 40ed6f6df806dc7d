"""`diffalign train`: the offline loop over a dataset, in the order things happen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign import config as cfg
from diffalign import records as store
from diffalign.anchors import is_due
from diffalign.bank import Bank, identity
from diffalign.bank import check_method as check_bank
from diffalign.dataset import DERIVED, Dataset, Visit, check_records, check_segments, visits
from diffalign.errors import UserError
from diffalign.methods import needs, reads_paths, resolve
from diffalign.randomness import keyed
from diffalign.textset import TextDataset
from diffalign.train import health
from diffalign.train.core import (
    Core,
    apply,
    build,
    check_family,
    check_model,
    check_start,
    finish,
    micro_step,
    progress,
    roll_back,
    save,
    start,
)
from diffalign.train.data import cache_folder, encode
from diffalign.train.run import find_checkpoint
from diffalign.train.tally import Cost
from diffalign.types import Batch, Method

REMEMBERED = 1e-5
"""How far an error computed in another batch may be off, relatively."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything one training run is made of."""

    core: Core
    labels: tuple[str, ...]
    data: Dataset | TextDataset
    bank: Bank | None = None


def run(config: cfg.TrainConfig, dry_run: bool = False) -> Path:
    """Train and write the final weights; returns the run directory."""
    job = _prepare(config)
    if dry_run:
        _rehearse(job)
    else:
        _train(job)
    return job.core.run.folder


def cost(config: cfg.TrainConfig) -> Cost:
    """Of a step, by taking one; nothing is written but the cache."""
    job = _prepare(config)
    return Cost(_step(job, 0, next(_schedule(job, 0)))["evaluations"], 1)


def _prepare(config: cfg.TrainConfig) -> Job:
    """Check the directory, the method and the data first, then load the model, then encode."""
    assert config.data is not None
    find_checkpoint(Path(config.run.dir), config.run.resume)
    method = resolve(**config.method.model_dump())
    needed = needs(*method.terms)
    source = Path(config.data.records)
    records = list(store.read(source))
    check_records(records, method, str(source))
    check_family(method, config.model.family)
    if config.data.bank is not None:
        check_bank(method)
    if config.data.bank is not None and config.run.shard:
        raise UserError("run.shard: data.bank is named by whole weights; remove one of the two")
    if reads_paths(method):
        raise UserError(f"{method.name} learns from sampling trajectories; records hold none: give `online` settings")
    check_model(config)
    core = build(config, method, needed.roles, ("average",) if config.run.ema else (), config.data.size)
    known = (*records[0].candidates[0].labels, *(DERIVED if core.family.modality == "text" else ()))
    labels = (*needed.labels, *(label for label in needed.optional if label in known))
    if core.family.modality == "video":
        check_segments(records, source.parent, core.family, config.data.size, labels)
    data = encode(config.data, records, core.family, core.run.is_main)
    if isinstance(data, Dataset):
        core.family.release()
    return Job(core, labels, data, _bank(config, method, core.family, data))


def _bank(config: cfg.TrainConfig, method: Method, family: Any, data: Dataset | TextDataset) -> Bank | None:
    """The reference's known errors, if the config asks for them."""
    assert config.data is not None
    if config.data.bank is None or not isinstance(data, Dataset):
        return None
    settings = config.run
    kind = (family.name, family.schedule, settings.precision, config.model.dtype, config.model.quant)
    digest = identity(method, family.networks, *kind, data.digest, data.k, config.data.bank, settings.seed)
    return Bank(cache_folder(config.data) / f"bank-{digest}.safetensors", len(data), config.data.bank)


def _schedule(job: Job, first: int) -> Iterator[list[list[Visit]]]:
    """From step ``first`` on: the records of every micro-step, of this process, of a step."""
    settings, run = job.core.config.run, job.core.run
    batches = visits(job.data.groups, settings.seed, settings.batch)
    each = settings.accumulate * run.world
    for _ in range(first * each):
        next(batches)
    while True:
        step = list(itertools.islice(batches, each))
        yield step[run.rank :: run.world]


def _batch(job: Job, chosen: Sequence[Visit]) -> tuple[Batch, list[torch.Generator]]:
    """A micro-batch, and all randomness of each of its records: a visit has the same on whatever rank it comes."""
    keys = chosen if job.bank is None else [job.bank.key(visit) for visit in chosen]
    seed = job.core.config.run.seed, job.core.run.rollbacks  # after a rollback, other noise than that which failed
    generators = [keyed(job.core.family.device, *seed, *key) for key in keys]
    batch = job.data.batch([visit.record for visit in chosen], generators, job.labels)
    known = None if job.bank is None else job.bank.known(chosen)
    if known is not None:
        batch = replace(batch, known={"reference": known.to(job.core.family.device)})
    return batch, generators


def _step(job: Job, step: int, micros: Sequence[Sequence[Visit]]) -> dict[str, float]:
    """One optimiser step; every check that can fail fails before the weights change."""
    core, rows = job.core, []
    for chosen in micros:
        batch, generators = _batch(job, chosen)
        result = micro_step(core, batch, generators, alone=len(micros) == 1)
        if step == 0:
            check_start(core, result, REMEMBERED if batch.known else 0.0)
        if job.bank is not None and not batch.known:
            job.bank.put(chosen, -result.log_probs.by_role["reference"] / result.log_probs.scale)
        rows.append(result.metrics)
    metrics = apply(core, step, rows)
    run = core.config.run
    if run.ema and is_due(step, run.ema_every):
        core.weights.refresh("average", run.ema)
    return metrics


def _train(job: Job) -> None:
    core = job.core
    first = start(core)
    if core.run.is_main:
        print(_plan(job))
    while True:
        try:
            _steps(job, first)
            break
        except health.Diverged as failure:
            first = roll_back(core, failure)
    finish(core)


def _steps(job: Job, first: int) -> None:
    """Train from step ``first`` to the end."""
    core, settings, run = job.core, job.core.config.run, job.core.run
    watcher = health.Health(run.past_metrics())
    with progress(run.is_main) as bar:
        task = bar.add_task("train", total=settings.steps, completed=first, info="")
        for step, micros in zip(range(first, settings.steps), _schedule(job, first), strict=False):
            metrics = _step(job, step, micros)
            alarms = watcher.watch(metrics)
            run.log(step + 1, metrics, alarms)
            for name, text in alarms.items() if run.is_main else ():
                bar.console.print(f"step {step + 1}: {name}: {text}", style="yellow")
            last = step + 1 == settings.steps
            if last or (settings.save_every and (step + 1) % settings.save_every == 0):
                save(core, step + 1)
                if job.bank is not None:
                    job.bank.save(run.sum_over_ranks, write=run.is_main)
            info = f"loss {metrics['loss']:.4f}  accuracy {metrics.get('reward/accuracy', math.nan):.2f}"
            bar.update(task, completed=step + 1, info=info)


def _rehearse(job: Job) -> None:
    """One real step; nothing is written but the cache."""
    settings = job.core.config.run
    samples = settings.steps * settings.batch * settings.accumulate * job.core.run.world
    print(_plan(job))
    print(f"would run {settings.steps} steps, {samples / len(job.data):.1f} epochs, into {settings.dir}")
    metrics = _step(job, 0, next(_schedule(job, 0)))
    print(f"one step: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3g}")


def _plan(job: Job) -> str:
    trained = sum(p.numel() for p in job.core.weights.trainable()) / 1e6
    cut = getattr(job.data, "truncated", 0)
    note = f"; {cut} candidates were cut to data.max_tokens" if cut else ""
    return f"{job.core.method.name}: {len(job.data)} records, {trained:.2f} M trained parameters{_strength(job)}{note}"


def _strength(job: Job) -> str:
    """Beta in its own unit and per summed squared error, which survives a change of resolution."""
    beta = job.core.method.main.params.get("beta")
    if beta is None:
        return ""
    if job.core.family.modality == "text":
        return f", beta {beta:g} per nat"
    d = job.data.batch([0], torch.Generator(job.core.family.device), ()).x0[0, 0].numel()
    return f", beta {beta:g} = {beta / d:.3g} per summed log-prob (D = {d})"
