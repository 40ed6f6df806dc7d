"""Files that appear whole or not at all, and outputs that know what they were made from. Torch-free."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from diffalign.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Notes the file on the error of a failed write: the operating system and the libraries leave that out."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "where"):
            error.where = str(path)  # type: ignore[attr-defined]
        raise


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file written aside that takes the place of ``path`` on success and vanishes on failure.

    ``durable`` also survives a power cut, for two fsyncs. Parent folders are made.
    """
    refuse_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with writing(path), aside.open("xb") as handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in the folder durable, where the system can (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_folder(path: Path) -> None:
    """Refuse a path that should be a file and is a folder."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file")


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A folder written aside that takes the place of ``target`` once all of it is on disk."""
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with writing(target):
            yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
            else:
                sync_folder(path)
        sync_folder(aside)
        remove_folder(target)
        aside.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there, so that no crash leaves a part of it under its name."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what killed writers left aside in a folder that nobody else is writing to."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, atomically."""
    with replacing(path) as handle:
        handle.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def sidecar_of(output: Path) -> Path:
    """The file beside a stage's output that says what it was made from and how many records it owes."""
    return output.with_name(f"{output.name}.meta.json")


def claim(
    output: Path,
    identity: dict[str, Any],
    *parts: Path,
    write: bool = True,
    advice: str = "choose another `out` or delete it",
) -> None:
    """Tie a resumable output to what decides its content: new outputs note it in their sidecar, old ones must match.

    Args:
        identity: with ``count``, the number of records of the finished output, for :func:`require_complete`.
        parts: what belongs to the output beside it, such as its media folder.
        advice: what to do about an output of something else.

    Raises:
        UserError: the output was made from something else, or by something else.
    """
    sidecar = sidecar_of(output)
    made = next((path for path in (output, *parts) if _holds_something(path)), None)
    if made is None:
        if write:
            write_json(sidecar, identity)
        return
    if not sidecar.is_file():
        raise UserError(f"{made}: exists without its {sidecar.name}, so it cannot be continued; {advice}")
    try:
        known = json.loads(sidecar.read_bytes())
    except ValueError:
        raise UserError(f"{sidecar}: not readable; {advice}") from None
    same = known.keys() if isinstance(known, dict) else {}
    changed = [key for key in identity if key not in same or known[key] != identity[key]]
    if changed:
        raise UserError(f"{output}: was made with different {', '.join(changed)} (see {sidecar.name}); {advice}")


def require_complete(source: Path, found: int) -> None:
    """Refuse the output of a stage that was stopped before its last record; files without a sidecar are foreign.

    Raises:
        UserError: how much is there, and to run the stage again.
    """
    sidecar = sidecar_of(source)
    if not sidecar.is_file():
        return
    try:
        count = json.loads(sidecar.read_bytes())["count"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{sidecar}: not readable; delete it if {source.name} is complete") from None
    if count is None:
        raise UserError(f"{source}: is not finished; run the stage that writes it again")
    if found != count:
        way = f"run the stage that writes it again, or delete {sidecar.name} if that is intended"
        raise UserError(f"{source}: holds {found} of {count} records; {way}")


def _holds_something(path: Path) -> bool:
    """Whether there is anything in a file or folder that a stage would continue."""
    return any(path.glob("[!.]*")) if path.is_dir() else path.exists() and path.stat().st_size > 0


def siblings(source: str | Path, out: str | Path) -> tuple[Path, Path]:
    """Input and output of a stage: two files in one folder, because media paths are relative to it."""
    source, out = Path(source), Path(out)
    if source.parent.resolve() != out.parent.resolve():
        raise UserError(
            f"{out}: write into {source.parent}, the folder of {source.name} (media paths are relative to it)"
        )
    if source.name == out.name or (out.exists() and source.exists() and out.samefile(source)):
        raise UserError(f"{out}: is the input itself; choose another file name for the output")
    return source, out
