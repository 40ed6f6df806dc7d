"""What both training loops are made of: the model with its roles, the optimiser, the run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from diffalign import config as cfg
from diffalign.config.file import dump
from diffalign.errors import UserError
from diffalign.families.base import family_class
from diffalign.media import Size
from diffalign.methods import modality, needs
from diffalign.models import open_model
from diffalign.networks import checkpoint, compile_blocks
from diffalign.registry import find_objective
from diffalign.sharding import gathered
from diffalign.train import health
from diffalign.train.optim import make_optimizer, make_scheduler
from diffalign.train.run import Run, checkpoints
from diffalign.train.step import StepResult, loss_step
from diffalign.train.tally import Tally
from diffalign.train.update import Update
from diffalign.types import Batch, Method, Role
from diffalign.weights import ROLES, Weights, add_lora, continue_lora


@dataclass(frozen=True, slots=True)
class Core:
    """One training run, whatever it trains on."""

    config: cfg.TrainConfig
    method: Method
    family: Any
    weights: Weights
    run: Run
    update: Update
    tally: Tally | None
    """None for text."""


def build(
    config: cfg.TrainConfig, method: Method, roles: Sequence[Role], copies: Sequence[Role], size: Size | None
) -> Core:
    """Open the run, load the model with its roles, make the optimiser.

    Args:
        roles: that weights have to play.
        copies: those of them that are copies of what trains.
        size: of the samples that are trained on.
    """
    settings = config.run
    family = _family(config, size)
    if "values" in needs(*method.terms).reads:
        family.add_value_head()
    run = Run(Path(settings.dir), family.device, settings.precision, settings.seed, settings.keep)
    weights = Weights(family.net, lora=config.model.lora is not None, copies=copies, others=_others(config.model))
    weights.prepare(roles)
    if settings.shard:
        weights.shard(family.blocks)
    if config.model.compile:  # last: a frozen copy cannot be made of compiled blocks
        for net in family.networks:
            compile_blocks(net, family.blocks)
    optimizer = make_optimizer(weights.trainable(), config.optim)
    scheduler = make_scheduler(optimizer, settings.steps, config.optim.warmup, config.optim.decay)
    update = Update(weights.trainable(), optimizer, scheduler, run.sum_over_ranks, config.optim.clip)
    return Core(config, method, family, weights, run, update, None if family.modality == "text" else Tally(family))


def check_model(config: cfg.TrainConfig) -> None:
    """Refuse settings of model and run that exclude each other, before anything is loaded."""
    model, run = config.model, config.run
    if model.adapter is not None:
        raise UserError("model.adapter: training starts from the model alone; remove it, or merge it into the model")
    if model.lora is None and (model.dtype, model.quant) != ("fp32", None):
        raise UserError("model.dtype, model.quant: weights that train stay in float32; set model.lora, or remove these")
    if model.dtype not in ("fp32", run.precision):
        raise UserError(f"model.dtype: {model.dtype} trains with run.precision={model.dtype} alone")
    if run.snapshots and model.lora is None:
        raise UserError("run.snapshots: keeps LoRAs, and this run trains full weights; keep more checkpoints instead")
    if run.shard and model.lora is not None:
        raise UserError("run.shard: is for full weights; a LoRA trains without it")


def _family(config: cfg.TrainConfig, size: Size | None) -> Any:
    """The model, with the schedule of the size it trains on and the parameters that train."""
    family = open_model(config.model)
    if family.modality != "text":
        family.schedule = family.schedule_for(size)
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


def check_start(core: Core, result: StepResult, slack: float = 0.0) -> None:
    """At step 0 policy and reference are one network: log-probs must agree to the bit, and the loss is known.

    What sampled is compared only where it runs again: predictions that were stored come from another batch.

    Args:
        slack: relative difference allowed to log-probs that were computed before, in another batch.

    Raises:
        UserError: a role runs through another numeric path, which would drown the signal for the whole run.
    """
    lp, method = result.log_probs, core.method
    for role in sorted(lp.by_role.keys() & {"reference", *core.weights.copies}):
        values = lp.by_role[role]
        worst = (values - lp.by_role["policy"].detach()).abs().max().item()
        if worst > slack * values.abs().max().item():
            raise UserError(f"step 0: role {role!r} differs from the policy by {worst:.2e} in log-prob, expected 0")
    objective = find_objective(method.main.objective)
    if objective.identity is not None and not method.main.shaping and result.terms[0].weight > 0:
        value = float(result.terms[0].total.detach() / result.terms[0].weight)
        if abs(value - objective.identity) > (1e-2 if slack else 1e-5):
            known = f"{objective.name} is {objective.identity:.6f} at policy = reference"
            raise UserError(f"step 0: loss {value:.6f}, but {known}")


def micro_step(core: Core, batch: Batch, generators: Sequence[torch.Generator], *, alone: bool) -> StepResult:
    """The loss of some records, back-propagated.

    Args:
        generators: all randomness, one per record.
        alone: it is the only micro-step of its step.
    """
    run = core.run
    with run.kernels(positions(batch)):
        result = loss_step(
            core.method,
            core.family,
            core.weights,
            batch,
            generators,
            autocast=run.autocast,
            world_mean=run.mean_over_ranks,
        )
        core.update.add(result, alone=alone)
    return result


def apply(core: Core, step: int, rows: Sequence[dict[str, float]], *, teaches: bool = True) -> dict[str, float]:
    """End a step: check it, then change the weights.

    Args:
        step: counted from 0.
        rows: metrics of its micro-steps.
        teaches: whether its data prefer anything, on this process.

    Returns:
        Its metrics; ``evaluations`` are a diffusion network's evaluations since the last step, of all processes.

    Raises:
        health.Diverged: the loss or the gradient is not finite.
    """
    metrics = {**mean(rows), **core.update.collect()}
    if core.tally is not None:
        taken = torch.tensor(float(core.tally.take()), device=core.run.device)
        metrics["evaluations"] = float(core.run.sum_over_ranks(taken))
    health.check(step + 1, metrics)
    if step < 2 and core.run.sum_over_ranks(torch.tensor(float(teaches), device=core.run.device)):
        health.check_moves(step + 1, metrics)
    core.update.apply()
    return metrics


def ends_with(core: Core) -> Role:
    """The role whose weights count in the end."""
    if core.config.run.ema is None:
        return "policy"
    return "evaluation" if "evaluation" in core.weights.copies else "average"


def exported(core: Core) -> AbstractContextManager[nn.Module]:
    """The network with the weights that count in the end."""
    return core.weights.use(ends_with(core))


def start(core: Core) -> int:
    """Enter the run directory; the step to go on from."""
    settings, run = core.config.run, core.run
    checkpoint = run.open(dump(core.config), settings.resume)
    first = run.restore(checkpoint, core.weights, core.update.optimizer, core.update.scheduler) if checkpoint else 0
    if first > settings.steps:
        raise UserError(f"{checkpoint}: is at step {first}, beyond run.steps={settings.steps}; raise run.steps")
    run.forget_after(first)
    return first


def save(core: Core, step: int, extra: Mapping[str, Any] | None = None) -> None:
    """A checkpoint, and with ``run.snapshots`` the LoRA as it would be final.

    Args:
        extra: what the loop itself remembers, of plain values.
    """
    core.run.save(step, core.weights, core.update.optimizer, core.update.scheduler, extra or {})
    if core.config.run.snapshots:
        with exported(core) as net:
            core.run.snapshot(step, partial(core.family.save_lora, net=net))


def finish(core: Core) -> None:
    """Write the final weights: the moving average's where there is one, else the policy's."""
    with exported(core) as net:
        if core.weights.lora:
            core.run.finish("lora", lambda folder: core.family.save_lora(folder, net))
        else:
            plain = gathered(net) if core.config.run.shard else net
            core.run.finish(core.family.net_name, lambda folder: core.family.save_net(folder, plain))


def positions(batch: Batch) -> int:
    """Tokens of a text, places of a latent."""
    return places(batch.x0.shape[2:]) if batch.x0.ndim > 3 else batch.x0.shape[-1]


def places(latent: Sequence[int]) -> int:
    """Of a latent of shape (C, ...)."""
    return math.prod(latent[1:])


def roll_back(core: Core, failure: health.Diverged) -> int:
    """The step of the last good checkpoint, loaded again, with half the learning rate from there on.

    Raises:
        UserError: no such checkpoint, or ``run.rollback`` is used up; it names the way back.
    """
    run = core.run
    # the weights that failed just now are those of the last step; a checkpoint of it is no way back
    good = [path for saved, path in checkpoints(run.folder).items() if saved < failure.step - 1]
    if not good or run.rollbacks >= core.config.run.rollback:
        way = f"resume from the last good checkpoint: --resume {good[-1]}" if good else "start again in a new run.dir"
        raise UserError(f"{failure} and {way}") from None
    times = run.rollbacks + 1
    first = run.restore(good[-1], core.weights, core.update.optimizer, core.update.scheduler)
    run.soften(times, core.update.optimizer, core.update.scheduler)
    run.forget_after(first)
    if run.is_main:
        print(f"{failure}: back to step {first} with half the learning rate ({times} of {core.config.run.rollback})")
    return first


def mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over micro-steps of the metrics that every one of them reports."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def progress(visible: bool) -> Progress:
    """A bar for steps; its tasks have a field ``info``."""
    counters = MofNCompleteColumn(), TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), *counters, TextColumn("{task.fields[info]}"))
    return Progress(*columns, disable=not visible)
