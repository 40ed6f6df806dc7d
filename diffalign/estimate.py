"""Run every role on a draw and turn the outputs into log-probs: the only caller of a training forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffalign.likelihood import denoising_error, prediction_gap
from diffalign.types import Batch, Condition, DiffusionFamily, Draw, LogProbs, Role, Weights


def _flatten_condition(cond: Condition, k: int) -> Condition:
    """(B, K or 1, ...) -> (B K, ...), repeating what the candidates of a record share."""
    return {name: value.expand(-1, k, *value.shape[2:]).flatten(0, 1) for name, value in cond.items()}


def denoising(
    family: DiffusionFamily,
    weights: Weights,
    batch: Batch,
    draw: Draw,
    roles: Sequence[Role],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    *,
    scale: float = 0.5,
    frames: bool = False,
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

    Returns:
        LogProbs (B, K, U) in float32, and the policy-reference gap where a reference ran.
    """
    b, k = draw.x_t.shape[:2]
    x_t, t = draw.x_t.flatten(0, 1), draw.t.flatten(0, 1)
    cond = _flatten_condition(batch.cond, k)

    def predict(role: Role) -> Tensor:
        with weights.use(role) as net, autocast():
            return family.predict(net, x_t, t, cond).unflatten(0, (b, k)).float()

    predictions: dict[Role, Tensor] = {}
    with torch.no_grad():
        for role in roles:
            predictions[role] = predict(role)
    predictions["policy"] = predict("policy")
    keep = (-3,) if frames else ()
    by_role = {role: -scale * denoising_error(p, draw.target, keep) for role, p in predictions.items()}
    gap = None
    if "reference" in predictions:
        gap = prediction_gap(predictions["policy"].detach(), predictions["reference"])
    log_prob = by_role["policy"]
    mask = torch.ones_like(log_prob) if batch.mask is None else batch.mask.to(log_prob).expand_as(log_prob)
    return LogProbs(by_role, mask, gap, scale)
