"""`diffalign train`: the offline loop over a dataset, in the order things happen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffalign import config as cfg
from diffalign import records as store
from diffalign.configfile import dump
from diffalign.dataset import DERIVED, Dataset, Visit, check_records, visits
from diffalign.encoding import Cut
from diffalign.errors import UserError, nearest
from diffalign.families.base import family_class, load_family
from diffalign.methods import modality, needs, reads_paths, resolve
from diffalign.randomness import keyed
from diffalign.records import Record
from diffalign.registry import find_objective
from diffalign.textset import TextDataset
from diffalign.train.run import Run, checkpoints, find_checkpoint
from diffalign.train.step import StepResult, loss_step
from diffalign.train.update import Update
from diffalign.types import Batch, Method
from diffalign.weights import ROLES, Weights, add_lora


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
    if reads_paths(method):
        raise UserError(f"{method.name} learns from sampling trajectories; records hold none, it needs an online loop")

    family = load_family(config.model.family, config.model.path, config.model.device)
    if family.modality != "text":
        family.schedule = family.schedule_for(config.data.size)
    torch.manual_seed(settings.seed)
    lora = config.model.lora
    if lora is not None:
        add_lora(family.net, lora.rank, lora.alpha, lora.targets or family.lora_targets)
    if "values" in needed.reads:
        family.add_value_head()
    weights = Weights(family.net, lora=lora is not None, ema=settings.ema, others=_others(config.model))
    weights.prepare(needed.roles)
    optimizer = make_optimizer(weights.trainable(), config.optim)
    scheduler = make_scheduler(optimizer, settings.steps, config.optim.warmup, config.optim.decay)
    run = Run(Path(settings.dir), family.device, settings.precision, settings.seed, settings.keep)
    update = Update(weights.trainable(), optimizer, scheduler, run.sum_over_ranks, config.optim.clip)

    data = _encode(config.data, records, family, run.is_main)
    known = (*records[0].candidates[0].labels, *(DERIVED if family.modality == "text" else ()))
    labels = (*needed.labels, *(label for label in needed.optional if label in known))
    return Job(config, method, labels, family, weights, data, run, update)


def _others(model: cfg.ModelConfig) -> dict[str, torch.nn.Module]:
    """The frozen networks of roles that are not made from the policy: whole models, or adapters on this one."""
    nets = {}
    for role, folder in model.others.items():
        if role in ROLES:
            raise UserError(f"model.others: {role} is made from the trained network; give other roles")
        adapter = (Path(folder) / family_class(model.family).lora_file).is_file()
        path, lora = (model.path, folder) if adapter else (folder, None)
        nets[role] = load_family(model.family, path, model.device, lora).net
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
        cache = Path(data.cache) if data.cache else source.parent / "cache"
        cut = Cut(data.size, data.buckets, data.crop, data.flip)
        return Dataset(records, source.parent, family, cache, cut, advance)


def make_optimizer(parameters: list[torch.nn.Parameter], optim: cfg.OptimConfig) -> torch.optim.Optimizer:
    """A torch optimiser by name, any case."""
    base, unfit = torch.optim.Optimizer, ("LBFGS", "SparseAdam")  # these need a closure, or sparse gradients
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, base) and c is not base]
    known: dict[str, Callable[..., torch.optim.Optimizer]] = {
        c.__name__.lower(): c for c in classes if c.__name__ not in unfit
    }
    if optim.name.lower() not in known:
        raise UserError(f"optim.name: unknown optimiser {optim.name!r}{nearest(optim.name.lower(), known)}")
    try:
        return known[optim.name.lower()](parameters, lr=optim.lr, **optim.params)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim.params do not fit {optim.name}: {error}") from None


def make_scheduler(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, decay: str
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant, or linear or cosine decay to zero at ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[decay]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def check_start(result: StepResult, method: Method) -> None:
    """At step 0 policy and reference are one network: log-probs must agree to the bit, and the loss is known.

    Raises:
        UserError: a role runs through another numeric path, which would drown the signal for the whole run.
    """
    lp = result.log_probs
    for role, values in ((role, lp.by_role[role]) for role in ("reference", "average") if role in lp.by_role):
        worst = (values - lp.by_role["policy"].detach()).abs().max().item()
        if worst > 0.0:
            raise UserError(f"step 0: role {role!r} differs from the policy by {worst:.2e} in log-prob, expected 0")
    objective = find_objective(method.main.objective)
    if objective.identity is not None and not method.main.shaping and result.terms[0].weight > 0:
        value = float(result.terms[0].total.detach() / result.terms[0].weight)
        if abs(value - objective.identity) > 1e-5:
            known = f"{objective.name} is {objective.identity:.6f} at policy = reference"
            raise UserError(f"step 0: loss {value:.6f}, but {known}")


def check_health(step: int, metrics: dict[str, float], run: Run) -> None:
    """Stop at a non-finite loss, or when the first two steps move nothing; ``step`` counts from 1.

    Raises:
        UserError: with the last good checkpoint, which is never removed here.
    """
    if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
        # the weights that failed just now are those of the last step; a checkpoint of it is no way back
        good = [path for saved, path in checkpoints(run.folder).items() if saved < step - 1]
        way = f"resume from the last good checkpoint: --resume {good[-1]}" if good else "start again in a new run.dir"
        values = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        raise UserError(f"step {step}: {values}; lower optim.lr and {way}")
    if step <= 2 and metrics["grad_live"] == 0.0:
        raise UserError(
            f"step {step}: no trainable parameter received a gradient; check model.lora.targets and the rewards"
        )


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
    generators = [keyed(job.family.device, job.config.run.seed, *visit) for visit in chosen]
    return job.data.batch([visit.record for visit in chosen], generators, job.labels), generators


def _step(job: Job, step: int, micros: Sequence[Sequence[Visit]]) -> dict[str, float]:
    """One optimiser step; every check that can fail fails before the weights change."""
    rows = []
    for chosen in micros:
        batch, generators = _batch(job, chosen)
        precision, mean = job.run.autocast, job.run.mean_over_ranks
        result = loss_step(job.method, job.family, job.weights, batch, generators, autocast=precision, world_mean=mean)
        if step == 0:
            check_start(result, job.method)
        job.update.add(result, alone=job.config.run.accumulate == 1)
        rows.append(result.metrics)
    metrics = {**_mean(rows), **job.update.collect()}
    check_health(step + 1, metrics, job.run)
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
    with _progress(run.is_main) as progress:
        task = progress.add_task("train", total=settings.steps, completed=first, info="")
        for step, micros in zip(range(first, settings.steps), _schedule(job, first), strict=False):
            metrics = _step(job, step, micros)
            run.log(step + 1, metrics)
            last = step + 1 == settings.steps
            if last or (settings.save_every and (step + 1) % settings.save_every == 0):
                run.save(step + 1, job.weights, update.optimizer, update.scheduler)
            info = f"loss {metrics['loss']:.4f}  accuracy {metrics.get('reward/accuracy', math.nan):.2f}"
            progress.update(task, completed=step + 1, info=info)
    with job.weights.use("average" if settings.ema else "policy") as net:
        if job.weights.lora:
            run.finish("lora", lambda folder: job.family.save_lora(folder, net))
        else:
            run.finish(job.family.net_name, lambda folder: job.family.save_net(folder, net))


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
