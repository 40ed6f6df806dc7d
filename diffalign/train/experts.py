"""Demonstrations beside the policy's own samples (Diffusion-DRO): every sample answers the prompt of an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign import config as cfg
from diffalign import draws
from diffalign import records as store
from diffalign.dataset import Dataset
from diffalign.errors import UserError
from diffalign.methods import unwrapped
from diffalign.randomness import keyed
from diffalign.records import Record
from diffalign.rewards import level
from diffalign.train.core import Core
from diffalign.train.data import encode
from diffalign.train.rollout import Group
from diffalign.types import Batch, Method, SampledPath

EXPERT = 6
"""What a key of random numbers is for."""


def is_replayed(method: Method) -> bool:
    """Whether a method sets experts against the policy's own trajectories."""
    return any(unwrapped(term.draw) is draws.replay for term in method.terms)


def best(record: Record) -> Record:
    """A record with its best candidate alone: by the label ``reward``, or the only one.

    Raises:
        UserError: several candidates and no reward.
    """
    if len(record.candidates) == 1:
        return record
    rewards = [candidate.labels.get("reward") for candidate in record.candidates]
    if not rewards or any(reward is None for reward in rewards):
        raise UserError(f"record {record.id!r}: an expert is the only candidate, or the best by the label 'reward'")
    order = sorted(range(len(rewards)), key=lambda k: level(rewards[k]))  # type: ignore[arg-type]
    return record.model_copy(update={"candidates": [record.candidates[order[-1]]]})


@dataclass(frozen=True)
class Experts:
    """Encoded demonstrations.

    Args:
        prompts: their records, named by their number.
        data: latents and conditions, in the same order.
        key: of the random numbers.
    """

    prompts: list[Record]
    data: Dataset
    device: torch.device
    key: tuple[int, ...]

    @classmethod
    def load(cls, config: cfg.TrainConfig, core: Core) -> Experts:
        """Encode the best candidate of every record."""
        assert config.data is not None
        given, size = config.data, config.online and config.online.sampling.size
        if given.bank is not None or given.buckets is not None or given.size != size:
            raise UserError("data: experts have the size of online.sampling, no buckets and no bank")
        records = [best(record) for record in store.read(Path(config.data.records))]
        data = encode(config.data, records, core.family, core.run.is_main)
        assert isinstance(data, Dataset)
        prompts = [record.model_copy(update={"id": str(n)}) for n, record in enumerate(records)]
        return cls(prompts, data, core.family.device, (config.run.seed, EXPERT))

    def rows(self, groups: Sequence[Group], index: int) -> Batch:
        """The experts of some groups of a round, one candidate each; prompts are dropped as ``data.dropout`` says."""
        generators = [keyed(self.device, *self.key, index, group.position) for group in groups]
        return self.data.batch([int(group.record.id) for group in groups], generators, ())

    def beside(self, batch: Batch, groups: Sequence[Group], index: int) -> Batch:
        """Experts as first candidates, the samples as second ones; only those have a path that is read."""

        def twice(value: Tensor) -> Tensor:
            return value.expand(-1, 2, *value.shape[2:])

        experts = self.rows(groups, index)
        path = batch.path
        assert path is not None
        return replace(
            batch,
            x0=torch.cat([experts.x0[:, :1], batch.x0], 1),
            labels={"reward": batch.x0.new_tensor([[1.0, 0.0]]).expand(len(groups), 2)},
            path=SampledPath(twice(path.t), twice(path.x), twice(path.prediction)),
            present=None,
        )
