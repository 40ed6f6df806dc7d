"""A scored round as batches: which samples, pairs or rankings an update trains on, and what their labels are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign import credit
from diffalign.credit import Buffered
from diffalign.methods import needs
from diffalign.randomness import keyed
from diffalign.train.experts import Experts, is_replayed
from diffalign.train.rollout import Rollout
from diffalign.types import Batch, Method, SampledPath

ITEMS = 5
"""What a key of random numbers is for."""


class Item(NamedTuple):
    """One thing to train on, in one pass over the round."""

    group: int
    """Of this process."""
    index: int
    """Of its group's items."""
    key: tuple[int, int, int]
    """Pass, the group's place in the round, and index: another one for every item, whatever the process."""


@dataclass
class Round:
    """What this process holds of a round: G groups of S samples, I items each."""

    index: int
    rollout: Rollout
    rewards: Tensor
    """(G, S, M) of all processes until :func:`share`, then of this one."""
    weights: Tensor
    """(M,) of the rewards."""
    samples: Tensor = field(default_factory=lambda: torch.empty(0))
    """(G, I, K) which samples an item is."""
    labels: dict[str, Tensor] = field(default_factory=dict)
    """(G, I, K)."""
    present: Tensor = field(default_factory=lambda: torch.empty(0))
    """(G, I, K) 0 for samples without a reward."""
    metrics: dict[str, float] = field(default_factory=dict)
    decided: Tensor = field(default_factory=lambda: torch.empty(0))
    """(G, I) False for items that prefer nothing: equal rewards, no advantage, no reward at all."""

    def teaches(self, chosen: Sequence[Item]) -> bool:
        """Whether any of these items prefers something."""
        return any(bool(self.decided[item.group, item.index]) for item in chosen)

    def parts(self, settings: cfg.OnlineConfig, seed: tuple[int, ...]) -> Iterator[list[Item]]:
        """The items of every update of the round, of this process.

        Every pass goes through the items of a group in an order of its own, and takes one of every group before it
        takes the next: an update holds as many items of each process and, as far as it can, of each prompt.
        """
        count, positions = self.samples.shape[1], [group.position for group in self.rollout.groups]
        for number in range(settings.passes):
            orders = [
                torch.randperm(
                    count, generator=keyed(torch.device("cpu"), *seed, ITEMS, self.index, number, position)
                ).tolist()
                for position in positions
            ]
            mine = [
                Item(group, orders[group][column], (number, positions[group], orders[group][column]))
                for column in range(count)
                for group in range(len(positions))
            ]
            size = len(mine) * settings.passes // settings.updates
            yield from (mine[start : start + size] for start in range(0, len(mine), size))

    def batch(self, chosen: Sequence[Item], device: torch.device, experts: Experts | None = None) -> Batch:
        """Some items as a batch of B records of K candidates, on a device."""
        groups = torch.tensor([item.group for item in chosen])
        index = torch.tensor([item.index for item in chosen])
        samples = self.samples[groups, index]
        rows = groups[:, None].to(device), samples.to(device)
        path = self.rollout.path
        batch = Batch(
            self.rollout.x0[rows],
            {name: value[groups.to(value.device)][:, None] for name, value in self.rollout.cond.items()},
            {name: value[groups, index].to(device) for name, value in self.labels.items()},
            path=path and SampledPath(path.t[rows], path.x[rows], path.prediction[rows]),
            present=self.present[groups, index].to(device),
        )
        return (
            batch
            if experts is None
            else experts.beside(batch, [self.rollout.groups[g] for g in groups.tolist()], self.index)
        )


def share(
    made: Round,
    names: Sequence[str],
    settings: cfg.OnlineConfig,
    method: Method,
    mine: slice,
    buffered: Buffered | None,
) -> Round:
    """Turn the rewards of a whole round into labels, and keep this process's part.

    Args:
        names: prompts of all groups.
        mine: the groups of this process.
    """
    reward = credit.total(made.rewards, made.weights, settings.credit.combine)
    alike = credit.alike(reward)
    metrics = {**made.metrics, **summary(reward, alike, made.rollout.x0)}
    needed = needs(*method.terms)
    good = ~reward.isnan()
    # a sample is desirable or not: where all of a prompt are alike and no threshold says which, they are neither
    undecided = "desirable" in needed.labels and settings.credit.threshold is None
    if undecided or not settings.keep_alike:
        good &= ~alike[:, None]
    labels: dict[str, Tensor] = {}
    size = reward.shape[1]
    singles = torch.arange(size)[None, :, None].expand(len(reward), -1, -1)
    whole = torch.arange(size)[None, None].expand(len(reward), -1, -1)
    samples = whole if needed.listwise else singles
    if needed.k == 2 and not is_replayed(method):  # there the other of a pair is an expert
        samples = credit.pairs(reward, settings.credit.pairs)
    where = torch.arange(len(reward))[:, None, None]
    if "advantage" in needed.labels:
        how = settings.credit.model_dump(include={"spread", "ddof", "eps"})
        labels["advantage"] = credit.advantages(reward, **how, prompts=names, buffered=buffered)[where, samples]
    if "reward" in needed.labels:
        found = reward.nan_to_num(0.0)[where, samples]
        if settings.credit.pareto:
            counted = made.rewards[..., made.weights != 0] * made.weights[made.weights != 0].sign()
            found = credit.pareto_preference(counted[where, samples].flatten(0, 1)).unflatten(0, found.shape[:2])
        labels["reward"] = found
    if "desirable" in needed.labels:
        bar = reward.nanmean(1, keepdim=True) if settings.credit.threshold is None else settings.credit.threshold
        labels["desirable"] = (reward >= bar).float()[where, samples]
    present = good.float()[where, samples]
    return replace(
        made,
        rewards=made.rewards[mine],
        samples=samples[mine],
        labels={name: value[mine] for name, value in labels.items()},
        present=present[mine],
        metrics=metrics,
        decided=(_decided(labels, present) | is_replayed(method))[mine],
    )


def _decided(labels: Mapping[str, Tensor], present: Tensor) -> Tensor:
    """(G, I): an item has an advantage, a label of its own, or samples that differ in reward."""
    there = present > 0
    found = there.any(-1) if "desirable" in labels else torch.zeros_like(there[..., 0])
    if "advantage" in labels:
        found |= ((labels["advantage"] != 0) & there).any(-1)
    if "reward" in labels:
        low, high = (labels["reward"].masked_fill(~there, bound) for bound in (torch.inf, -torch.inf))
        found |= high.amax(-1) > low.amin(-1)
    return found


def summary(reward: Tensor, alike: Tensor, x0: Tensor) -> dict[str, float]:
    """What to watch of a round's rewards (G, S) and of this process's samples."""
    known = reward[~reward.isnan()]
    if not len(known):
        return {"reward/mean": 0.0}
    groups = reward.nanmean(1)
    top = alike & (groups >= known.mean())
    return {
        "reward/mean": float(known.mean()),
        "reward/best": float(reward.masked_fill(reward.isnan(), -torch.inf).amax(1)[~groups.isnan()].mean()),
        "reward/spread": float((reward - groups[:, None]).square().nanmean().sqrt()),
        "reward/failed": float(reward.isnan().float().mean()),
        "reward/alike_high": float(top.float().mean()),
        "reward/alike_low": float((alike & ~top).float().mean()),
        "x0/square": float(x0.float().square().mean()),
    }
