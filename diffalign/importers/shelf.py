"""The media folder of an import: what is put there, under which name, and what is refused."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.records import DECODER_ERRORS, MAX_PIXELS, media_path

PICTURES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
"""Formats that are kept as they are, and the suffix that their content gets whatever it was called."""
PICTURE_SUFFIXES = (*PICTURES.values(), ".jpeg")
OTHERS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif", ".npz", ".ply", ".glb", ".obj")
"""Clips, voxels and meshes, which keep their suffix."""
REMEMBERED = 1 << 16


class Shelf:
    """Stores media under the digest of their content, so that what occurs twice is there once.

    A picture's header is read; that all of it decodes is not checked, which would take hours for a large data set.

    Args:
        out: the folder of the records; media go to ``media/ab/ab....jpg`` in it.
        root: the folder that the paths of a data set are relative to and never leave.
        link: give a file a second name instead of a copy.
        write: False only checks.
    """

    def __init__(self, out: Path, root: Path, *, link: bool = False, write: bool = True) -> None:
        self.out, self.root, self.link, self.write = out, root, link, write
        self._names: dict[bytes, str] = {}  # of recent pictures: a data set often shows one again soon

    def keep(self, content: Any) -> str:
        """Store the bytes of a picture; its path for a record.

        Raises:
            UserError: no bytes, or not those of a JPEG, PNG or WebP.
        """
        if isinstance(content, dict):  # an `Image` column of the Hub
            content = content.get("bytes")
        if not isinstance(content, bytes) or not content:
            raise UserError(f"expected the bytes of a picture, found {type(content).__name__}")
        digest = hashlib.sha256(content).digest()
        name = self._names.get(digest)
        if name is None:
            name = _name(digest.hex(), _suffix(io.BytesIO(content), "a picture"))
            path = self.out / name
            if self.write and not path.exists():
                with replacing(path, durable=False) as handle:
                    handle.write(content)
            if len(self._names) >= REMEMBERED:
                self._names.clear()
            self._names[digest] = name
        return name

    def take(self, relative: Any) -> str:
        """Store a file of the data set; its path for a record.

        Raises:
            UserError: the path leaves the folder, there is no such file, or it is neither a picture nor a clip.
        """
        try:
            relative.encode()
        except (AttributeError, UnicodeEncodeError):  # no text, or a file name that is not UTF-8
            raise UserError(f"expected the path of a file, found {str(relative)[:40]!r}") from None
        path = media_path(self.root, relative)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        suffix = path.suffix.lower()
        with path.open("rb") as handle:
            if suffix not in OTHERS:
                suffix = _suffix(handle, str(path))
                handle.seek(0)
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        name = _name(digest, suffix)
        target = self.out / name
        if self.write and not target.exists():
            self._place(path, target)
        return name

    def restore(self, relative: str, content: bytes) -> str:
        """Store media that had a path in the records it comes from under that path again.

        Raises:
            UserError: the path leaves the folder, is not that of media, or is taken by something else.
        """
        path = media_path(self.out, relative)
        if path.suffix.lower() not in (*PICTURE_SUFFIXES, *OTHERS):
            raise UserError(f"media path {relative!r}: is not that of a picture or a clip")
        if path.suffix.lower() in PICTURE_SUFFIXES:
            _suffix(io.BytesIO(content), relative)
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{path}: is there already, with another content")
        if self.write and not path.exists():
            with replacing(path, durable=False) as handle:
                handle.write(content)
        return relative

    def _place(self, path: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.link:
            with path.open("rb") as source, replacing(target, durable=False) as handle:
                shutil.copyfileobj(source, handle)
            return
        try:
            os.link(path, target)
        except OSError as error:
            raise UserError(f"link: {path}: {error.strerror}; set link=false to copy") from None


def _name(digest: str, suffix: str) -> str:
    return f"media/{digest[:2]}/{digest[:32]}{suffix}"


def _suffix(handle: BinaryIO, what: str) -> str:
    """By content.

    Raises:
        UserError: not a picture, or a huge one.
    """
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(handle, formats=tuple(PICTURES)) as image,
        ):
            if image.width * image.height <= MAX_PIXELS:
                return PICTURES[str(image.format)]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except DECODER_ERRORS as error:
        raise UserError(f"{what}: truncated, or neither JPEG, PNG nor WebP: {type(error).__name__}") from None
    raise UserError(f"{what}: more than {MAX_PIXELS:,} pixels; scale it down")
