"""`diffalign train`: the offline loop over a dataset, in the order things happen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from diffalign import config as cfg
from diffalign import records as store
from diffalign.bank import Bank, identity
from diffalign.bank import check_method as check_bank
from diffalign.configfile import dump
from diffalign.dataset import DERIVED, Dataset, Visit, check_records, check_segments, visits
from diffalign.encoding import Cut
from diffalign.errors import UserError
from diffalign.families.base import family_class
from diffalign.methods import modality, needs, reads_paths, resolve
from diffalign.models import open_model
from diffalign.networks import checkpoint, compile_blocks
from diffalign.randomness import keyed
from diffalign.records import Record
from diffalign.registry import find_objective
from diffalign.sharding import gathered
from diffalign.textset import TextDataset
from diffalign.train import health
from diffalign.train.optim import make_optimizer, make_scheduler
from diffalign.train.run import Run, checkpoints, find_checkpoint
from diffalign.train.step import StepResult, loss_step
from diffalign.train.update import Update
from diffalign.types import Batch, Method
from diffalign.weights import ROLES, Weights, add_lora, continue_lora

REMEMBERED = 1e-5
"""How far an error computed in another batch may be off, relatively."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything one training run is made of."""

    config: cfg.TrainConfig
    method: Method
    labels: tuple[str, ...]
    family: Any
    weights: Weights
    data: Dataset | TextDataset
    run: Run
    update: Update
    bank: Bank | None = None


def run(config: cfg.TrainConfig, dry_run: bool = False) -> Path:
    """Train and write the final weights; returns the run directory."""
    job = _prepare(config)
    if dry_run:
        _rehearse(job)
    else:
        _train(job)
    return job.run.folder


def _prepare(config: cfg.TrainConfig) -> Job:
    """Check the directory, the method and the data first, then load the model, then encode."""
    settings = config.run
    find_checkpoint(Path(settings.dir), settings.resume)
    if config.model.adapter is not None:
        raise UserError("model.adapter: training starts from the model alone; remove it, or merge it into the model")
    method = resolve(**config.method.model_dump())
    needed = needs(*method.terms)
    source = Path(config.data.records)
    records = list(store.read(source))
    check_records(records, method, str(source))
    check_family(method, config.model.family)
    if config.data.bank is not None:
        check_bank(method)
    if reads_paths(method):
        raise UserError(f"{method.name} learns from sampling trajectories; records hold none, it needs an online loop")

    check_together(config)
    family = _family(config)
    if "values" in needed.reads:
        family.add_value_head()
    run = Run(Path(settings.dir), family.device, settings.precision, settings.seed, settings.keep)
    weights = Weights(family.net, lora=config.model.lora is not None, ema=settings.ema, others=_others(config.model))
    weights.prepare(needed.roles)
    if settings.shard:
        weights.shard(family.blocks)
    if config.model.compile:  # last: a frozen copy cannot be made of compiled blocks
        for net in family.networks:
            compile_blocks(net, family.blocks)
    optimizer = make_optimizer(weights.trainable(), config.optim)
    scheduler = make_scheduler(optimizer, settings.steps, config.optim.warmup, config.optim.decay)
    update = Update(weights.trainable(), optimizer, scheduler, run.sum_over_ranks, config.optim.clip)

    known = (*records[0].candidates[0].labels, *(DERIVED if family.modality == "text" else ()))
    labels = (*needed.labels, *(label for label in needed.optional if label in known))
    if family.modality == "video":
        check_segments(records, source.parent, family, config.data.size, labels)
    data = _encode(config.data, records, family, run.is_main)
    if isinstance(data, Dataset):
        family.release()
    return Job(config, method, labels, family, weights, data, run, update, _bank(config, method, family, data))


def check_together(config: cfg.TrainConfig) -> None:
    """Refuse settings that exclude each other, before anything is loaded."""
    model, run = config.model, config.run
    if model.lora is None and (model.dtype, model.quant) != ("fp32", None):
        raise UserError("model.dtype, model.quant: weights that train stay in float32; set model.lora, or remove these")
    if model.dtype not in ("fp32", run.precision):
        raise UserError(f"model.dtype: {model.dtype} trains with run.precision={model.dtype} alone")
    if run.snapshots and model.lora is None:
        raise UserError("run.snapshots: keeps LoRAs, and this run trains full weights; keep more checkpoints instead")
    if run.shard and model.lora is not None:
        raise UserError("run.shard: is for full weights; a LoRA trains without it")
    if run.shard and config.data.bank is not None:
        raise UserError("run.shard: data.bank is named by whole weights; remove one of the two")


def _family(config: cfg.TrainConfig) -> Any:
    """The model, with the schedule of the size it trains on and the parameters that train."""
    family = open_model(config.model)
    if family.modality != "text":
        family.schedule = family.schedule_for(config.data.size)
    torch.manual_seed(config.run.seed)
    lora = config.model.lora
    if lora is not None and lora.start is not None:
        family.load_lora(Path(lora.start))
        continue_lora(family.net)
    elif lora is not None:
        add_lora(family.net, lora.rank, lora.alpha, lora.targets or family.lora_targets)
    if config.model.checkpointing:
        for net in family.networks:
            checkpoint(net)
    return family


def _bank(config: cfg.TrainConfig, method: Method, family: Any, data: Dataset | TextDataset) -> Bank | None:
    """The reference's known errors, if the config asks for them."""
    if config.data.bank is None or not isinstance(data, Dataset):
        return None
    settings = config.run
    kind = (family.name, family.schedule, settings.precision, config.model.dtype, config.model.quant)
    digest = identity(method, family.networks, *kind, data.digest, data.k, config.data.bank, settings.seed)
    return Bank(_cache(config.data) / f"bank-{digest}.safetensors", len(data), config.data.bank)


def _cache(data: cfg.DataConfig) -> Path:
    return Path(data.cache) if data.cache else Path(data.records).parent / "cache"


def _others(model: cfg.ModelConfig) -> dict[str, torch.nn.Module]:
    """The frozen networks of roles that are not made from the policy: whole models, or adapters on this one."""
    nets = {}
    for role, folder in model.others.items():
        if role in ROLES:
            raise UserError(f"model.others: {role} is made from the trained network; give other roles")
        adapter = (Path(folder) / family_class(model.family).lora_file).is_file()
        path, lora = (model.path, folder) if adapter else (folder, None)
        nets[role] = open_model(model.model_copy(update={"path": path, "adapter": lora})).net
    return nets


def check_family(method: Method, family: str) -> None:
    """Refuse a text method on a diffusion model and the other way round, before anything is loaded."""
    mine = "text" if family_class(family).modality == "text" else "diffusion"
    if modality(method) != mine:
        raise UserError(f"model.family: {family} is a {mine} model; {method.name} is for {modality(method)} models")


def _encode(data: cfg.DataConfig, records: list[Record], family: Any, visible: bool) -> Dataset | TextDataset:
    """The records as the family reads them."""
    source = Path(data.records)
    with _progress(visible) as progress:
        task = progress.add_task("encode", total=len(records), info="")

        def advance(done: int) -> None:
            progress.update(task, completed=done)

        if family.modality == "text":
            return TextDataset(records, family, data.max_tokens, advance)
        cut = Cut(data.size, data.buckets, data.crop, data.flip)
        return Dataset(records, source.parent, family, _cache(data), cut, data.dropout, advance)


def check_start(result: StepResult, method: Method, slack: float = 0.0) -> None:
    """At step 0 policy and reference are one network: log-probs must agree to the bit, and the loss is known.

    Args:
        slack: relative difference allowed to log-probs that were computed before, in another batch.

    Raises:
        UserError: a role runs through another numeric path, which would drown the signal for the whole run.
    """
    lp = result.log_probs
    for role, values in ((role, lp.by_role[role]) for role in ("reference", "average") if role in lp.by_role):
        worst = (values - lp.by_role["policy"].detach()).abs().max().item()
        if worst > slack * values.abs().max().item():
            raise UserError(f"step 0: role {role!r} differs from the policy by {worst:.2e} in log-prob, expected 0")
    objective = find_objective(method.main.objective)
    if objective.identity is not None and not method.main.shaping and result.terms[0].weight > 0:
        value = float(result.terms[0].total.detach() / result.terms[0].weight)
        if abs(value - objective.identity) > (1e-2 if slack else 1e-5):
            known = f"{objective.name} is {objective.identity:.6f} at policy = reference"
            raise UserError(f"step 0: loss {value:.6f}, but {known}")


def _schedule(job: Job, first: int) -> Iterator[list[list[Visit]]]:
    """From step ``first`` on: the records of every micro-step, of this process, of a step."""
    settings, run = job.config.run, job.run
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
    seed = job.config.run.seed, job.run.rollbacks  # after a rollback, other noise than that which failed
    generators = [keyed(job.family.device, *seed, *key) for key in keys]
    batch = job.data.batch([visit.record for visit in chosen], generators, job.labels)
    known = None if job.bank is None else job.bank.known(chosen)
    if known is not None:
        batch = replace(batch, known={"reference": known.to(job.family.device)})
    return batch, generators


def _step(job: Job, step: int, micros: Sequence[Sequence[Visit]]) -> dict[str, float]:
    """One optimiser step; every check that can fail fails before the weights change."""
    rows = []
    for chosen in micros:
        batch, generators = _batch(job, chosen)
        precision, mean = job.run.autocast, job.run.mean_over_ranks
        with job.run.kernels(_positions(batch)):
            result = loss_step(
                job.method, job.family, job.weights, batch, generators, autocast=precision, world_mean=mean
            )
            if step == 0:
                check_start(result, job.method, REMEMBERED if batch.known else 0.0)
            if job.bank is not None and not batch.known:
                job.bank.put(chosen, -result.log_probs.by_role["reference"] / result.log_probs.scale)
            job.update.add(result, alone=job.config.run.accumulate == 1)
        rows.append(result.metrics)
    metrics = {**_mean(rows), **job.update.collect()}
    health.check(step + 1, metrics)
    job.update.apply()
    job.weights.update_average()
    return metrics


def _train(job: Job) -> None:
    settings, run, update = job.config.run, job.run, job.update
    checkpoint = run.open(dump(job.config), settings.resume)
    first = run.restore(checkpoint, job.weights, update.optimizer, update.scheduler) if checkpoint else 0
    if first > settings.steps:
        raise UserError(f"{checkpoint}: is at step {first}, beyond run.steps={settings.steps}; raise run.steps")
    run.forget_after(first)
    if run.is_main:
        print(_plan(job))
    while True:
        try:
            _steps(job, first)
            break
        except health.Diverged as failure:
            first = _roll_back(job, failure)
    with _exported(job) as net:
        if job.weights.lora:
            run.finish("lora", lambda folder: job.family.save_lora(folder, net))
        else:
            plain = gathered(net) if settings.shard else net
            run.finish(job.family.net_name, lambda folder: job.family.save_net(folder, plain))


def _exported(job: Job) -> AbstractContextManager[nn.Module]:
    """The network with the weights that count in the end."""
    return job.weights.use("average" if job.config.run.ema else "policy")


def _positions(batch: Batch) -> int:
    """Tokens of a text, places of a latent."""
    return batch.x0.shape[3:].numel() if batch.x0.ndim > 3 else batch.x0.shape[-1]


def _steps(job: Job, first: int) -> None:
    """Train from step ``first`` to the end."""
    settings, run, update = job.config.run, job.run, job.update
    watcher = health.Health(run.past_metrics())
    with _progress(run.is_main) as progress:
        task = progress.add_task("train", total=settings.steps, completed=first, info="")
        for step, micros in zip(range(first, settings.steps), _schedule(job, first), strict=False):
            metrics = _step(job, step, micros)
            alarms = watcher.watch(metrics)
            run.log(step + 1, metrics, alarms)
            for name, text in alarms.items() if run.is_main else ():
                progress.console.print(f"step {step + 1}: {name}: {text}", style="yellow")
            last = step + 1 == settings.steps
            if last or (settings.save_every and (step + 1) % settings.save_every == 0):
                run.save(step + 1, job.weights, update.optimizer, update.scheduler)
                if settings.snapshots:
                    with _exported(job) as net:
                        run.snapshot(step + 1, partial(job.family.save_lora, net=net))
                if job.bank is not None:
                    job.bank.save(run.sum_over_ranks, write=run.is_main)
            info = f"loss {metrics['loss']:.4f}  accuracy {metrics.get('reward/accuracy', math.nan):.2f}"
            progress.update(task, completed=step + 1, info=info)


def _roll_back(job: Job, failure: health.Diverged) -> int:
    """The step of the last good checkpoint, loaded again, with half the learning rate from there on.

    Raises:
        UserError: no such checkpoint, or ``run.rollback`` is used up; it names the way back.
    """
    run = job.run
    # the weights that failed just now are those of the last step; a checkpoint of it is no way back
    good = [path for saved, path in checkpoints(run.folder).items() if saved < failure.step - 1]
    if not good or run.rollbacks >= job.config.run.rollback:
        way = f"resume from the last good checkpoint: --resume {good[-1]}" if good else "start again in a new run.dir"
        raise UserError(f"{failure} and {way}") from None
    times = run.rollbacks + 1
    first = run.restore(good[-1], job.weights, job.update.optimizer, job.update.scheduler)
    run.soften(times, job.update.optimizer, job.update.scheduler)
    run.forget_after(first)
    if run.is_main:
        print(f"{failure}: back to step {first} with half the learning rate ({times} of {job.config.run.rollback})")
    return first


def _rehearse(job: Job) -> None:
    """One real step; nothing is written but the cache."""
    settings = job.config.run
    samples = settings.steps * settings.batch * settings.accumulate * job.run.world
    print(_plan(job))
    print(f"would run {settings.steps} steps, {samples / len(job.data):.1f} epochs, into {settings.dir}")
    metrics = _step(job, 0, next(_schedule(job, 0)))
    print(f"one step: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3g}")


def _plan(job: Job) -> str:
    trained = sum(p.numel() for p in job.weights.trainable()) / 1e6
    cut = getattr(job.data, "truncated", 0)
    note = f"; {cut} candidates were cut to data.max_tokens" if cut else ""
    return f"{job.method.name}: {len(job.data)} records, {trained:.2f} M trained parameters{_strength(job)}{note}"


def _strength(job: Job) -> str:
    """Beta in its own unit and per summed squared error, which survives a change of resolution."""
    beta = job.method.main.params.get("beta")
    if beta is None:
        return ""
    if job.family.modality == "text":
        return f", beta {beta:g} per nat"
    d = job.data.batch([0], torch.Generator(job.family.device), ()).x0[0, 0].numel()
    return f", beta {beta:g} = {beta / d:.3g} per summed log-prob (D = {d})"


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over micro-steps of the metrics that every one of them reports."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _progress(visible: bool) -> Progress:
    counters = MofNCompleteColumn(), TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), *counters, TextColumn("{task.fields[info]}"))
    return Progress(*columns, disable=not visible)
