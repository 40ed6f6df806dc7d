"""Records on their way to batches: encoded once, kept beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign import config as cfg
from diffalign.dataset import Dataset
from diffalign.encoding import Cut
from diffalign.records import Record
from diffalign.textset import TextDataset
from diffalign.train.core import progress


def cache_folder(data: cfg.DataConfig) -> Path:
    """Where encodings are kept."""
    return Path(data.cache) if data.cache else Path(data.records).parent / "cache"


def encode(data: cfg.DataConfig, records: list[Record], family: Any, visible: bool) -> Dataset | TextDataset:
    """The records as the family reads them."""
    source = Path(data.records)
    with progress(visible) as bar:
        task = bar.add_task("encode", total=len(records), info="")

        def advance(done: int) -> None:
            bar.update(task, completed=done)

        if family.modality == "text":
            return TextDataset(records, family, data.max_tokens, advance)
        cut = Cut(data.size, data.buckets, data.crop, data.flip)
        return Dataset(records, source.parent, family, cache_folder(data), cut, data.dropout, advance)
