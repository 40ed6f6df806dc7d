"""The reference's errors on a fixed bank of draws per record, computed once and kept beside the latents.

With ``data.bank: M`` the time and noise of a record repeat after M passes. A frozen reference then has the same error
each time, and for every method and beta that draws and measures alike, so later passes and later runs need no forward
of it. The file is named by a digest of everything the errors depend on: a changed model never meets an old file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign import draws, estimate
from diffalign.dataset import Visit
from diffalign.encoding import open_checked, write_checked
from diffalign.errors import UserError
from diffalign.foreign import tensor_digest
from diffalign.methods import needs
from diffalign.types import Method

REPEATABLE = (draws.forward, draws.repeated)
"""Draws that depend on nothing but the record and its random numbers."""


def check_method(method: Method) -> None:
    """Refuse a method whose reference has to be run every time.

    Raises:
        UserError: it says why.
    """
    draw, measure = _plain(method.main.draw), _plain(method.main.estimate)
    needed = needs(*method.terms)
    if draw[0] not in REPEATABLE or measure[0] is not estimate.denoising:
        raise UserError(
            f"data.bank: {method.name} does not measure plain denoising errors on draws that can be repeated"
        )
    if needed.roles != ("reference",) or any(entry.startswith("gap") for entry in needed.reads):
        read = ", ".join((*needed.roles, *needed.reads)) or "no reference"
        raise UserError(f"data.bank: keeps the errors of the reference alone; {method.name} reads {read}")
    if any(term.draw is not None and needs(term).roles for term in method.extra):
        raise UserError(f"data.bank: {method.name} runs the reference on a second draw")


def _plain(part: Callable[..., Any] | None) -> tuple[Any, dict[str, Any]]:
    """A function and the keywords that partials of it have set."""
    given: dict[str, Any] = {}
    while isinstance(part, partial):
        part, given = part.func, {**part.keywords, **given}
    return part, given


def identity(method: Method, networks: Sequence[nn.Module], *also: object) -> str:
    """A digest of what decides the errors: the draw, what is measured, the networks without what trains, the rest."""
    draw, settings = _plain(method.main.draw)
    frames = _plain(method.main.estimate)[1].get("frames", False)
    note = f"1|{draw.__name__}|{sorted(settings.items())}|{frames}|{also}"
    for net in networks:
        state = net.state_dict()
        frozen = [name for name in state if "lora_" not in name or ".reference." in name]
        note += tensor_digest(sorted((name.replace(".base_layer", ""), state[name]) for name in frozen))
    return hashlib.sha256(note.encode()).hexdigest()[:32]


class Bank:
    """Errors (records, draws, K, U), NaN where they are not known yet.

    Args:
        path: where they are kept.
        records: number of records.
        draws: M, how many draws each has.
    """

    def __init__(self, path: Path, records: int, draws: int) -> None:
        self.path = path
        self.records = records
        self.draws = draws
        self.errors = self._stored()

    def _stored(self) -> Tensor | None:
        file = open_checked(self.path)
        return None if file is None else file.get_tensor("errors")

    def key(self, visit: Visit) -> Visit:
        """What a visit shares with the visits that see the same draw."""
        return Visit(visit.record, visit.epoch % self.draws)

    def known(self, chosen: Sequence[Visit]) -> Tensor | None:
        """(B, K, U) for these visits, None unless all are known."""
        if self.errors is None:
            return None
        found = torch.stack([self.errors[self.key(visit)] for visit in chosen])
        return None if found.isnan().any() else found

    def put(self, chosen: Sequence[Visit], errors: Tensor) -> None:
        """Note the errors (B, K, U) of these visits."""
        found = errors.detach().float().cpu()
        if self.errors is None:
            self.errors = torch.full((self.records, self.draws, *found.shape[1:]), torch.nan)
        for visit, row in zip(chosen, found, strict=True):
            self.errors[self.key(visit)] = row

    def save(self, total: Callable[[Tensor], Tensor], *, write: bool) -> None:
        """Put together what all ranks and other runs found, and write it.

        A run that writes at the same moment may lose what it found; no file is ever half-written.

        Args:
            total: the sum of a tensor over ranks.
            write: whether this process does.
        """
        if self.errors is None:
            return
        mine = ~self.errors.isnan()
        count = total(mine.float())
        values = total(self.errors.nan_to_num()) / count
        self.errors = values.where(count > 0, torch.nan)
        if write:
            stored = self._stored()
            if stored is not None and stored.shape == self.errors.shape:
                self.errors = torch.where(self.errors.isnan(), stored, self.errors)
            write_checked(self.path, {"errors": self.errors})
