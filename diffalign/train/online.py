"""Training on the policy's own samples: rollout -> score -> credit -> update, round after round."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign import credit
from diffalign.anchors import average_decay, is_due, linear_decay
from diffalign.errors import UserError
from diffalign.randomness import keyed
from diffalign.registry import find_objective
from diffalign.train import core as shared
from diffalign.train import health
from diffalign.train.feedback import requests
from diffalign.train.human import Nobody
from diffalign.train.job import Job, prepare
from diffalign.train.rollout import Group, Rollout, assemble
from diffalign.train.round import Item, Round, share
from diffalign.train.tally import Cost
from diffalign.types import Method

ORDER, TRAIN = 3, 4
"""What a key of random numbers is for."""
ON_POLICY = {"fp32": 1e-3, "bf16": 5e-2}
"""How far a log-ratio may be from 0 at the policy that sampled: the batches of rollout and training differ."""


def run(config: cfg.TrainConfig, dry_run: bool = False) -> Path:
    """Train and write the final weights; returns the run directory."""
    job = prepare(config)
    if dry_run:
        _rehearse(job)
    else:
        _train(job)
    return job.core.run.folder


def cost(config: cfg.TrainConfig) -> Cost:
    """Of a round, by beginning one without refills; nothing is written."""
    job = prepare(config)
    assert job.core.tally is not None
    job.settings = job.settings.model_copy(update={"refill": 0})
    made = make_round(job, 0)
    sampling = float(job.core.tally.take())
    update = _update(job, made, 0, next(made.parts(job.settings, _seed(job))))
    return Cost(sampling + job.settings.updates * update["evaluations"], job.settings.updates)


# --- a round --------------------------------------------------------------------------------------------------------


def _groups(job: Job, index: int, attempt: int) -> list[Group]:
    """All prompts of a round, in random order: distinct while there are enough."""
    wanted, count = job.settings.groups, len(job.prompts)
    chosen: list[int] = []
    for lap in itertools.count():
        if len(chosen) >= wanted:
            break
        generator = keyed(torch.device("cpu"), *_seed(job), ORDER, index, attempt, lap)
        chosen += torch.randperm(count, generator=generator).tolist()
    return [Group(job.prompts[n], position, attempt) for position, n in enumerate(chosen[:wanted])]


def _seed(job: Job) -> tuple[int, ...]:
    return job.core.config.run.seed, job.core.run.rollbacks


def make_round(job: Job, index: int) -> Round:
    """Sample, score, and sample again what taught nothing; what every process then holds of the round."""
    core, settings = job.core, job.settings
    begun = time.perf_counter()
    if job.feedback:
        job.feedback.begin(index)
    mine = _groups(job, index, 0)[core.run.rank :: core.run.world]
    rollout, rewards = _sampled(job, index, mine)
    for attempt in range(1, settings.refill + 1):
        reward = credit.total(rewards, _weights(job), settings.credit.combine)
        rows = credit.alike(reward).nonzero()[:, 0].tolist()
        if rows:
            others = _groups(job, index, attempt)
            other, found = _sampled(job, index, [others[rollout.groups[row].position] for row in rows])
            rollout = rollout.replaced(rows, other)
            rewards[rows] = found
    numbers = torch.tensor([[int(group.record.id)] for group in rollout.groups])
    names = [str(job.prompts[n].prompt) for n in _gathered(core, numbers)[:, 0].tolist()]
    made = Round(index, rollout, _gathered(core, rewards), _weights(job))
    seconds = dict(job.feedback.seconds) if job.feedback else {}
    if job.feedback:
        job.feedback.seconds.update(dict.fromkeys(seconds, 0.0))
    made.metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
    made.metrics["seconds/rollout"] = time.perf_counter() - begun - seconds.get("wait", 0.0)
    mine_of_all = slice(core.run.rank, None, core.run.world)
    return share(made, names, job.settings, core.method, mine_of_all, job.buffered)


def _weights(job: Job) -> Tensor:
    labels = job.feedback.labels if job.feedback else ("expert",)
    return torch.tensor([job.settings.reward.get(n, 0.0 if job.settings.reward else 1.0) for n in labels])


def _sampled(job: Job, index: int, groups: Sequence[Group]) -> tuple[Rollout, Tensor]:
    """Samples of some prompts and their rewards (G, S, M)."""
    core = job.core
    role = "behaviour" if "behaviour" in job.anchors else "policy"
    with ExitStack() as stack:
        net = stack.enter_context(core.weights.use(role))
        stack.enter_context(core.run.autocast())
        shape = core.family.latent_shape(job.settings.sampling.size)
        stack.enter_context(core.run.kernels(shared.places(shape)))
        cond = _condition(job, groups, index)
        chunks = []
        for chunk in job.roller(net, index, groups, cond):
            chunks.append(chunk)
            if job.feedback:
                samples = job.settings.samples
                job.feedback.submit([groups[row // samples].record for row in chunk.rows], chunk.latents)
    rollout = assemble(groups, job.settings.samples, cond, chunks)
    lead = (len(groups), job.settings.samples)
    return rollout, job.feedback.collect().unflatten(0, lead) if job.feedback else torch.zeros(*lead, 1)


def _condition(job: Job, groups: Sequence[Group], index: int) -> dict[str, Tensor]:
    """(G, ...)."""
    if job.experts:
        return {name: value[:, 0] for name, value in job.experts.rows(groups, index).cond.items()}
    family = job.core.family
    asked = requests(family, [group.record for group in groups], job.root, [0] * len(groups))
    return family.condition(asked, job.settings.sampling.size)


def _gathered(core: shared.Core, mine: Tensor) -> Tensor:
    """(G, ...) of all processes in the order of their places."""
    if core.run.world == 1:
        return mine
    found: Any = core.run.accelerator.gather(mine[None].to(core.run.device))
    return found.transpose(0, 1).flatten(0, 1).cpu()


# --- updates --------------------------------------------------------------------------------------------------------


def _train(job: Job) -> None:
    core = job.core
    first = shared.start(core)
    if first % job.settings.updates:
        raise UserError(f"run.resume: step {first} is within a round of online.updates={job.settings.updates}")
    _recall(job, first)
    if core.run.is_main:
        print(_plan(job))
    while True:
        try:
            _rounds(job, first)
            break
        except health.Diverged as failure:
            first = shared.roll_back(core, failure)
            _recall(job, first)
    shared.finish(core)


def _rounds(job: Job, first: int) -> None:
    """Train from update ``first``, the begin of a round, to the end."""
    core, settings, run = job.core, job.settings, job.core.config.run
    watcher = health.Health(core.run.past_metrics())
    with shared.progress(core.run.is_main) as bar:
        task = bar.add_task("train", total=run.steps, completed=first, info="")
        for index in range(first // settings.updates, job.rounds):
            if job.watch and job.watch.due(index) and job.watch.says_stop(index * settings.updates):
                return
            made = make_round(job, index)
            for step, part in enumerate(made.parts(settings, _seed(job)), index * settings.updates):
                metrics = _update(job, made, step, part)
                alarms = watcher.watch(metrics)
                core.run.log(step + 1, metrics, alarms)
                for name, text in alarms.items() if core.run.is_main else ():
                    bar.console.print(f"update {step + 1}: {name}: {text}", style="yellow")
                bar.update(task, completed=step + 1, info=f"reward {made.metrics['reward/mean']:.4f}")
            _end_round(job, index)
        if job.watch:
            job.watch.says_stop(run.steps)


def _update(job: Job, made: Round, step: int, part: Sequence[Item]) -> dict[str, float]:
    """One optimiser update on some items of a round."""
    core, size = job.core, job.core.config.run.batch
    begun = time.perf_counter()
    rows = []
    micros = [part[start : start + size] for start in range(0, len(part), size)]
    for micro in micros:
        batch = made.batch(micro, core.family.device, job.experts)
        generators = [keyed(core.family.device, *_seed(job), TRAIN, made.index, *item.key) for item in micro]
        result = shared.micro_step(core, batch, generators, alone=len(micros) == 1)
        if step == 0:
            shared.check_start(core, result)
        if not job.checked:
            _check_on_policy(job, result)
        rows.append({**result.metrics, **ratios(core.method, result.log_probs)})
    metrics = shared.apply(core, step, rows, teaches=made.teaches(part))
    run = core.config.run
    if run.ema and is_due(step, run.ema_every):
        core.weights.refresh("evaluation", average_decay(step, run.ema))
    first = step % job.settings.updates == 0
    return {**metrics, **(made.metrics if first else {}), "seconds/update": time.perf_counter() - begun}


def _check_on_policy(job: Job, result: Any) -> None:
    """The first micro-step after a rollout: the policy is still the one that sampled.

    Raises:
        UserError: its probability of its own samples is another one in training than in sampling.
    """
    job.checked = True
    lp = result.log_probs
    if "behaviour" not in lp.by_role or "behaviour" in job.core.weights.copies:
        return
    worst = float(lp.unit_ratio("behaviour").detach().abs().max())
    allowed = ON_POLICY[job.core.config.run.precision]
    if not worst <= allowed:
        raise UserError(
            f"the importance ratio of fresh samples is exp({worst:.2e}), expected exp(0) within {allowed:g} of the "
            "exponent: sampling and training run the network differently"
        )


def ratios(method: Method, lp: Any) -> dict[str, float]:
    """How far the policy has gone from the one that sampled, and the shares outside the range of a plain clip."""
    objective = find_objective(method.main.objective)
    if "behaviour" not in lp.by_role or objective.name == "nft":
        return {}
    ratio = lp.unit_ratio("behaviour").detach()
    found = {"ratio/log_abs": float(ratio.abs().mean())}
    if objective.name == "clipped_policy_gradient":  # others clip another ratio
        defaults = {name: parameter.default for name, parameter in inspect.signature(objective.fn).parameters.items()}
        low, high = ({**defaults, **method.main.params}[name] for name in ("clip_low", "clip_high"))
        found["ratio/above"] = float((ratio.exp() > 1 + high).float().mean())
        found["ratio/below"] = float((ratio.exp() < 1 - low).float().mean())
    return found


def _end_round(job: Job, index: int) -> None:
    """Let the anchors follow, and save where it is due."""
    core, run, settings = job.core, job.core.config.run, job.settings
    done = (index + 1) * settings.updates
    for role, how in job.anchors.items():
        if (index + 1) % how.every == 0:
            core.weights.refresh(role, linear_decay(done, how.rate, how.cap, how.start))
    before = done - settings.updates
    if done == run.steps or (run.save_every and done // run.save_every > before // run.save_every):
        shared.save(core, done, _state(job))


def _state(job: Job) -> dict[str, Any]:
    """What the loop itself remembers."""
    if job.buffered is None:
        return {}
    return {"buffer": {str(name): list(kept) for name, kept in job.buffered.history.items()}}


def _recall(job: Job, first: int) -> None:
    """Remember what was known at update ``first``, and nothing later."""
    if job.buffered is not None:
        job.buffered.restore(job.core.run.extra.get("buffer", {}))
    if job.watch:
        job.watch.restore(first)


def _rehearse(job: Job) -> None:
    """One real round; nothing is written."""
    print(_plan(job))
    if job.settings.source == "human":
        job.feedback = Nobody(job.settings.samples)
    made = make_round(job, 0)
    part = next(iter(made.parts(job.settings, _seed(job))))
    metrics = _update(job, made, 0, part)
    print(f"would run {job.rounds} rounds into {job.core.config.run.dir}")
    print(f"one update: loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3g}")


def _plan(job: Job) -> str:
    settings = job.settings
    trained = sum(p.numel() for p in job.core.weights.trainable()) / 1e6
    each = f"{settings.groups} prompts x {settings.samples} samples"
    return f"{job.core.method.name}: {job.rounds} rounds of {each}, {trained:.2f} M trained parameters"
