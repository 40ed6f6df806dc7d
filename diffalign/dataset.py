"""Records -> Batches. Latents and prompt embeddings are encoded once and kept on disk; order depends on position only.

The cache is disposable: shards of safetensors named by a digest of everything that decides their content (family,
revision, resolution, records, media bytes), holding the posterior's mean and log-variance rather than a draw. A shard
is written aside and renamed, so a killed or concurrent writer can leave nothing half-written behind.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffalign import records as store
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.methods import needs
from diffalign.records import Record
from diffalign.types import Batch, Condition, Method

SHARD = 512  # records per cache file
DERIVED = ("ids", "state")
"""Labels that come from texts themselves, (B, K, U): the id of every predicted token, and 1 where a step begins."""


class Encoder(Protocol):
    """What the dataset needs of an image family."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def image_size(self, size: tuple[int, int] | None) -> tuple[int, int]: ...
    def encode_prompt(self, prompts: Sequence[str]) -> Condition: ...
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...
    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor: ...


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


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A PIL image -> (3, H, W) in [-1, 1]; resized to cover ``size`` and centre-cropped when it differs."""
    height, width = size
    if image.size != (width, height):
        factor = max(width / image.width, height / image.height)
        scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
        image = image.resize(scaled, Image.Resampling.LANCZOS)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def _read_media(record: Record, root: Path) -> list[bytes]:
    paths = [c.sample for c in record.candidates]
    if any(p is None for p in paths) or not isinstance(record.prompt, str):
        raise UserError(f"record {record.id!r}: an image family needs a text prompt and image candidates")
    files = [store.media_path(root, str(p)) for p in paths]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise UserError(f"record {record.id!r}: {missing}: no such image")
    return [file.read_bytes() for file in files]


def _digest(shard: Sequence[Record], root: Path, family: Encoder, size: tuple[int, int]) -> str:
    """A name for the cached encodings of these records that changes whenever they could."""
    h = hashlib.sha256(f"2|{family.name}|{family.fingerprint}|{size}".encode())
    for record in shard:
        h.update(f"|{record.id}|{record.prompt}".encode())
        for content in _read_media(record, root):
            h.update(hashlib.sha256(content).digest())
    return h.hexdigest()[:32]


def _encode_shard(shard: Sequence[Record], root: Path, family: Encoder, size: tuple[int, int]) -> dict[str, Tensor]:
    """``mean`` and ``logvar`` (N, C, h, w) of all candidates in order, ``cond.*`` per distinct prompt."""
    images = [to_tensor(store.read_image(root, str(c.sample)), size) for r in shard for c in r.candidates]
    encoded = [family.encode_image(torch.stack(images[i : i + 64])) for i in range(0, len(images), 64)]
    mean, logvar = (torch.cat(parts).cpu() for parts in zip(*encoded, strict=True))
    texts = list(dict.fromkeys(str(r.prompt) for r in shard))
    rows = torch.tensor([texts.index(str(r.prompt)) for r in shard])
    cond = {f"cond.{name}": value.cpu().contiguous() for name, value in family.encode_prompt(texts).items()}
    return {"mean": mean.contiguous(), "logvar": logvar.contiguous(), "prompt": rows, **cond}


def _open(path: Path) -> Any:
    """A shard of the cache; None if it is not there, or broken, which a power cut can do: it is not synced."""
    try:
        return safe_open(path, framework="pt")
    except (FileNotFoundError, SafetensorError):
        return None


class Dataset:
    """Encoded records with random access by position.

    Args:
        records: checked with :func:`check_records`; K may differ between records, short ones are padded and masked.
        root: folder of the media.
        cache: folder of the cache.
        size: height and width in pixels, None for the model's own.
        progress: called with the number of records encoded so far.
    """

    def __init__(
        self,
        records: Sequence[Record],
        root: Path,
        family: Encoder,
        cache: Path,
        size: tuple[int, int] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.records = records
        self.family = family
        self.k = max(len(r.candidates) for r in records)
        self._shards = []
        self._first: list[int] = []  # row of each record's first candidate within its shard
        resolution = family.image_size(size)
        for start in range(0, len(records), SHARD):
            shard = records[start : start + SHARD]
            path = cache / f"{_digest(shard, root, family, resolution)}.safetensors"
            encoded = _open(path)
            if encoded is None:
                content = save(_encode_shard(shard, root, family, resolution))
                with replacing(path, durable=False) as handle:
                    handle.write(content)
                encoded = safe_open(path, framework="pt")
            self._shards.append(encoded)
            self._first += [0, *itertools.accumulate(len(r.candidates) for r in shard[:-1])]
            progress(start + len(shard))

    def __len__(self) -> int:
        return len(self.records)

    def _latents(self, index: int, name: str) -> Tensor:
        first, n = self._first[index], len(self.records[index].candidates)
        rows = self._shards[index // SHARD].get_slice(name)[first : first + n]
        return torch.cat([rows, rows[:1].expand(self.k - n, *rows.shape[1:])]) if n < self.k else rows

    def _condition(self, index: int) -> Condition:
        shard = self._shards[index // SHARD]
        row = int(shard.get_slice("prompt")[index % SHARD])
        names = [n for n in shard.keys() if n.startswith("cond.")]  # noqa: SIM118 - safe_open is not a mapping
        return {n.removeprefix("cond."): shard.get_slice(n)[row : row + 1] for n in names}

    def batch(self, indices: Sequence[int], generator: torch.Generator, labels: Sequence[str]) -> Batch:
        """(B, K, ...) for the given records; the generator draws from the VAE posterior."""
        mean, logvar = (torch.stack([self._latents(i, n) for i in indices]) for n in ("mean", "logvar"))
        mean, logvar = mean.to(generator.device), logvar.to(generator.device)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        conditions = [self._condition(i) for i in indices]
        cond = {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}
        rows = [self.records[i].candidates for i in indices]
        present = torch.tensor([[j < len(row) for j in range(self.k)] for row in rows], dtype=torch.float32)
        values = {name: label_values(rows, name, self.k) for name in labels}
        latents = self.family.latents(mean, logvar, noise)
        return Batch(latents, cond, values, present=present).to(generator.device)


def label_values(rows: Sequence[Sequence[store.Candidate]], name: str, k: int) -> Tensor:
    """(B, k), or (B, k, U) for a label per unit; padding candidates get zeros and are not present."""
    out = torch.zeros(len(rows), k, *np.shape(rows[0][0].labels[name]))
    for b, row in enumerate(rows):
        for i, candidate in enumerate(row):
            out[b, i] = torch.tensor(candidate.labels[name])
    return out


def order(n: int, seed: int, start: int, count: int) -> Iterator[int]:
    """Record indices at positions ``start .. start + count`` of an endless reshuffled pass over ``n`` records.

    Every epoch is its own seeded permutation, so the order needs no state: a resumed run continues it exactly.
    """
    epoch, permutation = -1, torch.empty(0)
    for position in range(start, start + count):
        if position // n != epoch:
            epoch = position // n
            permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        yield int(permutation[position % n])
