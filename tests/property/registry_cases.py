"""Random cases for any registered objective, from what its decorator and its signature say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffalign.registry import OBJECTIVES, Objective, find_objective, keyword_parameters
from diffalign.types import LogProbs, Loss

find_objective("sigmoid")  # fills the registry
ALL = sorted(OBJECTIVES)

RANGES: dict[str, st.SearchStrategy] = {
    "beta": st.floats(0.01, 10),
    "label_smoothing": st.floats(0.01, 0.45),
    "flip_rate": st.floats(0, 0.45),
    "alpha": st.floats(0, 1),
    "c_max": st.floats(1.1, 4),
    "c_min": st.floats(0.1, 0.9),
    "clip_eps": st.floats(0.05, 0.5),
    "reference_weight": st.floats(0, 1),
    "snr_value": st.floats(0.1, 2),
    "eta": st.floats(0.05, 2),
    "w": st.sampled_from([[0.5, 0.5], [0.3, 0.7], [1.0, 0.0]]),
    "history_weights": st.sampled_from([[1.0, 0.0], [0.7, 0.3]]),
    "max_history": st.just(2),
    "score_min": st.just(0.0),
    "score_max": st.just(1.0),
    "top": st.sampled_from([None, 1]),
    "max_length": st.integers(1, 8),
    "adv_clip_max": st.floats(0.5, 5),
    "advantage_max": st.sampled_from([None, 1.0]),
}
"""What to draw for a parameter by name; the type decides for the others."""

MARGIN = st.sampled_from([0.0, 0.5, 1.0])  # ties are common
LABELS: dict[str, tuple[st.SearchStrategy[float], tuple[int, ...]]] = {
    "reward": (MARGIN, ()),
    "desirable": (st.sampled_from([0.0, 1.0]), ()),
    "advantage": (st.floats(-3, 3), ()),
    "win_prob": (st.floats(0, 1), ()),
    "score": (st.floats(-3, 3), ()),
    "others": (st.floats(-1, 1), (1,)),
    "visits": (st.integers(0, 20).map(float), ()),
}
"""What to draw for a label, and its dimensions after (B, K)."""

READS: dict[str, st.SearchStrategy[float]] = {
    "t": st.floats(0.05, 0.95),
    "std": st.floats(0.1, 1),
    "dt": st.floats(0.05, 0.5),
    "diffusion": st.floats(0.1, 1),
    "mix": st.just(1.0),
    "positive": st.floats(0, 2),
    "negative": st.floats(0, 2),
    "values": st.floats(-2, 2),
    "kl": st.floats(0, 2),
    "forward_kl": st.floats(0, 2),
}
GRADIENT = ("positive", "negative", "values", "kl", "forward_kl")
"""Estimates that carry gradient beside the policy's log-probs."""


@dataclass(frozen=True)
class Case:
    """Everything an objective takes, in float64."""

    objective: Objective
    by_role: dict[str, Tensor]
    mask: Tensor
    labels: dict[str, Tensor]
    extra: dict[str, Tensor]
    gap: dict[str, Tensor]
    params: dict[str, Any]
    present: Tensor | None = None

    def changed(self, **parts: Any) -> "Case":
        return replace(self, **parts)

    def candidates(self, fn) -> "Case":
        """The case with every tensor (B, K, ...) mapped."""
        groups = ("by_role", "labels", "extra", "gap")
        parts = {name: {key: fn(value) for key, value in getattr(self, name).items()} for name in groups}
        present = None if self.present is None else fn(self.present)
        return self.changed(**parts, mask=fn(self.mask), present=present)

    def units(self, fn) -> "Case":
        """The case with every tensor (B, K, U) mapped; labels stay."""
        parts = {name: {k: fn(v) for k, v in getattr(self, name).items()} for name in ("by_role", "extra", "gap")}
        return self.changed(**parts)

    def to(self, dtype: torch.dtype) -> "Case":
        return self.candidates(lambda value: value.to(dtype))


def parameters(objective: Objective) -> st.SearchStrategy[dict[str, Any]]:
    """Required ones always, optional ones sometimes."""
    schema = keyword_parameters(objective.fn)
    needed = {n: _values(n, p.annotation) for n, p in schema.items() if p.default is p.empty}
    if "max_length" in schema:  # which one of the reductions divides by
        needed["max_length"] = RANGES["max_length"]
    optional = {n: _values(n, p.annotation) for n, p in schema.items() if n not in needed}
    return st.fixed_dictionaries(needed, optional=optional).map(_consistent)


def _consistent(params: dict[str, Any]) -> dict[str, Any]:
    """Label smoothing is for logistic links."""
    if params.get("link") in ("hinge", "ipo"):
        params.pop("label_smoothing", None)
    return params


def _values(name: str, annotation: Any) -> st.SearchStrategy:
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation is bool:
        return st.booleans()
    return RANGES.get(name, st.floats(0.05, 2))


@st.composite
def cases(draw, name: str, bound: float = 5.0) -> Case:
    """B records of K candidates of U units; masks may end early, at least one unit counts."""
    objective = OBJECTIVES[name]
    b, k, u = draw(st.integers(1, 3)), objective.k or draw(st.integers(2, 4)), draw(st.integers(1, 3))

    def tensor(values: st.SearchStrategy[float], *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        flat = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)

    # what only makes sense as a probability, or as minus an error, stays below zero
    number = st.floats(-bound, bound) if "reference" in objective.roles else st.floats(-bound, -0.01)
    mask = (torch.arange(u) < tensor(st.integers(1, u), b, k)[..., None]).double()
    gaps = [entry.removeprefix("gap.") for entry in objective.reads if entry.startswith("gap.")]
    reads = [entry for entry in objective.reads if not entry.startswith(("gap.", "text:"))]
    return Case(
        objective,
        {role: tensor(number, b, k, u) for role in ("policy", *objective.roles)},
        mask,
        {label: tensor(LABELS[label][0], b, k, *LABELS[label][1]) for label in objective.labels},
        {entry: tensor(READS[entry], b, k, u) for entry in reads},
        {role: tensor(st.floats(0, 1), b, k, u) for role in gaps},
        draw(parameters(objective)),
    )


def example(name: str, b: int = 3, u: int = 2, seed: int = 0, **params: Any) -> Case:
    """A fixed case without ties; parameters without default get the middle of the road."""
    objective = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(seed)
    k = objective.k or 3

    def tensor(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    schema = keyword_parameters(objective.fn)
    typical = {"beta": 0.5, "alpha": 0.5, "flip_rate": 0.1, "eta": 0.5, "odds_weight": 0.5, "link": "logistic"}
    needed = {n: typical[n] for n, p in schema.items() if p.default is p.empty}
    order = torch.arange(b * k, dtype=torch.float64).reshape(b, k) % k
    ranges = {"desirable": order % 2, "reward": order, "visits": 1 + order}
    labels = {
        label: ranges[label] if label in ranges else tensor(0.1, 0.9, b, k, *LABELS[label][1])
        for label in objective.labels
    }
    return Case(
        objective,
        {role: tensor(-2.0, -0.1, b, k, u) for role in ("policy", *objective.roles)},
        torch.ones(b, k, u, dtype=torch.float64),
        labels,
        {entry: tensor(0.2, 0.8, b, k, u) for entry in objective.reads if not entry.startswith(("gap.", "text:"))},
        {entry[4:]: tensor(0.2, 0.8, b, k, u) for entry in objective.reads if entry.startswith("gap.")},
        {**needed, **params},
    )


@dataclass(frozen=True)
class Result:
    """What an objective gave, and the gradient of its reduction in everything that carries gradient."""

    losses: tuple[Loss, ...]
    total: Tensor
    gradients: Mapping[str, Tensor]

    @property
    def sums(self) -> Tensor:
        """(parts, 2): weighted sum and weight of every part."""
        rows = [torch.stack([(loss.weight * loss.value).sum(), loss.weight.sum()]) for loss in self.losses]
        return torch.stack(rows).detach()


def evaluate(case: Case) -> Result:
    """Run the objective of a case."""
    live = {"policy": case.by_role["policy"], **{n: v for n, v in case.extra.items() if n in GRADIENT}}
    live |= {f"gap.{role}": value for role, value in case.gap.items()}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in live.items()}
    lp = LogProbs(
        {**case.by_role, "policy": leaves["policy"]},
        case.mask,
        {role: leaves[f"gap.{role}"] for role in case.gap},
        present=case.present,
        extra={name: leaves.get(name, value) for name, value in case.extra.items()},
    )
    losses = case.objective(lp, case.labels, **case.params)
    total = torch.stack([loss.reduce() for loss in losses]).sum()
    if not total.requires_grad:
        return Result(losses, total, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
    return Result(losses, total.detach(), gradients)
