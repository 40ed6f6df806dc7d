"""A network of 24 numbers behind the diffusion protocol, one update of the training step, and optimisers by hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.train.step import loss_step
from diffalign.train.update import Update
from diffalign.types import Batch, Draw, Method

F64 = torch.float64
Values = dict[str, Tensor]
"""The numbers of a network by name."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def predicted(values: Mapping[str, Tensor], x: Tensor, t: Tensor, tilt: Tensor) -> Tensor:
    """(..., 2, 2) ``tanh(W x + a t + c tilt)`` of latents (..., 2, 2), times (...) and prompts (...)."""
    inside = (
        x.flatten(-2) @ values["weight"] + t.double()[..., None] * values["time"] + tilt[..., None] * values["tilt"]
    )
    return inside.tanh().unflatten(-1, (2, 2))


class Net(nn.Module):
    """The numbers of one role: those of ``seed``, a little further for every other ``step``."""

    def __init__(self, seed: int = 0, step: float = 0.0) -> None:
        super().__init__()
        for index, (name, shape) in enumerate({"weight": (4, 4), "time": (4,), "tilt": (4,)}.items()):
            value = 0.4 * normal(*shape, seed=seed + index) + step * normal(*shape, seed=seed + 50 + index)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor, t: Tensor, tilt: Tensor) -> Tensor:
        return predicted(dict(self.named_parameters()), x, t, tilt)

    @property
    def values(self) -> Values:
        """A copy of the numbers."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}


class Family:
    """A prompt is one number, the empty prompt 0."""

    name = "toy"
    modality = "image"
    guidance_interval = (0.0, 1.0)

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.net = schedule, Net()

    def predict(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return net(x_t, t, cond["tilt"])

    def unconditional(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in cond.items()}

    def rescale(self, guided: Tensor, with_prompt: Tensor) -> Tensor:
        return guided


@dataclass
class Roles:
    """A network per role; the numbers of all of them are kept from the start."""

    nets: dict[str, Net]
    start: dict[str, Values] = field(init=False)

    def __post_init__(self) -> None:
        self.start = {role: net.values for role, net in self.nets.items()}

    @contextmanager
    def use(self, role: str) -> Iterator[Net]:
        yield self.nets[role]

    def trainable(self) -> list[nn.Parameter]:
        return list(self.nets["policy"].parameters())


def recorded(method: Method) -> tuple[Method, list[Draw]]:
    """A method, and what its main term will have drawn, one entry per micro-batch."""
    draw, kept = method.main.draw, []
    assert draw is not None

    def keep(*args: Any) -> Draw | None:
        kept.append(draw(*args))
        return kept[-1]

    return replace(method, main=replace(method.main, draw=keep)), kept


def train(
    method: Method,
    family: Family,
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    updates: Sequence[Sequence[Batch]],
    clip: float | None,
) -> list[Values]:
    """The policy's numbers after every update, each made of its micro-batches; other roles must not move."""
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    update, out = Update(roles.trainable(), optimizer, constant, lambda value: value, clip), []
    for number, parts in enumerate(updates):
        for index, batch in enumerate(parts):
            update.add(loss_step(method, family, roles, batch, torch.Generator().manual_seed(10 * number + index)))
        update.collect()
        update.apply()
        out.append(roles.nets["policy"].values)
    for role, net in roles.nets.items():
        still = [torch.equal(net.values[name], value) for name, value in roles.start[role].items()]
        assert all(still) == (role != "policy")
    return out


# --- by hand --------------------------------------------------------------------------------------------------------


def gradient(loss: Callable[[Values], Tensor], values: Values, clip: float | None) -> Values:
    """Of a loss by every number, its norm clipped."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()))
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
    return {name: factor * grad for name, grad in zip(leaves, grads, strict=True)}


def descent(values: Values, grads: Values, lr: float) -> Values:
    """A step against the gradient."""
    return {name: values[name] - lr * grad for name, grad in grads.items()}


@dataclass
class AdamW:
    """Decoupled weight decay (arXiv:1711.05101 algorithm 2), bias corrected, betas 0.9 and 0.999, eps 1e-8."""

    lr: float
    decay: float
    count: int = 0
    first: Values = field(default_factory=dict)
    second: Values = field(default_factory=dict)

    def __call__(self, values: Values, grads: Values) -> Values:
        self.count, out = self.count + 1, {}
        for name, grad in grads.items():
            self.first[name] = 0.9 * self.first.get(name, 0.0 * grad) + 0.1 * grad
            self.second[name] = 0.999 * self.second.get(name, 0.0 * grad) + 0.001 * grad**2
            mean, square = self.first[name] / (1 - 0.9**self.count), self.second[name] / (1 - 0.999**self.count)
            out[name] = (1 - self.lr * self.decay) * values[name] - self.lr * mean / (square.sqrt() + 1e-8)
        return out


def assert_same_change(found: Values, expected: Values, start: Values) -> None:
    """Numbers moved from ``start`` alike, to 1e-8 of the largest move of each array; and they did move."""
    for name in start:
        moved, wanted = found[name] - start[name], expected[name] - start[name]
        largest = float(wanted.abs().max())
        assert largest > 1e-7, f"{name} did not move"
        off = float((moved - wanted).abs().max())
        assert off <= 1e-8 * largest, f"{name} is off by {off / largest:.3g} of its largest change"
