"""Records of text -> Batches of tokens: pairs, lists, unpaired and multi-turn, padded to the longest of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffalign.dataset import DERIVED, label_values
from diffalign.errors import UserError
from diffalign.randomness import Generator, device_of
from diffalign.records import Candidate, Record, plain
from diffalign.types import Batch

Turns = str | list[dict[str, str]]


class Encoder(Protocol):
    """What the dataset needs of a language model."""

    pad: int

    @property
    def breaks(self) -> Tensor: ...
    @property
    def max_tokens(self) -> int | None: ...
    def encode(self, prompt: Turns, completion: Turns) -> tuple[list[int], list[int]]: ...


class TextDataset:
    """Tokenised records with random access by position.

    Args:
        records: checked against the method; K may differ between records.
        max_tokens: longest sequence, None for the model's own. A longer prompt loses its beginning, and a completion
            that is too long by itself its end; ``truncated`` counts the candidates this happened to.
        progress: called with the number of records encoded so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        family: Encoder,
        max_tokens: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.records = records
        self.family = family
        self.k = max(len(r.candidates) for r in records)
        self.groups = [0] * len(records)
        self.truncated = 0
        self._limit = min(max_tokens or 2**31, family.max_tokens or 2**31)
        self._rows: list[list[tuple[list[int], list[int]]]] = []
        for number, record in enumerate(records, 1):
            self._rows.append([self._encode(family, record, candidate) for candidate in record.candidates])
            progress(number)

    def __len__(self) -> int:
        return len(self.records)

    def _encode(self, family: Encoder, record: Record, candidate: Candidate) -> tuple[list[int], list[int]]:
        if candidate.text is None:
            raise UserError(f"record {record.id!r}: a language model needs text candidates, this one is a file")
        try:
            ids, counts = family.encode(plain(record.prompt), plain(candidate.text))
        except UserError as error:
            raise UserError(f"record {record.id!r}: {error}") from None
        if len(ids) > self._limit:
            self.truncated += 1
            start = min(len(ids) - self._limit, counts.index(1) - 1 if 1 in counts else len(ids))
            ids, counts = ids[start : start + self._limit], counts[start : start + self._limit]
        return ids, counts

    def batch(self, indices: Sequence[int], generator: Generator, labels: Sequence[str]) -> Batch:
        """Ids (B, K, L), padded on the right; the mask (B, K, L - 1) is aligned with the predicted token."""
        rows = [self._rows[i] for i in indices]
        width = max(len(ids) for row in rows for ids, _ in row)
        ids = torch.full((len(rows), self.k, width), self.family.pad)
        attention, counts = torch.zeros_like(ids), torch.zeros_like(ids)
        present = torch.zeros(len(rows), self.k)
        for b, row in enumerate(rows):
            for k, (tokens, counted) in enumerate(row):
                ids[b, k, : len(tokens)] = torch.tensor(tokens)
                attention[b, k, : len(tokens)] = 1
                counts[b, k, : len(tokens)] = torch.tensor(counted)
                present[b, k] = 1.0
            attention[b, len(row) :, 0] = 1  # a padding candidate still attends to something, or its logits are NaN
        found = [self.records[i].candidates for i in indices]
        values = {name: label_values(found, name, self.k) for name in labels if name not in DERIVED}
        mask = counts[..., 1:].float()
        if "ids" in labels:
            values["ids"] = ids[..., 1:]
        if "state" in labels:
            values["state"] = self._states(ids, mask)
        return Batch(ids, {"attention": attention}, values, mask, present=present).to(device_of(generator))

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, K, U): 1 for a counted token that begins an answer or follows a line break: a step of reasoning."""
        begins = (mask.cumsum(-1) == 1) | torch.isin(ids[..., :-1], self.family.breaks)
        return mask * begins
