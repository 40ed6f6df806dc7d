"""Small data sets in the layouts that they are published in."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign import importers
from diffalign.importers import Broken
from diffalign.importers.shelf import Shelf
from diffalign.records import Record


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """The bytes of a small random picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def put(path: Path, seed: int = 0, kind: str = "PNG") -> Path:
    """A picture file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed, kind))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def to_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def to_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def pickapic(i: int, label: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """A row of Pick-a-Pic; row i shows pictures i and i + 1."""
    other = None if label is None else 1 - label
    return {
        "are_different": True,
        "best_image_uid": f"uid-{i}",
        "caption": f"a cat {i}",
        "created_at": np.datetime64("2023-01-01T00:00:00.000000001"),
        "has_label": label is not None,
        "image_0_uid": f"uid-{i}",
        "image_0_url": f"https://example.org/{i}.jpg",
        "image_1_uid": f"uid-{i + 1}",
        "image_1_url": f"https://example.org/{i + 1}.jpg",
        "jpg_0": picture(i),
        "jpg_1": picture(i + 1),
        "label_0": label,
        "label_1": other,
        "model_0": "sdxl",
        "model_1": "dreamlike",
        "ranking_id": 100 + i,
        "user_id": 7,
        "num_example_per_prompt": 2,
        "__index_level_0__": i,
        **changes,
    }


def chat(*words: str) -> list[dict[str, str]]:
    """A conversation whose turns alternate between user and assistant."""
    return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]


def load(name: str, source: Path, out: Path, **options: Any) -> tuple[list[Record], list[Broken]]:
    """Everything that an importer makes of a source; the root is the source or its folder."""
    shelf = Shelf(out, source if source.is_dir() else source.parent)
    items = list(importers.read(name, source, shelf, **options))
    good = [item for item in items if isinstance(item, Record)]
    for record in good:
        assert Record.model_validate_json(record.model_dump_json()) == record
        for candidate in record.candidates:
            assert candidate.sample is None or (out / candidate.sample).is_file()
    return good, [item for item in items if isinstance(item, Broken)]
