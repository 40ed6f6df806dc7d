"""Records of every kind for the tests of `diffalign label`."""

from pathlib import Path

import numpy as np
from PIL import Image

from diffalign import records
from diffalign.records import Candidate, Message, Record

HOSTILE = '<script>document.title = "hit"</script><img src=x onerror="document.title=\'hit\'">'


def texts(folder: Path, counts=(2, 2, 3)) -> Path:
    """``counts``: candidates per record."""
    rows = [
        Record(id=f"r{i}", prompt=f"question {i}", candidates=[Candidate(text=f"answer {i}-{k}") for k in range(n)])
        for i, n in enumerate(counts)
    ]
    return stored(folder, rows)


def pictures(folder: Path, n: int = 3, k: int = 2, side: int = 48) -> Path:
    """A record's candidates are rings of different colours."""
    rows = []
    for i in range(n):
        for j in range(k):
            Image.fromarray(ring(side, i, j)).save(folder / f"model-{j}-{i}.png")
        made = [Candidate(sample=f"model-{j}-{i}.png") for j in range(k)]
        rows.append(Record(id=f"r{i}", prompt=f"a ring number {i}", candidates=made))
    return stored(folder, rows)


def ring(side: int, i: int, j: int) -> np.ndarray:
    """uint8 (side, side, 3)."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    inside = np.abs(np.hypot(x, y) - 0.22 - 0.04 * j) < 0.07
    colour = np.array([200 - 50 * i, 90 + 60 * j, 60 + 45 * i])
    ground = 235 - 60 * (y[..., None] + 0.5) * np.ones(3)
    return np.where(inside[..., None], colour, ground).clip(0, 255).astype(np.uint8)


def clips(folder: Path, n: int = 2, seconds: int = 3, side: int = 64) -> Path:
    """Pairs of clips of a ring that grows, 16 frames per second."""
    import torch

    from diffalign import media

    rows = []
    for i in range(n):
        for j in range(2):
            frames = np.stack([ring(side, i, j * (f % 16) / 8) for f in range(16 * seconds + 1)])
            film = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255
            media.write("video", folder / f"clip-{i}-{j}.mp4", film)
        made = [Candidate(sample=f"clip-{i}-{j}.mp4") for j in range(2)]
        rows.append(Record(id=f"r{i}", prompt=f"a ring grows {i}", candidates=made))
    return stored(folder, rows)


def talk() -> list[Message]:
    """A conversation."""
    return [Message(role="user", content="Hello"), Message(role="assistant", content="Hello. What is it?")]


def stored(folder: Path, rows: list[Record]) -> Path:
    """The records file."""
    records.write(folder / "records.jsonl", rows)
    return folder / "records.jsonl"
