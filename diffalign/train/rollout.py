"""Samples of the policy, with the path they took where it is trained on. Plain loops over ``family.predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign import samplers
from diffalign.estimate import step_of
from diffalign.randomness import keyed, rand, randn
from diffalign.records import Record
from diffalign.types import Condition, SampledPath

Keep = Literal["nothing", "transitions", "predictions"]
"""Of a path: nothing; steps with noise, whose log-prob is trained on; the states and predictions of a solver."""
STREAM, WINDOW = 1, 2
"""What a key of random numbers is for."""


class Group(NamedTuple):
    """A prompt of a round."""

    record: Record
    position: int
    """In the round, over all processes."""
    attempt: int = 0
    """How many prompts were tried at this place before."""


class Chunk(NamedTuple):
    """Samples that were made in one batch."""

    rows: range
    """Of all samples of this process, group by group."""
    latents: Tensor
    """(n, ...)."""
    path: SampledPath | None


@dataclass(frozen=True)
class Roller:
    """Makes the samples of groups, batch by batch.

    The random numbers of a sample depend on the seed, the round, the prompt's place in it and the sample's number
    alone: not on the batch, nor on how many processes there are.
    """

    family: Any
    sampling: cfg.SamplingConfig
    samples: int
    """Per group."""
    keep: Keep = "nothing"
    step: tuple[str, float | None] = ("flow_sde", None)
    """Kind and noise level of kept transitions, as ``estimate.transition`` has them."""
    window: int | None = None
    window_range: tuple[int, int] | None = None
    shared_noise: bool = False
    tau: float = 0.0
    """How stochastic SA-Solver is."""
    key: tuple[int, ...] = field(default=())

    def __call__(self, net: torch.nn.Module, index: int, groups: Sequence[Group], cond: Condition) -> Iterator[Chunk]:
        """The samples of some groups, whole or in parts, in order.

        Args:
            net: as it plays the role that samples.
            index: of the round.
            cond: (G, ...), one row per group.
        """
        total = len(groups) * self.samples
        for first in range(0, total, self.sampling.batch):
            rows = range(first, min(first + self.sampling.batch, total))
            yield self._chunk(net, index, rows, groups, cond)

    def _chunk(self, net: torch.nn.Module, index: int, rows: range, groups: Sequence[Group], cond: Condition) -> Chunk:
        of = [row // self.samples for row in rows]
        mine = {name: value[of] for name, value in cond.items()}
        guidance = self.sampling.guidance
        empty = {} if guidance == 1.0 else self.family.unconditional(mine)
        predict = samplers.guided(self.family, net, mine, empty, guidance, self.family.guidance_interval)
        start, stream = self._noise(index, rows, [groups[g] for g in of])
        with torch.inference_mode():
            latents, path = self._run(predict, start, stream, index)
        # a copy made outside can take part in differentiation
        whole = path and SampledPath(path.t.clone(), path.x.clone(), path.prediction.clone())
        return Chunk(rows, latents.clone(), whole)

    def _noise(self, index: int, rows: range, groups: Sequence[Group]) -> tuple[Tensor, list[torch.Generator]]:
        """(n, ...) where samples start, and what their later noise comes from."""
        shape, device = self.family.latent_shape(self.sampling.size), self.family.device
        places = [(STREAM, index, group.position, group.attempt) for group in groups]
        streams = [
            keyed(device, *self.key, *place, row % self.samples + 1) for row, place in zip(rows, places, strict=True)
        ]
        starts = [keyed(device, *self.key, *place, 0) for place in places] if self.shared_noise else streams
        return randn((len(rows), *shape), starts), streams

    def _run(
        self, predict: samplers.Predict, x: Tensor, streams: list[torch.Generator], index: int
    ) -> tuple[Tensor, SampledPath | None]:
        schedule = self.family.schedule
        grid = schedule.grid(self.sampling.steps).to(x.device)
        noise = _forever(x.shape, streams)
        if self.keep == "transitions":
            kind, level = self.step
            noisy, still = step_of(schedule, kind, level), step_of(schedule, kind, 0.0)
            return samplers.rollout(predict, x, grid, noisy, noise, self._window(index), still)
        sampler = samplers.find_sampler(self.sampling.sampler, schedule)
        if self.tau:
            grid = samplers.sa_grid(grid)
            sampler = partial(samplers.sa_solver, tau=self.tau, noise=noise)
        if self.keep == "nothing":
            return sampler(predict, x, grid), None
        return _recorded(predict, x, grid, sampler)

    def _window(self, index: int) -> tuple[int, int] | None:
        """First and last + 1 of the steps that are kept, the same for all samples of a round."""
        if self.window is None:
            return None
        low, high = self.window_range or (0, self.sampling.steps)
        u = float(rand((1,), keyed(torch.device("cpu"), *self.key, WINDOW, index)))
        first = low + int(u * (high - self.window - low + 1))
        return first, first + self.window


def _forever(shape: Sequence[int], streams: list[torch.Generator]) -> Iterator[Tensor]:
    while True:
        yield randn(shape, streams)


def _recorded(
    predict: samplers.Predict, x: Tensor, grid: Tensor, sampler: Callable[..., Tensor]
) -> tuple[Tensor, SampledPath]:
    """A solver's sample, with the states it asked the network at and what that said."""
    times: list[Tensor] = []
    states: list[Tensor] = []
    predictions: list[Tensor] = []

    def noted(state: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        states.append(state)
        predictions.append(predict(state, t))
        return predictions[-1]

    last = sampler(noted, x, grid)
    t = torch.stack([*times, grid[-1]]).expand(len(x), -1)
    return last, SampledPath(t, torch.stack([*states, last], 1), torch.stack(predictions, 1))


@dataclass(frozen=True, slots=True)
class Rollout:
    """This process's samples of a round: G groups of S."""

    groups: tuple[Group, ...]
    cond: Condition
    """(G, ...)."""
    x0: Tensor
    """(G, S, ...)."""
    path: SampledPath | None
    """(G, S, T + 1, ...)."""

    def replaced(self, rows: Sequence[int], other: Rollout) -> Rollout:
        """With other groups in some places.

        Args:
            rows: which groups, one for every group of ``other``.
        """
        groups = list(self.groups)
        for row, group in zip(rows, other.groups, strict=True):
            groups[row] = group
        where = torch.tensor(rows)

        def put(mine: Tensor, new: Tensor) -> Tensor:
            out = mine.clone()
            out[where.to(mine.device)] = new
            return out

        both = [_padded(self.cond, other.cond), _padded(other.cond, self.cond)]
        cond = {name: put(value, both[1][name]) for name, value in both[0].items()}
        path = self.path
        if path is not None and other.path is not None:
            path = SampledPath(*(put(getattr(path, n), getattr(other.path, n)) for n in ("t", "x", "prediction")))
        return replace(self, groups=tuple(groups), cond=cond, x0=put(self.x0, other.x0), path=path)


def _padded(cond: Condition, other: Condition) -> Condition:
    """With zeros where the other condition is longer: prompts of another batch may be."""
    out = {}
    for name, value in cond.items():
        sides = [max(a, b) for a, b in zip(value.shape[1:], other[name].shape[1:], strict=True)]
        out[name] = value.new_zeros(len(value), *sides)
        out[name][(slice(None), *map(slice, value.shape[1:]))] = value
    return out


def assemble(groups: Sequence[Group], samples: int, cond: Condition, chunks: Sequence[Chunk]) -> Rollout:
    """All chunks of a round as one value."""
    lead = (len(groups), samples)
    paths = [chunk.path for chunk in chunks if chunk.path is not None]
    path = None
    if paths:
        path = SampledPath(
            *(torch.cat([getattr(p, n) for p in paths]).unflatten(0, lead) for n in ("t", "x", "prediction"))
        )
    return Rollout(tuple(groups), cond, torch.cat([chunk.latents for chunk in chunks]).unflatten(0, lead), path)
