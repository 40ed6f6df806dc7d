"""A million records through ``diffalign import``, and once more to resume: records per second and peak memory.

    python benchmarks/import_million.py                 # about four minutes on one CPU core
    python benchmarks/import_million.py --records 20000

Made data in two published layouts: Pick-a-Pic as parquet shards with a thousand distinct small JPEGs, so that the time
is that of rows and not of writing pictures, and TRL preferences as one json file. Each import is a process of its own.
Writes its section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _results import machine, write_section
from PIL import Image

TITLE = "A million records"
PICTURES, SHARD = 1000, 50_000
WORDS = [f"word{i}" for i in range(40)]
MEASURE = """
import json, resource, subprocess, sys
subprocess.run([sys.executable, "-m", "diffalign", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)
"""


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    memory: float
    """Peak resident GiB."""


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "JPEG")
    return held.getvalue()


def sentence(seed: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(60))


def pickapic(folder: Path, n: int) -> Path:
    """Shards with all columns of the published data set."""
    folder.mkdir()
    pictures = [jpeg(i) for i in range(PICTURES)]
    starts = range(0, n, SHARD)
    for index, start in enumerate(starts):
        ids = range(start, min(start + SHARD, n))
        ties = [i % 8 == 0 for i in ids]
        columns = {
            "are_different": [True for _ in ids],
            "best_image_uid": [f"{i:032x}" for i in ids],
            "caption": [f"{' '.join(WORDS[:12])} {i}" for i in ids],
            "created_at": pa.array([10**18 + i for i in ids], pa.timestamp("ns")),
            "has_label": [True for _ in ids],
            "image_0_uid": [f"{i:032x}" for i in ids],
            "image_0_url": [f"https://example.org/{i}" for i in ids],
            "image_1_uid": [f"{i + 1:032x}" for i in ids],
            "image_1_url": [f"https://example.org/{i + 1}" for i in ids],
            "jpg_0": [pictures[i % PICTURES] for i in ids],
            "jpg_1": [pictures[i * 7 % PICTURES] for i in ids],
            "label_0": [0.5 if tie else 1.0 for tie in ties],
            "label_1": [0.5 if tie else 0.0 for tie in ties],
            "model_0": ["stabilityai/stable-diffusion-2-1" for _ in ids],
            "model_1": ["dreamlike-art/dreamlike-photoreal-2.0" for _ in ids],
            "ranking_id": list(ids),
            "user_id": [i % 5000 for i in ids],
            "num_example_per_prompt": [1 for _ in ids],
            "__index_level_0__": list(ids),
        }
        name = f"train-{index:05d}-of-{len(starts):05d}.parquet"
        pq.write_table(pa.table(columns), folder / name, row_group_size=1000)
    return folder


def trl(path: Path, n: int) -> Path:
    """One list of conversations."""
    with path.open("w", encoding="utf-8") as handle:
        for i in range(n):
            question = {"role": "user", "content": f"{i} {sentence(i)}"}
            answers = ({"role": "assistant", "content": sentence(i + k)} for k in (1, 2))
            chosen, rejected = ([question, answer] for answer in answers)
            handle.write(f"{',' if i else '['}\n{json.dumps({'chosen': chosen, 'rejected': rejected})}")
        handle.write("]")
    return path


def measure(*words: str) -> Cost:
    """Of a command line, start-up included."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], check=True, capture_output=True, text=True)
    return Cost(time.perf_counter() - started, float(done.stdout))


def row(name: str, form: str, source: Path, out: Path, n: int) -> str:
    """One line of the table."""
    words = ("import", f"format={form}", f"source={source}", f"out={out}")
    first, again = measure(*words), measure(*words)
    with (out / "records.jsonl").open("rb") as handle:
        found = sum(1 for _ in handle)
    if found != n:
        raise SystemExit(f"{name}: {found} records, expected {n}")
    cells = (f"{n / cost.seconds:,.0f} | {cost.seconds:.0f} s | {cost.memory:.2f} GiB" for cost in (first, again))
    return f"| {name} | {n:,} | {' | '.join(cells)} |"


def main() -> None:
    """Make the data, import them twice, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    n = parser.parse_args().records
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        rows = [
            row("Pick-a-Pic, parquet", "pickapic", pickapic(folder / "pickapic", n), folder / "a", n),
            row("TRL preference, json", "trl", trl(folder / "trl.json", n), folder / "b", n),
        ]
    table = (
        "| data | records | records/s | time | peak memory | again: records/s | time | peak memory |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows)
    )
    command = "`python benchmarks/import_million.py`"
    note = f"Pick-a-Pic shows {PICTURES} distinct pictures of 16 x 16; `again` finds everything there and checks it."
    write_section(TITLE, f"{command} ({machine()})\n\n{note}\n\n{table}")
    print(table)


if __name__ == "__main__":
    main()
