"""What a reward server and its clients say to each other, version 1. Nothing on the wire is ever unpickled.

``GET /health`` answers JSON: ``version``, ``scorers`` (label -> ``accepts``, ``together``), ``limits`` (``items`` and
``bytes`` per request), and what the server is doing (``queued``, ``counts``).

``POST /score`` takes a body of type :data:`CONTENT_TYPE`: four bytes, the big-endian length of a header; the header,
JSON in UTF-8; then the bytes of all files, one after another, as the header lists them::

    {"version": 1, "scorer": "hps", "timeout": 60, "items": [
        {"key": "7f3a-0", "prompt": "a cat", "files": [{"role": "image", "suffix": ".png", "bytes": 81920}]},
        {"key": "7f3a-1", "prompt": "a cat", "meta": {}, "text": "Meow."}]}

A file's ``role`` is ``image``, ``video``, ``mesh`` or ``condition``; an item has a text or one file that is no
condition. ``key`` is chosen by the client and names the item for good: asking again under the same key scores nothing
again, another item under a known key fails. Those items of one request that a comparing scorer sees together stay
together when they are asked for again.

The answer is JSON: ``{"version": 1, "items": [...]}``, in the order of the request, each with its ``key`` and a
``status``: ``ok`` with ``value``, ``units`` and ``detail``; ``failed`` with ``kind`` and ``reason``; or ``timeout``:
not scored yet, ask again. A request that is refused as a whole has another status than 200 and ``{"error": reason}``:
400 malformed or another version, 401 wrong token, 404 unknown scorer, 408 too slow, 413 too large, 415 another type,
422 not what the scorer reads, 429 full (with ``Retry-After``), 503 the outcome could not be kept.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffalign.errors import UserError
from diffalign.records import explain, media_kind, read_image
from diffalign.scoring import Failure, Outcome, Sample, Score

VERSION = 1
CONTENT_TYPE = "application/vnd.diffalign.score"
LARGEST_HEADER = 16 << 20
ENVELOPE = 1 << 10
"""Bytes of a request beside its items, at most."""
_LENGTH = struct.Struct(">I")
_MEDIA = ("image", "video", "mesh")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Model):
    """One file of an item. It has no name: only its ending travels."""

    role: Literal["image", "video", "mesh", "condition"]
    suffix: str = Field(pattern=r"^\.[a-z0-9]{1,5}$")
    bytes: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_sound(self) -> File:
        if self.role in _MEDIA and media_kind(f"file{self.suffix}") != self.role:
            raise ValueError(f"{self.suffix} is no ending of a file of kind {self.role}")
        return self


class Item(_Model):
    """What is to be scored, without the content of its files."""

    key: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    prompt: str
    text: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)
    files: tuple[File, ...] = ()

    @model_validator(mode="after")
    def _is_sound(self) -> Item:
        roles = [file.role for file in self.files]
        if len(set(roles)) < len(roles):
            raise ValueError("two files of one role")
        if (self.text is not None) + len(set(roles) & set(_MEDIA)) != 1:
            raise ValueError("expected a text or one image, video or mesh")
        return self

    @property
    def kind(self) -> str:
        """Of :data:`diffalign.scoring.KINDS`."""
        return next((file.role for file in self.files if file.role in _MEDIA), "text")


class Question(_Model):
    """The header of a request."""

    version: int
    scorer: str = Field(max_length=200)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="seconds to wait for outcomes")
    items: tuple[Item, ...] = Field(min_length=1)


class Parcel:
    """An item with its files."""

    def __init__(self, item: Item, contents: Sequence[bytes | memoryview]) -> None:
        self.item, self.contents = item, contents
        header = json.dumps(item.model_dump(exclude_defaults=True))
        self.size = len(header) + 2 + sum(map(len, contents))
        """Bytes that it adds to a request."""
        digest = hashlib.sha256(json.dumps(item.model_dump(exclude={"key"})).encode())
        for content in contents:
            digest.update(content)
        self.digest = digest.hexdigest()
        """Of everything but the key."""


# --- requests -----------------------------------------------------------------------------------------------------


def pack(scorer: str, parcels: Sequence[Parcel], timeout: float | None) -> bytes:
    """A request as bytes."""
    question = Question(version=VERSION, scorer=scorer, timeout=timeout, items=tuple(p.item for p in parcels))
    header = json.dumps(question.model_dump(exclude_defaults=True)).encode()
    return b"".join([_LENGTH.pack(len(header)), header, *(content for p in parcels for content in p.contents)])


def unpack(body: bytes) -> tuple[Question, list[Parcel]]:
    """What :func:`pack` packed; the contents are views of ``body``.

    Raises:
        UserError: one line about what is wrong with it.
    """
    if len(body) < _LENGTH.size:
        raise UserError("body: shorter than its length field")
    (length,) = _LENGTH.unpack_from(body)
    if length > min(LARGEST_HEADER, len(body) - _LENGTH.size):
        raise UserError(f"body: a header of {length} bytes does not fit")
    start = _LENGTH.size + length
    try:
        content = json.loads(body[_LENGTH.size : start].decode(), parse_constant=_no_constant)
        if isinstance(content, dict) and content.get("version") != VERSION:
            raise UserError(f"version: this server speaks version {VERSION}, not {str(content.get('version'))[:20]}")
        question = Question.model_validate(content)
    except ValidationError as error:
        raise UserError(f"header: {explain(error)[:500]}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"header: not valid JSON: {str(error)[:200]}") from None
    keys = [item.key for item in question.items]
    if len(set(keys)) < len(keys):
        raise UserError("header: two items have the same key")
    return question, _parcels(question, memoryview(body), start)


def _parcels(question: Question, body: memoryview, start: int) -> list[Parcel]:
    owed = sum(file.bytes for item in question.items for file in item.files)
    if owed != len(body) - start:
        raise UserError(f"body: {len(body) - start} bytes of files, but the header lists {owed}")
    parcels = []
    for item in question.items:
        contents = []
        for file in item.files:
            contents.append(body[start : start + file.bytes])
            start += file.bytes
        parcels.append(Parcel(item, contents))
    return parcels


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parcel(key: str, sample: Sample) -> Parcel:
    """A sample as it travels: pictures as PNG, which keeps every pixel.

    Raises:
        UserError: a file of it cannot be read, or its ``meta`` is no JSON.
    """
    files, contents = [], []
    for role in (*_MEDIA, "condition"):
        value = getattr(sample, role)
        if value is None:
            continue
        content = _png(value) if role == "image" else _content(value)
        files.append(
            {"role": role, "suffix": ".png" if role == "image" else value.suffix.lower(), "bytes": len(content)}
        )
        contents.append(content)
    try:
        meta = json.loads(json.dumps(dict(sample.meta), allow_nan=False))
        content = {"key": key, "prompt": sample.prompt, "text": sample.text, "meta": meta, "files": files}
        return Parcel(Item.model_validate(content), contents)
    except ValidationError as error:
        raise UserError(explain(error)) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"meta: {error}") from None


def _png(image: Any) -> bytes:
    import io

    held = io.BytesIO()
    image.save(held, format="PNG", compress_level=1)
    return held.getvalue()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or 'not readable').lower()}") from None


def unpacked(parcel: Parcel, folder: Path, max_pixels: int) -> Sample:
    """The sample of a parcel; its files are written into an empty folder and stay there for the scorer.

    Raises:
        UserError: a picture is broken or has more than ``max_pixels``.
    """
    item = parcel.item
    given: dict[str, Any] = {"text": item.text, "meta": item.meta}
    for file, content in zip(item.files, parcel.contents, strict=True):
        path = folder / f"{file.role}{file.suffix}"
        path.write_bytes(content)
        given[file.role] = path
        if file.role == "image":
            _check_pixels(path, max_pixels)
            given["image"] = read_image(folder, path.name)
    return Sample(item.prompt, **given)


def _check_pixels(path: Path, most: int) -> None:
    """Refuse a picture by what its header says, before anything is decoded."""
    import warnings

    from PIL import Image

    from diffalign.records import DECODER_ERRORS

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = most + 1
    except DECODER_ERRORS as error:
        raise UserError(f"{path}: truncated or not an image: {error}") from None
    if pixels > most:
        raise UserError(f"{path}: more than {most:,} pixels; scale it down")


# --- answers ------------------------------------------------------------------------------------------------------


def to_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as it is kept and answered; details that are no JSON make it a failure."""
    if isinstance(outcome, Failure):
        return {"status": "failed", "kind": outcome.kind, "reason": outcome.reason}
    units = None if outcome.units is None else list(outcome.units)
    answer = {"status": "ok", "value": outcome.value, "units": units, "detail": dict(outcome.detail)}
    try:
        json.dumps(answer, allow_nan=False)
    except (TypeError, ValueError) as error:
        return to_json(Failure(type(error).__name__, f"detail: {error}"))
    return answer


def from_json(answer: Mapping[str, Any]) -> Outcome:
    """The outcome of one item of an answer.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    status = answer["status"]
    if status == "ok":
        units = answer["units"]
        return Score(
            float(answer["value"]), None if units is None else tuple(map(float, units)), dict(answer["detail"])
        )
    if status == "failed":
        return Failure(str(answer["kind"]), str(answer["reason"]))
    if status == "timeout":
        return Failure("timeout", "not scored in time")
    raise ValueError(f"status {status!r}")
