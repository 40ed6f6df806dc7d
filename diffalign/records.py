"""The data store: one JSON line per prompt with its candidates, media files beside it. Torch-free.

Paired, ranked, unpaired and segment-labelled data are the same record with K = 2, K > 2, K = 1 candidates or
list-valued labels. Ties are equal rewards; orientation is never encoded by order.
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, ValidationError, model_validator

from diffalign.errors import UserError
from diffalign.files import refuse_folder, replacing, sync_folder, writing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_PIXELS = 64_000_000
_KINDS = {
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi"), "video"),
    **dict.fromkeys((".npz", ".ply", ".obj"), "mesh"),
}
# what broken files raise in PIL
DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Model):
    """One turn of a conversation."""

    role: str
    content: str


class Candidate(_Model):
    """One answer to a prompt: either media or text. ``condition`` overrides the record's."""

    sample: str | None = Field(
        default=None, description="media file, posix path relative to the folder of the records file"
    )
    text: str | list[Message] | None = None
    condition: str | None = None
    labels: dict[str, StrictFloat | list[StrictFloat]] = Field(default_factory=dict, description="or one per unit")
    origin: dict[str, Any] = Field(default_factory=dict, description="model, seed, sampler, steps, guidance ...")
    errors: dict[str, str] = Field(default_factory=dict, description="label -> why a scorer could not give it")

    @model_validator(mode="after")
    def _is_sound(self) -> Candidate:
        if (self.sample is None) == (self.text is None):
            raise ValueError("exactly one of 'sample' and 'text' must be given")
        empty = next((name for name, value in self.labels.items() if value == []), None)
        if empty is not None:
            raise ValueError(f"label {empty!r} is an empty list")
        _require_finite({"labels": self.labels, "origin": self.origin})
        return self


class Record(_Model):
    """One prompt and its candidates. ``meta`` holds what only some stages read (GenEval metadata, score details)."""

    id: str = Field(min_length=1)
    prompt: str | list[Message]
    condition: str | None = None
    source: str | None = None
    candidates: list[Candidate] = Field(default_factory=list)
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_sound(self) -> Record:
        _require_finite({"meta": self.meta})
        return self


def plain(content: str | Sequence[Message]) -> str | list[dict[str, str]]:
    """Text as it is, a conversation as plain dictionaries."""
    return content if isinstance(content, str) else [message.model_dump() for message in content]


def plain_text(content: str | Sequence[Message]) -> str:
    """A lone message is its content; a conversation has a ``role: content`` line per message."""
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return content[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in content)


def _require_finite(value: Any, where: str = "") -> None:
    """Refuse NaN, infinity and bytes anywhere in a JSON value; ``ValueError`` names the place, e.g. ``labels.clip``."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _require_finite(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _require_finite(inner, f"{where}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, not a finite number")
    elif isinstance(value, bytes):
        raise ValueError(f"{where} is bytes, which JSON cannot express")


def explain(error: ValidationError) -> str:
    """A validation error as one line."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        reason = str(item.get("ctx", {}).get("error", item["msg"]))
        parts.append(f"{where}: {reason}" if where else reason)
    return "; ".join(parts)


def _parse_line(line: bytes, where: str) -> Record:
    if not line.endswith(b"\n"):
        raise UserError(
            f"{where}: the last line is cut off (no newline at its end); re-run the stage that writes this file"
        )
    try:
        content = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    name = f"record {content['id']!r}: " if isinstance(content, dict) and "id" in content else ""
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {name}{explain(error)}") from None


def _parse(handle: BinaryIO, path: Path) -> Iterator[Record]:
    seen: dict[str, int] = {}
    for number, line in enumerate(handle, 1):
        record = _parse_line(line, f"{path}:{number}")
        if record.id in seen:
            raise UserError(f"{path}:{number}: id {record.id!r} is already on line {seen[record.id]}; ids are unique")
        seen[record.id] = number
        yield record


def read(path: str | Path) -> Iterator[Record]:
    """Stream the records of a file.

    Raises:
        UserError: there is no such file, it holds no record, or a line (named by its number) is not a sound record.
    """
    path = Path(path)
    refuse_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such records file")
    with path.open("rb") as handle:
        empty = True
        for record in _parse(handle, path):
            empty = False
            yield record
    if empty:
        raise UserError(f"{path}: the file is empty; re-run the stage that writes it")


def _line(record: Record) -> bytes:
    """A record as the line that reads back to it."""
    content = record.model_dump(exclude_defaults=True)
    try:
        _require_finite(content)
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"record {record.id!r} cannot be written: {error}") from None


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Write a records file all at once: after a failure or a crash ``path`` is what it was before.

    Raises:
        UserError: there is nothing to write, an id occurs twice, or a record holds NaN or what JSON cannot express.
    """
    with writer(path) as put:
        for record in records:
            put(record)


@contextmanager
def writer(path: str | Path) -> Iterator[Callable[[Record], None]]:
    """What :func:`write` does, one record at a time: for several files that are filled together."""
    path = Path(path)
    seen: set[str] = set()
    with replacing(path) as handle:

        def put(record: Record) -> None:
            if record.id in seen:
                raise UserError(f"{path}: two records have the id {record.id!r}; ids are unique")
            seen.add(record.id)
            handle.write(_line(record))

        yield put
        if not seen:
            raise UserError(f"{path}: no records to write")


class Appender:
    """The output of a resumable stage, as a context manager.

    Opening creates the file, or cuts a torn last line (the trace of a crash) and collects the ids already there in
    ``done``.

    Raises:
        UserError: what the file already holds are not sound records.
    """

    done: set[str]
    _handle: BinaryIO

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.done = set()

    def __enter__(self) -> Appender:
        refuse_folder(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self.path.open("a+b")
        try:
            sync_folder(self.path.parent)
            _cut_torn_line(self._handle)
            self._handle.seek(0)
            self.done = {record.id for record in _parse(self._handle, self.path)}
        except BaseException:
            self._handle.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with writing(self.path):
            self._handle.close()

    def append(self, records: Iterable[Record]) -> None:
        """Write whole lines and wait until they are on disk. Nothing is written if any of the records is unsound."""
        ids: set[str] = set()
        lines = []
        for record in records:
            if record.id in self.done or record.id in ids:
                raise UserError(f"{self.path}: id {record.id!r} is already there; ids are unique")
            ids.add(record.id)
            lines.append(_line(record))
        with writing(self.path):
            self._handle.write(b"".join(lines))
            self._handle.flush()
            os.fsync(self._handle.fileno())
        self.done |= ids


def _cut_torn_line(handle: BinaryIO) -> None:
    handle.seek(0)
    whole = sum(len(line) for line in handle if line.endswith(b"\n"))
    handle.truncate(whole)


def media_path(root: Path, relative: str) -> Path:
    """The media file that ``relative`` names inside the folder ``root``, links resolved.

    Raises:
        UserError: the path is absolute, contains ``..``, or leaves the folder through a link.
    """
    windows = PureWindowsPath(relative)
    plain = relative and not windows.drive and not windows.root and "\\" not in relative and "\0" not in relative
    if not plain or ".." in PurePosixPath(relative).parts:
        raise UserError(f"media path {relative!r}: must be relative to {root}, with '/' and without '..'")
    try:
        base = root.resolve()
        path = (base / relative).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UserError(f"media path {relative!r}: {error}") from None
    if not path.is_relative_to(base):
        raise UserError(f"media path {relative!r}: a link leads out of {root}; copy the file into the folder")
    return path


def media_kind(name: str) -> str:
    """``"image"``, ``"video"`` or ``"mesh"``, by the ending of a media file."""
    return _KINDS.get(PurePosixPath(name).suffix.lower(), "image")


def read_image(root: Path, relative: str, *, keep_alpha: bool = False) -> Image.Image:
    """A media file as an upright RGB image; transparency is laid over white, or kept (RGBA).

    Raises:
        UserError: the file is missing, broken, no image, not 8 bits per channel, or above ``MAX_PIXELS``.
    """
    from PIL import Image, ImageOps

    path = media_path(root, relative)
    if not path.is_file():
        raise UserError(f"{path}: no such image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # PIL would clip these to white
                    raise UserError(f"{path}: mode {image.mode} has more than 8 bits per channel; convert it first")
                if image.width * image.height <= MAX_PIXELS:
                    return _flatten(ImageOps.exif_transpose(image), keep_alpha)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except DECODER_ERRORS as error:
        raise UserError(f"{path}: truncated or not an image: {error}") from None
    raise UserError(f"{path}: more than {MAX_PIXELS:,} pixels; scale it down")


def image_size(root: Path, relative: str) -> tuple[int, int]:
    """Width and height of a picture, from its header alone.

    Raises:
        UserError: the file is missing or no image.
    """
    from PIL import Image

    path = media_path(root, relative)
    try:
        with Image.open(path) as image:
            return image.size
    except DECODER_ERRORS as error:
        raise UserError(f"{path}: truncated or not an image: {error}") from None


def _flatten(image: Image.Image, keep_alpha: bool) -> Image.Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image if keep_alpha else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def save_image(path: Path, array: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as PNG, all at once; parent folders are made.

    Not synced: an image lost in a power cut is generated again.
    """
    import numpy as np
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"expected uint8 (H, W, 3), got {array.dtype} {array.shape}")
    with replacing(path, durable=False) as handle:
        Image.fromarray(np.ascontiguousarray(array)).save(handle, format="PNG")


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """Counts of a data set.

    Returns:
        ``records``; ``candidates``: how many records have how many; ``labels``: name -> count, mean, min, max (a
        list-valued label counts by its mean); ``ties``: records in which two candidates have the same ``reward``;
        ``tasks``: records per ``meta.tag``; ``failed``: label -> candidates that a scorer could not score.
    """
    sizes: Counter[int] = Counter()
    tasks: Counter[str] = Counter()
    values: defaultdict[str, list[float]] = defaultdict(list)
    failed: Counter[str] = Counter()
    ties = 0
    for record in records:
        sizes[len(record.candidates)] += 1
        if "tag" in record.meta:
            tasks[str(record.meta["tag"])] += 1
        rewards = [c.labels["reward"] for c in record.candidates if "reward" in c.labels]
        ties += any(a == b for a, b in combinations(rewards, 2))
        for candidate in record.candidates:
            failed.update(candidate.errors.keys())
            for name, value in candidate.labels.items():
                values[name].append(fmean(value) if isinstance(value, list) else value)
    return {
        "records": sizes.total(),
        "candidates": dict(sorted(sizes.items())),
        "labels": {
            name: {"count": len(v), "mean": fmean(v), "min": min(v), "max": max(v)}
            for name, v in sorted(values.items())
        },
        "ties": ties,
        "tasks": dict(sorted(tasks.items())),
        "failed": dict(sorted(failed.items())),
    }
