"""Where prompts come from: a world, a text file or a records file; and what they bring along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffalign import config as cfg
from diffalign import records as store
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.geneval_layout import read_metadata
from diffalign.records import Record
from diffalign.worlds import load_prompts


def read_prompts(config: cfg.PromptsConfig, seed: int) -> list[Record]:
    """Records without candidates: from a world (`shapes:train`), GenEval's metadata (`geneval:FILE`), text or records.

    ``per_task`` draws that many of every task in a seeded order, cycling through short tasks; ids stay unique.
    """
    found = _prompt_source(config.source)
    if config.per_task is not None:
        found = list(_per_task(found, config.per_task, seed))
    found = found[: config.limit]
    if not found:
        raise UserError(f"prompts.source: {config.source} holds no prompts")
    return [r.model_copy(update={"id": f"{i:06d}"}) for i, r in enumerate(found)]


def _prompt_source(source: str) -> list[Record]:
    world, colon, split = source.partition(":")
    if world == "geneval":
        return read_metadata(Path(split))
    if colon and not Path(source).exists():
        return [Record(id=m["prompt"], prompt=m["prompt"], meta=m) for m in load_prompts(world, split)]
    path = Path(source)
    if path.suffix == ".jsonl":
        return [r.model_copy(update={"candidates": []}) for r in store.read(path)]
    if not path.is_file():
        raise UserError(f"prompts.source: no file {source} (and no world of that name)")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts.source: {path} is not UTF-8 text: {error}") from None
    return [Record(id=str(i), prompt=line) for i, line in enumerate(lines) if line]


def _per_task(found: Sequence[Record], n: int, seed: int) -> Iterator[Record]:
    tasks = list(dict.fromkeys(str(r.meta.get("tag", "")) for r in found))
    for index, task in enumerate(tasks):
        pool = [r for r in found if str(r.meta.get("tag", "")) == task]
        rng = np.random.default_rng([seed, index])
        rounds = [rng.permutation(len(pool)) for _ in range(-(-n // len(pool)))]
        for position in np.concatenate(rounds)[:n]:
            yield pool[int(position)]


def bring_files(record: Record, root: Path, out: Path) -> Record:
    """A prompt whose condition and source lie with its samples: records name files of their own folder alone.

    Args:
        root: the folder of the prompts file.
        out: the folder of the samples.

    Raises:
        UserError: a file is missing, or outside ``root``.
    """
    brought = {}
    for role in ("condition", "source"):
        name = getattr(record, role)
        if name is None:
            continue
        content = store.media_path(root, name)
        if not content.is_file():
            raise UserError(f"record {record.id!r}: {content}: no such {role} file")
        brought[role] = f"media/{role}-{record.id}{content.suffix}"
        if not (out / brought[role]).is_file():
            with replacing(out / brought[role], durable=False) as handle:
                handle.write(content.read_bytes())
    return record.model_copy(update=brought) if brought else record
