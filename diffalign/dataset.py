"""Records -> Batches of encoded samples, and the order in which a run visits the records."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffalign import media
from diffalign import records as store
from diffalign.encoding import Cut, Encoder, open_shard, samples_of, size_of
from diffalign.errors import UserError
from diffalign.media import Size
from diffalign.methods import needs
from diffalign.randomness import Generator, device_of, rand, randn
from diffalign.records import Record
from diffalign.types import Batch, Condition, Method, joined

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


def check_segments(
    records: Sequence[Record], root: Path, family: Encoder, size: Size | None, labels: Sequence[str]
) -> None:
    """Refuse labels per segment that :func:`frame_labels` cannot map, before anything is encoded.

    Args:
        root: folder of the clips.
        size: frames, height and width that are trained on.
        labels: those that are read; a label of one number per clip always fits.

    Raises:
        UserError: names the record; its segments do not divide the clip, or its clip goes on after the frames that
            are trained on, so that the segments are not theirs.
    """
    frames, units = family.sample_size(size)[0], family.latent_shape(size)[-3]
    for record in records:
        held = {label: np.shape(record.candidates[0].labels[label]) for label in labels}
        lists = {label: shape[0] for label, shape in held.items() if shape}
        for label, count in lists.items():
            if count != units and (units - 1) % count:
                raise UserError(
                    f"record {record.id!r}: {label!r} has {count} segments, which do not divide the {units - 1} latent "
                    f"frames after the first of {frames} frames; give 1 to {units - 1} that do, or {units}, one each"
                )
        for name in samples_of(record, root) if lists else ():
            if (length := media.frame_count(root, name)) != frames:
                raise UserError(
                    f"record {record.id!r}: {name} has {length} frames and labels per segment, {frames} are trained "
                    "on (data.size); cut the clip, and label what is left"
                )


def frame_labels(values: Tensor, units: int) -> Tensor:
    """Labels per segment of a clip (B, K, S) as labels per latent frame (B, K, U).

    A causal video VAE makes the first latent frame of one frame and every later one of as many as it compresses (Wan:
    4). The S segments share the later latent frames equally, and the first segment has the first one, too: of 81
    frames, U = 21, five segments are 17, 16, 16, 16 and 16 frames, a second each at 16 frames per second. No latent
    frame lies in two segments. With S = U the labels are those of latent frames already.
    """
    if values.shape[2] == units:
        return values
    first, later = values[:, :, :1], values.repeat_interleave((units - 1) // values.shape[2], 2)
    return torch.cat([first, later], 2)


class Dataset:
    """Encoded records with random access by position.

    Args:
        records: checked with :func:`check_records`; K may differ between records, short ones are padded and masked.
        root: folder of the media.
        cache: folder of the cache, see :mod:`diffalign.encoding`.
        cut: sizes, crops and flips.
        dropout: share of visits in which the prompt is the empty one.
        progress: called with the number of records encoded so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: Path,
        family: Encoder,
        cache: Path,
        cut: Cut = Cut(),  # noqa: B008 - immutable
        dropout: float = 0.0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.records = records
        self.dropout = dropout
        self.family = family
        self.k = max(len(r.candidates) for r in records)
        sizes = [size_of(record, root, family, cut) for record in records]
        known = sorted(set(sizes))
        self.groups = [known.index(size) for size in sizes]
        self.digest = ""  # of all that is encoded
        self._places: dict[int, _Place] = {}
        for group, size in enumerate(known):
            members = [index for index, own in enumerate(self.groups) if own == group]
            numbers = np.prod(family.latent_shape(size), dtype=int)
            numbers += 3 * np.prod(size, dtype=int) * family.reads_condition  # at most
            length = max(1, min(SHARD, SHARD_NUMBERS // (self.k * numbers)))
            for start in range(0, len(members), length):
                shard = members[start : start + length]
                digest, file = open_shard([records[i] for i in shard], root, family, size, cut, cache)
                self.digest = hashlib.sha256(f"{self.digest}{digest}".encode()).hexdigest()
                first = 0
                for row, index in enumerate(shard):
                    self._places[index] = _Place(file, row, first, len(records[index].candidates))
                    first += len(records[index].candidates)
                progress(len(self._places))

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, indices: Sequence[int], generator: Generator, labels: Sequence[str]) -> Batch:
        """(B, K, ...) for the given records, all of one group.

        The generator, or that of each record, chooses between mirrored samples where there are any, drops prompts, and
        draws from the posterior of the VAE.
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
        dropped = [False] * len(indices)
        if self.dropout:
            dropped = (rand((len(indices), 1), generator)[:, 0] < self.dropout).tolist()
        prompts = [place.prompt(empty) for place, empty in zip(places, dropped, strict=True)]
        cond = {name: value[:, None] for name, value in joined(prompts).items()}
        cond |= {name.removeprefix("each."): value for name, value in zip(names, own, strict=True)}
        rows = [self.records[i].candidates for i in indices]
        present = torch.tensor([[j < len(row) for j in range(self.k)] for row in rows], dtype=torch.float32)
        noise = randn(mean.shape, generator)[torch.arange(len(rows))[:, None], _first_of_sample(rows, self.k)]
        latents = self.family.latents(mean, logvar, noise)
        values = {name: label_values(rows, name, self.k) for name in labels}
        if self.family.modality == "video":
            units = latents.shape[-3]
            values = {name: frame_labels(value, units) if value.ndim > 2 else value for name, value in values.items()}
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

    def prompt(self, empty: bool) -> Condition:
        """(1, ...) of every tensor, of the record's prompt or of the empty one."""
        row = 0 if empty else int(self.file.get_slice("row")[self.row])
        return {n.removeprefix("prompt."): self.file.get_slice(n)[row : row + 1] for n in self.names("prompt.")}


def label_values(rows: Sequence[Sequence[store.Candidate]], name: str, k: int) -> Tensor:
    """(B, k), or (B, k, U) for a label per unit; padding candidates get zeros and are not present."""
    out = torch.zeros(len(rows), k, *np.shape(rows[0][0].labels[name]))
    for b, row in enumerate(rows):
        for i, candidate in enumerate(row):
            out[b, i] = torch.tensor(candidate.labels[name])
    return out


def _first_of_sample(rows: Sequence[Sequence[store.Candidate]], k: int) -> Tensor:
    """(B, k) index of the first candidate with the same sample: one picture under two conditions is one latent."""
    first = torch.arange(k).repeat(len(rows), 1)
    for b, row in enumerate(rows):
        names = [candidate.sample for candidate in row]
        first[b, : len(row)] = torch.tensor([names.index(name) for name in names])
    return first


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
