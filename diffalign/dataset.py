"""Records -> Batches of encoded samples, and the order in which a run visits the records."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffalign import records as store
from diffalign.encoding import Cut, Encoder, open_shard, size_of
from diffalign.errors import UserError
from diffalign.methods import needs
from diffalign.randomness import Generator, device_of, rand, randn
from diffalign.records import Record
from diffalign.types import Batch, Condition, Method

SHARD = 512  # records per cache file, fewer of large samples
SHARD_NUMBERS = 2**27
DERIVED = ("ids", "state")
"""Labels that come from texts themselves, (B, K, U): the id of every predicted token, and 1 where a step begins."""


def check_records(records: Sequence[Record], method: Method, where: str) -> None:
    """Refuse data a method cannot learn from, before any network runs.

    Raises:
        UserError: names the first record with too few or too many candidates, or a missing or odd label.
    """
    if not records:
        raise UserError(f"{where}: no records")
    needed = needs(*method.terms)
    size, labels = needed.k, [label for label in needed.labels if label not in DERIVED]
    name = method.main.objective
    most = max(len(record.candidates) for record in records)
    if needed.listwise and most == 2:
        raise UserError(
            f"{where}: objective {name!r} learns from rankings, and every record is a pair; run `diffalign build` with "
            "rule: ranked, or choose an objective over pairs"
        )
    labels += [name for name in needed.optional if any(name in c.labels for r in records for c in r.candidates)]
    for record in records:
        k = len(record.candidates)
        if size is not None and k != size:
            raise UserError(
                f"{where}: record {record.id!r} has {k} candidate{'s' * (k != 1)}, objective {name!r} "
                f"needs exactly {size}; run `diffalign build` with a rule that makes them"
            )
        for candidate, label in itertools.product(record.candidates, labels):
            if label not in candidate.labels:
                raise UserError(f"{where}: record {record.id!r} has a candidate without the label {label!r}")
            shape, first = (np.shape(c.labels[label]) for c in (candidate, records[0].candidates[0]))
            if shape != first:
                raise UserError(
                    f"{where}: record {record.id!r}: {label!r} has shape {shape}, and {first} in the first record; "
                    "give every candidate one number, or lists of one length"
                )
    rewards = [[c.labels.get("reward") for c in r.candidates] for r in records]
    if most > 1 and "reward" in labels and all(all(v == row[0] for v in row) for row in rewards):
        raise UserError(f"{where}: all ties: no record prefers one candidate to another, there is nothing to learn")


class Dataset:
    """Encoded records with random access by position.

    Args:
        records: checked with :func:`check_records`; K may differ between records, short ones are padded and masked.
        root: folder of the media.
        cache: folder of the cache, see :mod:`diffalign.encoding`.
        cut: sizes, crops and flips.
        progress: called with the number of records encoded so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: Path,
        family: Encoder,
        cache: Path,
        cut: Cut = Cut(),  # noqa: B008 - immutable
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.records = records
        self.family = family
        self.k = max(len(r.candidates) for r in records)
        sizes = [size_of(record, root, family, cut) for record in records]
        known = sorted(set(sizes))
        self.groups = [known.index(size) for size in sizes]
        self._places: dict[int, _Place] = {}
        for group, size in enumerate(known):
            members = [index for index, own in enumerate(self.groups) if own == group]
            length = max(1, min(SHARD, SHARD_NUMBERS // (self.k * np.prod(family.latent_shape(size), dtype=int))))
            for start in range(0, len(members), length):
                shard = members[start : start + length]
                file = open_shard([records[i] for i in shard], root, family, size, cut, cache)
                first = 0
                for row, index in enumerate(shard):
                    self._places[index] = _Place(file, row, first, len(records[index].candidates))
                    first += len(records[index].candidates)
                progress(len(self._places))

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, indices: Sequence[int], generator: Generator, labels: Sequence[str]) -> Batch:
        """(B, K, ...) for the given records, all of one group.

        The generator, or that of each record, chooses between mirrored samples where there are any, and draws from the
        posterior of the VAE.
        """
        device = device_of(generator)
        places = [self._places[i] for i in indices]
        mean, logvar = (torch.stack([place.rows(n, self.k) for place in places]).to(device) for n in ("mean", "logvar"))
        variants = mean.shape[2]
        chosen = torch.zeros(len(indices), dtype=torch.long, device=device)
        if variants > 1:
            chosen = (rand((len(indices), 1), generator)[:, 0] * variants).long()
        names = places[0].names("each.")
        each = [torch.stack([place.rows(name, self.k) for place in places]).to(device) for name in names]
        mean, logvar, *own = (value[range(len(indices)), :, chosen] for value in (mean, logvar, *each))
        cond = _padded([place.prompt() for place in places])
        cond |= {name.removeprefix("each."): value for name, value in zip(names, own, strict=True)}
        rows = [self.records[i].candidates for i in indices]
        present = torch.tensor([[j < len(row) for j in range(self.k)] for row in rows], dtype=torch.float32)
        values = {name: label_values(rows, name, self.k) for name in labels}
        latents = self.family.latents(mean, logvar, randn(mean.shape, generator))
        return Batch(latents, cond, values, present=present).to(device)


class _Place(NamedTuple):
    """Where the encodings of a record are."""

    file: Any
    row: int
    """Of the record in its shard."""
    first: int
    """Row of its first candidate."""
    count: int

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.file.keys() if name.startswith(prefix))  # noqa: SIM118 - no mapping

    def rows(self, name: str, k: int) -> Tensor:
        """(K, V, ...) of the candidates, the first repeated where there are fewer than K."""
        found = self.file.get_slice(name)[self.first : self.first + self.count]
        return torch.cat([found, found[:1].expand(k - self.count, *found.shape[1:])]) if self.count < k else found

    def prompt(self) -> Condition:
        """(1, ...) of every tensor."""
        row = int(self.file.get_slice("row")[self.row])
        return {n.removeprefix("prompt."): self.file.get_slice(n)[row : row + 1] for n in self.names("prompt.")}


def _padded(conditions: Sequence[Condition]) -> Condition:
    """(B, 1, ...): prompts of different lengths are filled up with zeros, which their masks do not count."""
    out = {}
    for name in conditions[0]:
        values = [condition[name] for condition in conditions]
        longest = [max(sides) for sides in zip(*(value.shape for value in values), strict=True)]
        out[name] = values[0].new_zeros(len(values), *longest)
        for row, value in zip(out[name], values, strict=True):
            row[tuple(slice(side) for side in value.shape)] = value
    return out


def label_values(rows: Sequence[Sequence[store.Candidate]], name: str, k: int) -> Tensor:
    """(B, k), or (B, k, U) for a label per unit; padding candidates get zeros and are not present."""
    out = torch.zeros(len(rows), k, *np.shape(rows[0][0].labels[name]))
    for b, row in enumerate(rows):
        for i, candidate in enumerate(row):
            out[b, i] = torch.tensor(candidate.labels[name])
    return out


class Visit(NamedTuple):
    """One use of a record; no other visit of a run has the same two numbers."""

    record: int
    epoch: int
    """How many times all records were gone through before."""


def visits(groups: Sequence[int], seed: int, batch: int) -> Iterator[list[Visit]]:
    """Endless reshuffled passes over the records, cut into batches whose records share a group.

    Every pass is its own seeded permutation, so the order needs no state: a resumed run goes through it again to where
    it was. What does not fill a batch of its group waits for the next pass; nothing is dropped.

    Args:
        groups: the group (size) of every record.
        batch: records per batch.
    """
    waiting: defaultdict[int, list[Visit]] = defaultdict(list)
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for record in torch.randperm(len(groups), generator=generator).tolist():
            row = waiting[groups[record]]
            row.append(Visit(record, epoch))
            if len(row) == batch:
                yield list(row)
                row.clear()
