"""The README's picture: the first held-out prompts of every task, before and after, from one finished quickstart.

    python benchmarks/before_after.py runs/quickstart_seeds/seed0 benchmarks/before_after.png

Nothing is chosen: each row is a task, each column the next prompt in file order, same noise on both sides. A green
frame means that the binary judge finds the image correct.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw

from diffalign.records import Record, read, read_image

COLUMNS, SIDE, FRAME, GAP, TITLE = 7, 64, 3, 28, 18
GREEN, RED, INK, PAPER = (46, 160, 67), (207, 34, 46), (90, 90, 90), (255, 255, 255)
CELL = SIDE + 2 * FRAME + 2


def first_prompts(folder: Path) -> list[list[Record]]:
    """The first COLUMNS records of every task, in file order."""
    records = read(folder / "scored.jsonl")
    return [list(group)[:COLUMNS] for _, group in groupby(records, key=lambda record: record.meta["tag"])]


def draw(run: Path) -> Image.Image:
    """Rows of tasks, the left half before and the right half after."""
    sides = {name: run / "eval" / "unguided" / name for name in ("against", "policy")}
    rows = {name: first_prompts(folder) for name, folder in sides.items()}
    half = COLUMNS * CELL
    picture = Image.new("RGB", (2 * half + GAP, TITLE + len(rows["policy"]) * CELL), PAPER)
    pen = ImageDraw.Draw(picture)
    for left, (name, title) in zip((0, half + GAP), (("against", "before"), ("policy", "after")), strict=True):
        pen.text((left + 2, 2), title, fill=INK)
        for y, row in enumerate(rows[name]):
            for x, record in enumerate(row):
                [candidate] = record.candidates
                image = read_image(sides[name], str(candidate.sample)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                corner = (left + x * CELL, TITLE + y * CELL)
                frame = Image.new("RGB", (SIDE + 2 * FRAME,) * 2, GREEN if candidate.labels["correct"] == 1 else RED)
                frame.paste(image, (FRAME, FRAME))
                picture.paste(frame, corner)
    return picture


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    parser.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args()
    draw(args.run).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
