"""A model of an arena on the prompts it is judged on: its scores, how far it has moved, how much its samples differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import held_out, models, score
from diffalign.arena.plan import Plan
from diffalign.arena.scores import Snapshot
from diffalign.errors import UserError
from diffalign.generate import make_sampling
from diffalign.prompts import read_prompts
from diffalign.randomness import keyed, randn
from diffalign.records import Record
from diffalign.schedule import Rectified

KL_SAMPLES, KL_STEPS, NOISE_LEVEL = 128, 10, 0.7


def judged(plan: Plan, lora: Path | None, updates: int, evaluations: int, seconds: float, *, last: bool) -> Snapshot:
    """A snapshot of a run, or the base, on the prompts it is judged on.

    Args:
        plan: says what judges it, on what, and from which noise.
        lora: of the snapshot; None is the base.
        updates, evaluations, seconds: what it took.
        last: the end of the run, which is judged with guidance as well if ``plan`` wants that.

    Raises:
        UserError: the model is no flow, so that its distance from the base is not defined here.
    """
    how = plan.config.evaluate
    family: Any = models.load_model(
        plan.config.model.model_copy(update={"lora": None, "adapter": str(lora) if lora else None})
    )
    if not isinstance(family.schedule, Rectified):
        raise UserError(f"arena: compares flow models, by their stochastic sampler; {plan.config.model.family} is none")
    prompts = read_prompts(plan.prompts, how.seed)
    root = Path(plan.prompts.source).parent
    scorers = score.load_scorers(score.by_label([how.judge, *how.panel]))
    sampling: Any = make_sampling(how.sampling)
    found = held_out.judge(family, prompts, sampling, how.sampling.batch, how.seed, scorers, root)
    outcomes: dict[str, Any] = dict(found.outcomes)
    if last and plan.guided:
        only = {how.judge.key: scorers[how.judge.key]}
        guided: Any = make_sampling(how.guided)
        other = held_out.judge(family, prompts, guided, how.guided.batch, how.seed, only, root)
        outcomes["guided"] = other.outcomes[how.judge.key]
    some = slice(None, None, -(-len(prompts) // KL_SAMPLES))  # of every task: prompts come task by task
    kl = 0.0 if lora is None else divergence(family, found.samples[some], prompts[some])
    return Snapshot(updates, evaluations, seconds, outcomes, kl, diversity(found.samples, prompts))


def diversity(samples: Tensor, prompts: list[Record]) -> float:
    """Mean root mean square difference between two pictures of one prompt, in the range of their values.

    Args:
        samples: (N, ...) in [0, 1].
        prompts: their N records.
    """
    by_prompt: dict[str, list[int]] = {}
    for row, record in enumerate(prompts):
        by_prompt.setdefault(str(record.prompt), []).append(row)
    distances = []
    for rows in by_prompt.values():
        flat = samples[rows].flatten(1)
        if len(rows) > 1:
            distances.append((torch.pdist(flat) / flat.shape[1] ** 0.5).mean())
    return float(torch.stack(distances).mean()) if distances else 0.0


@torch.no_grad()
def divergence(family: Any, samples: Tensor, prompts: list[Record]) -> float:
    """KL of the model's sampling process from the base's, in nats per sample, both as the stochastic flow of Flow-GRPO.

    The steps of both are Gaussians of one deviation ``g sqrt(d)`` whose means differ by
    ``d (1 + a^2 / 2) (v - v_base)`` with ``g^2 = a^2 s / (1 - s)``, a = 0.7, d = 1 / 10, so the path measures are
    ``sum d (1 + a^2 / 2)^2 (1 - s) / (2 a^2 s) |v - v_base|^2`` apart, here with states noised from the model's own
    samples. The base is the network with its LoRA off.

    Args:
        family: a flow with a LoRA.
        samples: (N, ...) of the model, in [0, 1].
        prompts: their N records.
    """
    x0 = family.latents(*family.encode_media(samples.to(family.device) * 2 - 1))
    cond = family.encode_prompt([str(record.prompt) for record in prompts])
    total = x0.new_zeros(len(x0))
    for index in range(KL_STEPS):
        s = (index + 0.5) / KL_STEPS
        x_t = (1 - s) * x0 + s * randn(x0.shape, keyed(x0.device, index))
        t = x0.new_full((len(x0),), s)
        moved = family.predict(family.net, x_t, t, cond)
        family.net.disable_adapters()
        base = family.predict(family.net, x_t, t, cond)
        family.net.enable_adapters()
        weight = (1 + NOISE_LEVEL**2 / 2) ** 2 * (1 - s) / (2 * NOISE_LEVEL**2 * s) / KL_STEPS
        total += weight * (moved - base).square().flatten(1).sum(1)
    return float(total.mean())
