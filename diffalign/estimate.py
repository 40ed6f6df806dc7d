"""Run every role on a draw and turn the outputs into log-probs: the only caller of a training forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.likelihood import denoising_error, token_kl, token_log_probs, wide
from diffalign.objectives.matching import branch_sizes
from diffalign.samplers import guided
from diffalign.schedule import Discrete
from diffalign.transitions import FLOW_STEPS, Step, ddim
from diffalign.types import Batch, Condition, DiffusionFamily, Draw, LogProbs, Role, Schedule, TextFamily, Weights

Autocast = Callable[[], AbstractContextManager]


def flatten_condition(cond: Condition, k: int) -> Condition:
    """(B, K or 1, ...) -> (B K, ...), repeating what the candidates of a record share."""
    return {name: value.expand(-1, k, *value.shape[2:]).flatten(0, 1) for name, value in cond.items()}


def denoising(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    draw: Draw,
    roles: Sequence[Role],
    autocast: Autocast = nullcontext,
    *,
    scale: float = 0.5,
    frames: bool = False,
    summed: bool = False,
) -> LogProbs:
    """``-scale * mean((prediction - target)^2)`` of every role, all candidates in one forward.

    Frozen roles run first and without graph, so that their activations are gone before the policy's are kept. All
    roles run in the network's current train/eval mode and under the same autocast: a difference there would drown the
    signal (at beta 5000 an error difference of 4e-4 moves the logit by 1).

    Args:
        roles: roles beside the policy.
        autocast: makes the precision context of the run.
        scale: 1/2 is the Gaussian one half of the published Diffusion-DPO code, 1 leaves it out.
        frames: keep the frame axis of a video latent (B, K, C, F, H, W) as units.
        summed: sum the squared errors of a unit instead of averaging them, for betas published in that unit (DDO).

    Returns:
        LogProbs (B, K, U) in float32 or better, the gap to every role that was run (errors that the batch knows cost no
        forward), and the times as ``extra["t"]``. Where the draw
        repeats times, (B, K, T), these are the units.
    """
    predictions = _predictions(family, weights, batch, draw, [r for r in roles if r not in batch.known], autocast)
    if summed:
        scale *= draw.target.shape[draw.t.ndim :].numel() / (draw.target.shape[-3] if frames else 1)
    lp = _errors(predictions, batch, draw, scale, (-3,) if frames else ())
    known = {role: -scale * batch.known[role].to(lp.mask) for role in roles if role in batch.known}
    return replace(lp, by_role={**lp.by_role, **known})


def branches(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    draw: Draw,
    roles: Sequence[Role],
    autocast: Autocast = nullcontext,
    *,
    mix: float = 1.0,
) -> LogProbs:
    """``denoising`` at scale 1, and what DiffusionNFT's branches ``b v + (1 - b) v_old``, ``(1 + b) v_old - b v`` need.

    Args:
        roles: roles beside the policy, ``behaviour`` among them.
        autocast: makes the precision context of the run.
        mix: b, how far a branch goes from the behaviour policy. 1 for GenEval and single preference rewards, 0.1 for
            OCR and several rewards in the release (whose ``config.beta`` it is).

    Returns:
        LogProbs with ``t``, ``mix`` and the branches' mean absolute errors ``positive`` and ``negative`` as extra.
    """
    if isinstance(family.schedule, Discrete):
        raise UserError("estimate 'branches' reads velocities of a flow; this model's schedule is a discrete one")
    predictions = _predictions(family, weights, batch, draw, roles, autocast)
    lp = _errors(predictions, batch, draw, 1.0, ())
    sizes = branch_sizes(predictions["policy"], predictions["behaviour"], draw.target, mix, draw.t.ndim)
    sizes = {name: size.reshape(lp.mask.shape) for name, size in sizes.items()}
    return replace(lp, extra={**lp.extra, "mix": torch.full_like(lp.mask, mix), **sizes})


def transition(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    draw: Draw,
    roles: Sequence[Role],
    autocast: Autocast = nullcontext,
    *,
    kind: Literal["ddim", "flow_sde", "dance", "cps"] = "flow_sde",
    noise_level: float | None = None,
    guidance: float = 1.0,
    detach_uncond: bool = False,
) -> LogProbs:
    """Log-probability of stored sampling steps under every role, a mean over latent elements.

    The role ``behaviour`` costs no forward: its prediction was stored with the path, guidance included.

    Args:
        draw: from ``draws.transition``.
        roles: roles beside the policy.
        autocast: makes the precision context of the run; steps are computed in float32 or better.
        kind: the step the sampler took; ddim for discrete schedules, the others for flows.
        noise_level: as the sampler had it; None for the published default of ``kind``.
        guidance: as the sampler had it: classifier-free guidance in every role's forward, over the family's interval
            of times. 5 for D3PO and DDPO, 4.5 for Flow-GRPO; 1 runs the branch of the prompt alone.
        detach_uncond: no gradient through the branch of the empty prompt, as in Flow-GRPO's first release (July 2025);
            later ones, D3PO and DDPO train both.

    Returns:
        LogProbs (B, K, U), gaps of step means, and ``t``, ``std``, ``dt`` and ``diffusion`` as extra.
    """
    if draw.t_prev is None or draw.x_prev is None:
        raise UserError("estimate 'transition' needs the stored steps that draws.transition reads")
    run = [role for role in roles if role != "behaviour"]
    predictions = _predictions(family, weights, batch, draw, run, autocast, guidance, detach_uncond)
    if "behaviour" in roles:
        predictions["behaviour"] = draw.target
    step = step_of(family.schedule, kind, noise_level)
    steps = {role: step(prediction, draw.x_t, draw.t, draw.t_prev) for role, prediction in predictions.items()}
    by_role = {role: taken.log_prob(draw.x_prev) for role, taken in steps.items()}
    policy = steps["policy"]
    gap = {role: policy.gap(taken) for role, taken in steps.items() if role != "policy"}
    extra = {"t": draw.t, "std": policy.std, "dt": draw.t - draw.t_prev, "diffusion": policy.diffusion}
    return LogProbs(by_role, torch.ones_like(by_role["policy"]), gap, present=batch.present, extra=extra)


def step_of(
    schedule: Schedule, kind: str, noise_level: float | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Step]:
    """``(prediction, x_t, t, t_next) -> Step``, the same one in a rollout and in training on it.

    Raises:
        UserError: the kind is for another sort of schedule.
    """
    options: dict[str, Any] = {} if noise_level is None else {"noise_level": noise_level}
    if isinstance(schedule, Discrete) != (kind == "ddim"):
        raise UserError(
            f"transition {kind!r} does not fit the schedule: ddim is for discrete ones, the others for flows"
        )
    if not isinstance(schedule, Discrete):
        return partial(FLOW_STEPS[kind], **options)
    table = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)

    def step(prediction: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> Step:
        before, after = (table.to(time.device)[schedule.native(time)] for time in (t, t_next))
        return ddim(prediction, x_t, before, after, parametrisation=schedule.prediction, **options)

    return step


def _predictions(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    draw: Draw,
    roles: Sequence[Role],
    autocast: Autocast,
    guidance: float = 1.0,
    detach_uncond: bool = False,
) -> dict[Role, Tensor]:
    """What every role predicts, like ``draw.x_t``, in float32 or better; frozen roles first and without graph."""
    lead, dims = draw.t.shape, draw.t.ndim
    x_t, t = draw.x_t.flatten(0, dims - 1), draw.t.flatten()
    cond = flatten_condition(batch.cond, lead[1])
    if dims > 2:
        cond = {name: value.repeat_interleave(lead[2], 0) for name, value in cond.items()}

    empty, interval = cond, (0.0, 1.0)
    if guidance != 1.0:
        empty, interval = family.unconditional(cond), family.guidance_interval

    def predict(role: Role) -> Tensor:
        with weights.use(role) as net, autocast():
            forward = guided(family, net, cond, empty, guidance, interval, detach_uncond=detach_uncond)
            return wide(forward(x_t, t)).unflatten(0, lead)

    predictions: dict[Role, Tensor] = {}
    with torch.no_grad():
        for role in roles:
            predictions[role] = predict(role)
    predictions["policy"] = predict("policy")
    return predictions


def _errors(predictions: dict[Role, Tensor], batch: Batch, draw: Draw, scale: float, keep: tuple[int, ...]) -> LogProbs:
    """Log-probs and gaps from predictions; repeated times become units."""
    kept = (*((2,) if draw.t.ndim > 2 else ()), *keep)
    policy = predictions["policy"]
    by_role = {role: -scale * denoising_error(p, draw.target, kept) for role, p in predictions.items()}
    gap = {role: denoising_error(policy, p, kept) for role, p in predictions.items() if role != "policy"}
    log_prob = by_role["policy"]
    mask = torch.ones_like(log_prob) if batch.mask is None else batch.mask.to(log_prob).expand_as(log_prob)
    t = draw.t.reshape(*draw.t.shape[:2], -1, 1)
    t = t.expand(-1, -1, -1, log_prob.shape[2] // t.shape[2]).flatten(2)
    return LogProbs(by_role, mask, gap, scale, batch.present, {"t": t})


def tokens(
    family: TextFamily,
    weights: Weights,
    batch: Batch,
    draw: None,
    roles: Sequence[Role],
    autocast: Autocast = nullcontext,
    *,
    packed: bool = False,
    mismatched: bool = False,
    values: bool = False,
    exact_kl: bool = False,
) -> LogProbs:
    """Log-probability in nats of every predicted token under every role.

    The vocabulary is only looked at from the first token that counts, so that long shared prompts cost no logits.

    Args:
        batch: ids ``x0`` (B, K, L), ``cond["attention"]`` (B, K, L), ``mask`` (B, K, L - 1).
        draw: None, there is no noise.
        roles: roles beside the policy; they run first and without graph.
        autocast: makes the precision context of the run.
        packed: without padding: all sequences in one row, told apart by their positions. It pays with a flash
            attention backend and ragged lengths; others compute the full square.
        mismatched: also the log-ratio to the reference of every prompt with the completion of the next record, as
            ``extra["mismatched"]`` (B, K): KTO's reference point, which takes two records or more.
        values: also the value head's output before every token, as ``extra["values"]``, with gradient.
        exact_kl: also KL(policy || reference) and KL(reference || policy) over the vocabulary before every token, as
            ``extra["kl"]`` and ``extra["forward_kl"]``, with gradient; it keeps both networks' logits.

    Returns:
        LogProbs (B, K, L - 1) in float32 or better; units before the first counted one hold 0 and are masked.
    """
    if mismatched and len(batch.x0) < 2:
        raise UserError(
            "estimate.mismatched pairs prompts with completions of other records: set run.batch to 2 or more"
        )
    extra: dict[str, Tensor] = {}

    def run(of: Batch, role: Role, head: bool = False) -> Outputs:
        with weights.use(role) as net, autocast():
            found = (_packed if packed else _padded)(family, net, of, head)
        return found if exact_kl else found._replace(logits=None)  # the largest tensor there is: free it

    with torch.no_grad():
        if mismatched:
            swapped = next_completions(batch)
            both = {role: run(swapped, role).log_probs for role in ("policy", "reference")}
            extra["mismatched"] = LogProbs(both, _mask(swapped)).ratio()
        frozen = {role: run(batch, role) for role in dict.fromkeys((*roles, *(("reference",) if exact_kl else ())))}
    policy = run(batch, "policy", values)
    by_role = {**{role: frozen[role].log_probs for role in roles}, "policy": policy.log_probs}
    if policy.values is not None:
        extra["values"] = policy.values
    if exact_kl:
        reference, mine = frozen["reference"].logits, policy.logits
        assert reference is not None
        assert mine is not None
        extra["kl"] = policy.aligned(token_kl(mine, reference))
        extra["forward_kl"] = policy.aligned(token_kl(reference, mine))
    return LogProbs(by_role, _mask(batch), present=batch.present, extra=extra)


class Outputs(NamedTuple):
    """What a network says about a batch of tokens."""

    log_probs: Tensor
    """(B, K, L - 1)."""
    logits: Tensor | None
    """Of whatever places it was run on, (..., V), while somebody reads them."""
    values: Tensor | None
    """(B, K, L - 1), if asked for."""
    aligned: Callable[[Tensor], Tensor]
    """From something per place of ``logits`` to (B, K, L - 1)."""


def _mask(batch: Batch) -> Tensor:
    assert batch.mask is not None
    return batch.mask


def next_completions(batch: Batch) -> Batch:
    """The same prompts, each with the completion of the next record that has one (the first's for the last).

    Args:
        batch: of tokens; a prompt ends before the first token that counts, a completion begins there.
    """
    attention, mask = batch.cond["attention"], _mask(batch)
    here = torch.ones(mask.shape[:2]) if batch.present is None else batch.present
    rows = [(b, k) for b in range(len(mask)) for k in range(mask.shape[1])]
    ends = attention.sum(-1)
    starts = torch.where(mask.any(-1), mask.argmax(-1) + 1, ends)
    made = []
    for b, k in rows:
        after = [(b + step) % len(mask) for step in range(1, len(mask) + 1)]
        other = next((j for j in after if here[j, k] > 0), b)
        start, begin, end = int(starts[b, k]), int(starts[other, k]), int(ends[other, k])
        head, tail = batch.x0[b, k, :start], batch.x0[other, k, begin:end]
        made.append(
            (torch.cat([head, tail]), torch.cat([mask[b, k, : start - 1] * 0, mask[other, k, begin - 1 : end - 1]]))
        )
    width = max(len(ids) for ids, _ in made)
    ids = torch.stack([F.pad(ids, (0, width - len(ids))) for ids, _ in made])
    counts = torch.stack([F.pad(counted, (0, width - 1 - len(counted))) for _, counted in made])
    real = torch.stack([F.pad(torch.ones_like(ids), (0, width - len(ids))) for ids, _ in made])
    shape = mask.shape[:2]
    cond = {"attention": real.unflatten(0, shape)}
    return replace(batch, x0=ids.unflatten(0, shape), cond=cond, mask=counts.unflatten(0, shape))


def _flat(batch: Batch) -> tuple[Tensor, Tensor, int]:
    """Ids and attention (B K, L), and the first position that predicts a token that counts in any row."""
    counted = _mask(batch).flatten(0, 1).any(0).nonzero()
    first = int(counted[0]) if len(counted) else batch.x0.shape[-1] - 2
    return batch.x0.flatten(0, 1), batch.cond["attention"].flatten(0, 1), first


def _padded(family: TextFamily, net: nn.Module, batch: Batch, values: bool) -> Outputs:
    """Every sequence padded to the longest; 0 before the first unit that counts."""
    ids, attention, first = _flat(batch)
    logits, value = family.forward(net, ids, attention, None, ids.shape[1] - first, values)
    logits = logits[:, :-1]

    def aligned(found: Tensor) -> Tensor:
        return F.pad(found, (first, 0)).unflatten(0, batch.x0.shape[:2])

    found = token_log_probs(logits, ids[:, first + 1 :])
    return Outputs(aligned(found), logits, None if value is None else aligned(value[:, :-1]), aligned)


def _packed(family: TextFamily, net: nn.Module, batch: Batch, values: bool) -> Outputs:
    """The same from one row without padding; padded places hold 0."""
    ids, attention, _ = _flat(batch)
    real = attention > 0
    positions = (attention.cumsum(1) - 1)[real][None]
    logits, value = family.forward(net, ids[real][None], None, positions, int(real.sum()), values)

    def aligned(found: Tensor) -> Tensor:
        spread = torch.zeros(ids.shape, dtype=found.dtype, device=found.device).masked_scatter(real, found)
        return spread[:, :-1].unflatten(0, batch.x0.shape[:2])

    following = torch.cat([ids[:, 1:], ids[:, :1]], 1)[real]
    found = token_log_probs(logits[0], following)
    return Outputs(aligned(found), logits[0], None if value is None else aligned(value[0]), aligned)


GIVES: dict[Callable[..., LogProbs], dict[str, str | None]] = {
    denoising: dict.fromkeys(("gap", "t")),
    branches: dict.fromkeys(("gap", "t", "mix", "positive", "negative")),
    transition: dict.fromkeys(("gap", "t", "std", "dt", "diffusion")),
    tokens: {"mismatched": "mismatched", "kl": "exact_kl", "forward_kl": "exact_kl", "values": "values"},
}
"""What each estimate puts into ``LogProbs.extra`` (``"gap"`` if it gives gaps), and the parameter that has to ask for
it, if one must; objectives that read something else are refused."""
