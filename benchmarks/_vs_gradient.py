"""Our gradient of a step of diffusers' script: its latents, noise, times, text states and LoRA weights in our loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffalign.families.base import load_family
from diffalign.methods import resolve
from diffalign.train.run import Run
from diffalign.train.step import loss_step
from diffalign.types import Batch, Draw
from diffalign.weights import Weights, add_lora


class Agreement(NamedTuple):
    """Largest differences of the first step, relative to the largest value of the tensor compared."""

    noised: float
    """Of the noised latents."""
    gradient: float
    """Of the LoRA gradient that differs most."""
    tensors: int
    """LoRA gradients that are not zero: half of all, since the up projections start at zero."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the largest value; 0 where both are zero."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def pairs(tensor: Tensor) -> Tensor:
    """The script's (2 B, ...), all winners first, as (B, 2, ...)."""
    return torch.stack(tensor.chunk(2), 1)


def agreement(kind: str, folder: Path, recorded: Path, method: dict[str, Any], rank: int) -> Agreement:
    """Run our step on what the script's step was given.

    Args:
        kind: family of the pipeline in ``folder``.
        recorded: step.safetensors of ``_vs_script.py``; its ``x_t`` says in what precision.
        method: as in a training config.
    """
    theirs = load_file(recorded)
    family: Any = load_family(kind, str(folder), "cpu")
    add_lora(family.net, rank, None, family.lora_targets)
    trained = {name: p for name, p in family.net.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.data = theirs.pop(f"lora.{name}")
    dtype = theirs["x_t"].dtype
    family.net.to(dtype)
    x0, noise = (pairs(theirs[name]).to(dtype) for name in ("latents", "noise"))
    t = family.schedule.unit(pairs(theirs["timesteps"]))
    draw = Draw(t, family.schedule.add_noise(x0, noise, t), family.schedule.target(x0, noise, t))
    cond = {name: pairs(theirs[name]) for name in ("states", "pooled", "sizes") if name in theirs}
    batch = Batch(x0, cond, {"reward": torch.tensor([[1.0, 0.0]]).expand(len(x0), 2)})
    row = resolve(**method)
    row = replace(row, main=replace(row.main, draw=lambda *_: draw))
    weights = Weights(family.net, lora=True)
    run = Run(Path(), family.device, "fp32", 0, 1)
    with run.kernels(batch.x0.shape[3:].numel()):
        result = loss_step(row, family, weights, batch, torch.Generator(), autocast=run.autocast)
        result.loss.backward()
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    both = [(found[name], theirs[f"grad.{name}"]) for name in trained]
    live = [pair for pair in both if any(g.abs().max() > 0 for g in pair)]
    worst = max(relative(*pair) for pair in live)
    return Agreement(relative(draw.x_t, pairs(theirs["x_t"])), worst, len(live))
