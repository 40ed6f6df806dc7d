"""The values that travel between the parts. Pure: torch only.

Letters: **B** records, **K** candidates per record, **U** units (tokens of a text, latent frames of a video, 1 if
none), ``...`` latent dimensions. Times are in [0, 1], 0 = clean data, 1 = noise, always float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffalign.randomness import Generator

Condition = dict[str, Tensor]
"""Opaque outside its family; every tensor leads with (B, K) or (B, 1)."""
Role = str
"""``"policy"``, ``"reference"``, ``"behaviour"``, ``"prev"``, ``"guide"``, ``"history.0"`` ..."""
Labels = Mapping[str, Tensor]
"""``"reward"`` (B, K) or (B, K, U), higher is better, and whatever else an objective declares."""


@dataclass(frozen=True, slots=True)
class SampledPath:
    """A sampling trajectory: ``t`` (B, K, T+1), ``x`` (B, K, T+1, ...), ``prediction`` (B, K, T, ...)."""

    t: Tensor
    x: Tensor
    prediction: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """K = 1 unpaired, K = 2 pairs, K > 2 ranked. Two conditions on one image is just ``cond`` with (B, 2)."""

    x0: Tensor
    """(B, K, ...) clean latents, or token ids (B, K, L)."""
    cond: Condition
    labels: Labels
    mask: Tensor | None = None
    """(B, K, U) units that count; None for all."""
    path: SampledPath | None = None
    present: Tensor | None = None
    """(B, K) 0 for the candidates that only pad a shorter list; None for none. An empty completion is present."""
    known: Mapping[Role, Tensor] = field(default_factory=dict)
    """(B, K, U) errors of frozen roles on the draw to come, where they were computed before."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        path = self.path and SampledPath(*(getattr(self.path, n).to(device) for n in ("t", "x", "prediction")))
        return Batch(
            self.x0.to(device),
            {name: value.to(device) for name, value in self.cond.items()},
            {name: value.to(device) for name, value in self.labels.items()},
            None if self.mask is None else self.mask.to(device),
            path,
            None if self.present is None else self.present.to(device),
            {role: errors.to(device) for role, errors in self.known.items()},
        )

    def rows(self, index: slice) -> Batch:
        """Some of the records."""
        return replace(
            self,
            x0=self.x0[index],
            cond={name: value[index] for name, value in self.cond.items()},
            labels={name: value[index] for name, value in self.labels.items()},
            mask=None if self.mask is None else self.mask[index],
            path=self.path and SampledPath(self.path.t[index], self.path.x[index], self.path.prediction[index]),
            present=None if self.present is None else self.present[index],
            known={role: errors[index] for role, errors in self.known.items()},
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """All randomness of one step; every role sees the same one."""

    t: Tensor
    """(B, K) in [0, 1], float32; or (B, K, S), several times per candidate, which become units."""
    x_t: Tensor
    """(B, K, ...) or (B, K, S, ...)."""
    target: Tensor
    """Like ``x_t``, in the family's parametrisation."""
    t_prev: Tensor | None = None
    x_prev: Tensor | None = None


def joined(conditions: Sequence[Condition]) -> Condition:
    """Conditions one after the other along the first dimension; what is shorter in another one ends in zeros.

    So a family whose prompts differ in length has a mask among its tensors: the zeros do not count there either.
    """
    out = {}
    for name in conditions[0]:
        values = [condition[name] for condition in conditions]
        longest = [max(sides) for sides in zip(*(value.shape[1:] for value in values), strict=True)]
        out[name] = values[0].new_zeros(sum(map(len, values)), *longest)
        for rows, value in zip(out[name].split([len(value) for value in values]), values, strict=True):
            rows[tuple(map(slice, value.shape))] = value
    return out


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last dimension of what a mask of 0 and 1 counts, whatever stands elsewhere, NaN included."""
    if values.is_cpu:  # where selecting is eight times slower than multiplying
        total = (values * mask).sum(-1)
        if math.isfinite(float(total.detach().sum())):
            return total
    return torch.where(mask > 0, values, 0.0).sum(-1)


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Log-probabilities by role: nats for text, minus a scaled denoising error for diffusion."""

    by_role: Mapping[Role, Tensor]
    """(B, K, U); only what the policy gave carries gradient. Units outside the mask may hold anything, even NaN."""
    mask: Tensor
    """(B, K, U), 1 for units that count."""
    gap: Mapping[Role, Tensor] = field(default_factory=dict)
    """(B, K, U) mean squared difference of the policy's prediction to that of a role: a KL surrogate, with gradient."""
    scale: float = 1.0
    """What one unit of error costs in log-prob, so that metrics can report errors."""
    present: Tensor | None = None
    """(B, K) 0 for candidates that only pad a list; None for none."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """(B, K, U) what an estimate gives beside log-probs: ``"values"`` of a value head, ``"t"``, ``"std"``, ``"dt"``
    of a transition, ``"kl"`` over a vocabulary ... Objectives declare what they read."""
    world_mean: Callable[[Tensor], Tensor] = torch.mean
    """The mean of a detached tensor over its elements and over all ranks."""

    def sum(self, role: Role = "policy") -> Tensor:
        """(B, K): summed over the units that count."""
        return masked_sum(self.by_role[role], self.mask)

    def mean(self, role: Role = "policy") -> Tensor:
        """(B, K): per unit; 0 for a candidate without units."""
        return self.sum(role) / self.lengths

    def ratio(self, how: Literal["sum", "mean"] = "sum", against: Role = "reference") -> Tensor:
        """(B, K): ``log p_policy - log p_against``, the implicit reward without its beta."""
        reduce = self.sum if how == "sum" else self.mean
        return reduce("policy") - reduce(against)

    def counted(self, value: Tensor) -> Tensor:
        """A value per unit (B, K, U) with 0 where units do not count: what they hold is not even differentiated."""
        return torch.where(self.mask > 0, value, 0.0)

    def unit_ratio(self, against: Role = "reference") -> Tensor:
        """(B, K, U): ``log p_policy - log p_against`` of every unit, 0 where units do not count."""
        return self.counted(self.by_role["policy"] - self.by_role[against])

    @property
    def lengths(self) -> Tensor:
        """(B, K): units that count, at least 1."""
        return self.mask.sum(-1).clamp_min(1)

    @property
    def exists(self) -> Tensor:
        """(B, K): 1.0 for real candidates, 0.0 for padding."""
        policy = self.by_role["policy"]
        return policy.new_ones(self.mask.shape[:-1]) if self.present is None else self.present.to(policy.dtype)


class Loss(NamedTuple):
    """What an objective returns, alone or as a tuple of parts that are averaged separately and then added.

    Objectives never reduce over the batch: every entry is averaged with its weight, ``sum(w v) / sum(w)``, exactly,
    across micro-steps and ranks.
    """

    value: Tensor
    """(B,) per record, or (B, K), (B, K, U)."""
    weight: Tensor
    """The same shape, without gradient; 0 for ties, padding and masked rows."""

    def reduce(self) -> Tensor:
        """``sum(w v) / sum(w)``: the only reduction there is. A batch of zero weight gives 0 with zero gradient."""
        return (self.weight * self.value).sum() / self.weight.sum().clamp_min(torch.finfo(self.weight.dtype).tiny)


def parts(loss: Loss | tuple[Loss, ...]) -> tuple[Loss, ...]:
    """The separately averaged parts of what an objective returned."""
    return (loss,) if isinstance(loss, Loss) else loss


@dataclass(frozen=True, slots=True)
class Term:
    """draw + estimate + shaping + objective, with the paper's parameters of the objective."""

    draw: Callable[..., Draw | None] | None
    """``(family, weights, batch, generator, *, params) -> Draw``; None to read the main term's log-probs instead."""
    estimate: Callable[..., LogProbs] | None
    """``(family, weights, batch, draw, roles, autocast, *, params) -> LogProbs``."""
    objective: str
    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    shaping: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Transformations of the log-probs by name, with their parameters, applied in order before the objective."""


@dataclass(frozen=True, slots=True)
class Method:
    """A named row of the catalogue."""

    name: str
    paper: str
    main: Term
    extra: tuple[Term, ...] = ()
    source: Literal["offline", "online", "either"] = "offline"

    @property
    def terms(self) -> tuple[Term, ...]:
        """The main term and its companions."""
        return (self.main, *self.extra)


class Schedule(Protocol):
    """Noise schedule and parametrisation of one model line; see :mod:`diffalign.schedule`."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...
    def native(self, t: Tensor) -> Tensor: ...
    def grid(self, steps: int) -> Tensor: ...
    def sample_t(self, shape: tuple[int, ...], generator: Generator) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Request:
    """One sample to generate. Its noise depends on ``seed`` alone, never on its neighbours in a batch."""

    prompt: str | Sequence[Mapping[str, str]]
    """Text, or a conversation of ``{"role", "content"}`` turns."""
    seed: int
    condition: Any = None
    """A PIL image, for families that read one."""
    start: Tensor | None = None
    """A clean sample (3, H, W), (3, F, H, W) or voxels, in [-1, 1], to begin from instead of noise alone."""
    strength: float = 1.0
    """The time in [0, 1] that ``start`` is noised to."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: ``guidance`` 1 means without classifier-free guidance; ``size`` (height, width) in pixels, with
    frames before them for clips.
    """

    sampler: str = "euler"
    steps: int = 20
    guidance: float = 1.0
    size: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to sample text: ``temperature`` 0 is greedy, ``top_p`` 1 the whole distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256


class Family(Protocol):
    """What every model line has. ``net`` is the one module that trains."""

    net: nn.Module

    @property
    def name(self) -> str: ...
    @property
    def modality(self) -> Literal["image", "video", "mesh", "text"]: ...


class DiffusionFamily(Family, Protocol):
    """What draws and estimators need of a diffusion or flow model line."""

    schedule: Schedule
    guidance_interval: tuple[float, float]

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor: ...
    def unconditional(self, cond: Condition) -> Condition: ...
    def rescale(self, guided: Tensor, with_prompt: Tensor) -> Tensor: ...


class TextFamily(Family, Protocol):
    """What draws and estimators need of a language model."""

    def forward(
        self,
        net: nn.Module,
        ids: Tensor,
        attention: Tensor | None,
        positions: Tensor | None,
        keep: int,
        values: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


class Weights(Protocol):
    """Which parameters play which role; see :mod:`diffalign.weights`."""

    def use(self, role: Role) -> AbstractContextManager[nn.Module]: ...
    def trainable(self) -> list[nn.Parameter]: ...
