"""What never changes is computed once: latents and conditions of records, kept on disk in shards.

The cache is disposable. A shard is a safetensors file named by a digest of everything that decides its content (family,
encoders, resolution, crops, records, media bytes), so a changed model never meets an old file. It holds the posterior's
mean and log-variance rather than a draw, and a digest of its own tensors; it is written aside and renamed, so a killed
or a second writer leaves nothing half-written behind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffalign import media
from diffalign import records as store
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.foreign import tensor_digest
from diffalign.media import Modality, Size
from diffalign.records import Record
from diffalign.types import Condition

CHECKSUM = "sha256"


class Encoder(Protocol):
    """What encoding needs of a diffusion family."""

    reads_condition: bool
    aligned_condition: bool

    @property
    def name(self) -> str: ...
    @property
    def modality(self) -> Modality: ...
    @property
    def fingerprint(self) -> str: ...
    def sample_size(self, size: Size | None) -> Size: ...
    def latent_shape(self, size: Size | None) -> tuple[int, ...]: ...
    def encode_prompt(self, prompts: Sequence[str]) -> Condition: ...
    def encode_condition(self, images: Sequence[Image.Image], size: Size) -> Condition: ...
    def encode_geometry(self, views: Iterable[media.View]) -> Condition: ...
    def encode_media(self, samples: Tensor) -> tuple[Tensor, Tensor]: ...
    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor | None) -> Tensor: ...


class Cut(NamedTuple):
    """How the media of a data set are brought to the size of the network."""

    size: Size | None = None
    """Frames if a clip, height, width; None for the model's own."""
    buckets: int | None = None
    """Choose each record's own aspect ratio, in multiples of so many pixels, within the area of ``size``."""
    crop: Literal["centre", "random"] = "centre"
    """``random`` is decided by the record, for all its candidates."""
    flip: bool = False
    """Encode every sample mirrored as well; training then takes one of the two per record and visit."""

    def place(self, record: Record) -> tuple[float, float]:
        """Where a record's media are cropped."""
        return media.crop_place(record.id) if self.crop == "random" else (0.5, 0.5)


def samples_of(record: Record, root: Path) -> list[str]:
    """The media files of a record's candidates.

    Raises:
        UserError: a candidate is text, the prompt is a conversation, or a file is missing.
    """
    names = [candidate.sample for candidate in record.candidates]
    if any(name is None for name in names) or not isinstance(record.prompt, str):
        raise UserError(f"record {record.id!r}: a diffusion family needs a text prompt and media candidates")
    for name in (*names, *conditions_of(record)):
        if not (file := store.media_path(root, str(name))).is_file():
            raise UserError(f"record {record.id!r}: {file}: no such image, clip or mesh")
    return [str(name) for name in names]


def conditions_of(record: Record) -> list[str]:
    """The condition files of a record's candidates; empty if there are none."""
    names = [candidate.condition or record.condition for candidate in record.candidates]
    return [name for name in names if name is not None]


def size_of(record: Record, root: Path, family: Encoder, cut: Cut) -> Size:
    """The size a record's candidates are encoded at: one for all of them."""
    size = family.sample_size(cut.size)
    if cut.buckets is None:
        return size
    sizes = [media.picture_size(family.modality, root, name) for name in samples_of(record, root)]
    heights, widths = zip(*sizes, strict=True)
    own = media.bucket(sum(heights) / sum(widths), (size[-2], size[-1]), cut.buckets)
    return family.sample_size((*size[:-2], *own))


def shard_digest(shard: Sequence[Record], root: Path, family: Encoder, size: Size, cut: Cut) -> str:
    """A name for the encodings of these records that changes whenever they could."""
    h = hashlib.sha256(f"4|{family.name}|{family.fingerprint}|{size}|{cut.crop}|{cut.flip}".encode())
    for record in shard:
        h.update(f"|{record.id}|{record.prompt}".encode())
        for name in (*samples_of(record, root), *conditions_of(record)):
            h.update(hashlib.sha256(store.media_path(root, name).read_bytes()).digest())
    return h.hexdigest()[:32]


def encode_shard(shard: Sequence[Record], root: Path, family: Encoder, size: Size, cut: Cut) -> dict[str, Tensor]:
    """All candidates in order: ``mean`` and ``logvar`` (N, V, ...), V = 2 if mirrored ones are wanted.

    ``prompt.*`` holds a row per distinct prompt, the empty one first, and ``row`` (records,) says which; ``each.*``
    (N, V, ...) what a condition image or the geometry of a picture gives.
    """
    pairs = [(record, name) for record in shard for name in samples_of(record, root)]
    flips = (False, True) if cut.flip else (False,)
    encoded = {}
    for flip in flips:
        read = (media.read(family.modality, root, name, size, cut.place(record)) for record, name in pairs)
        parts = [family.encode_media(batch) for batch in _batches(part.flip(-1) if flip else part for part in read)]
        encoded[flip] = [torch.cat(found).cpu() for found in zip(*parts, strict=True)]
    mean, logvar = (torch.stack([encoded[flip][i] for flip in flips], 1) for i in range(2))
    prompts = list(dict.fromkeys(("", *(str(record.prompt) for record in shard))))
    rows = torch.tensor([prompts.index(str(record.prompt)) for record in shard])
    texts = {f"prompt.{name}": value for name, value in family.encode_prompt(prompts).items()}
    each = [_each(shard, root, family, size, cut, flip) for flip in flips]
    own = {f"each.{name}": torch.stack([variant[name] for variant in each], 1) for name in each[0]}
    tensors = {"mean": mean, "logvar": logvar, "row": rows, **texts, **own}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def _each(shard: Sequence[Record], root: Path, family: Encoder, size: Size, cut: Cut, flip: bool) -> Condition:
    """What belongs to a candidate rather than to its prompt: the geometry of its picture, and its condition image."""
    views = (  # opened only for a family that is told of them
        media.view(media.picture_size(family.modality, root, name), (size[-2], size[-1]), cut.place(record))
        for record in shard
        for name in samples_of(record, root)
    )
    found = family.encode_geometry(views)
    if family.reads_condition:
        for record in shard:
            if len(conditions_of(record)) < len(record.candidates):
                raise UserError(f"record {record.id!r}: {family.name} needs a condition image, see `condition`")
        images = [
            _condition_image(record, root, name, family, size, cut)
            for record in shard
            for name in conditions_of(record)
        ]
        images = [ImageOps.mirror(image) for image in images] if flip else images
        found = {**found, **family.encode_condition(images, size)}
    return found


def _condition_image(record: Record, root: Path, name: str, family: Encoder, size: Size, cut: Cut) -> Image.Image:
    """A condition image as it is, or cut as the sample is that it lies on."""
    image = store.read_image(root, name, keep_alpha=True)
    if not family.aligned_condition:
        return image
    return media.cut(image, media.view((image.height, image.width), (size[-2], size[-1]), cut.place(record)))


def _batches(samples: Iterator[Tensor], most: int = 2**26) -> Iterator[Tensor]:
    """Samples of one shape in batches of at most 64 samples and, from two on, at most ``most`` numbers."""
    waiting: list[Tensor] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) == max(1, min(64, most // sample.numel())):
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def write_checked(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their own digest, whole or not at all."""
    content = save(dict(tensors), metadata={CHECKSUM: tensor_digest(sorted(tensors.items()))})
    with replacing(path, durable=False) as handle:
        handle.write(content)


def open_checked(path: Path) -> Any:
    """An open safetensors file whose tensors are those that were written; None if it is not there, or broken."""
    try:
        file = safe_open(path, framework="pt")
        names = sorted(file.keys())
        whole = tensor_digest((name, file.get_tensor(name)) for name in names)
        return file if (file.metadata() or {}).get(CHECKSUM) == whole else None
    except (FileNotFoundError, SafetensorError):
        return None


def open_shard(
    shard: Sequence[Record], root: Path, family: Encoder, size: Size, cut: Cut, cache: Path
) -> tuple[str, Any]:
    """The encodings of records of one size, from the cache or made now, and the digest that names them."""
    digest = shard_digest(shard, root, family, size, cut)
    path = cache / f"{digest}.safetensors"
    file = open_checked(path)
    if file is None:
        write_checked(path, encode_shard(shard, root, family, size, cut))
        file = safe_open(path, framework="pt")
    return digest, file
