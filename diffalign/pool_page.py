"""The page of statistics of a pool and what was built from it: scores, agreement, balance, duplicates. Torch-free."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from diffalign import records
from diffalign.charts import Histogram, histogram
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.pages import render
from diffalign.records import Candidate, Record, media_kind, media_path, plain_text
from diffalign.rewards import level

MOST_FILES = 50_000
"""So many candidates' files are opened; the page says when there are more."""


class Agreement(NamedTuple):
    """How often two labels order two candidates of a record alike, of the pairs that both tell apart."""

    first: str
    second: str
    share: float | None
    pairs: int


class Maker(NamedTuple):
    """One model of the pool."""

    name: str
    candidates: int
    means: dict[str, float]
    best: int
    """Training records in which its candidate is the best one."""
    shown: int
    """Training records in which it has a candidate."""


class Files(NamedTuple):
    """What the files of the candidates are like."""

    looked_at: int
    sizes: list[tuple[str, int]]
    copies: int
    """Candidates that are byte for byte, or word for word, another one."""
    copies_within: int
    """Of those, copies of a candidate of the same record: such a pair can teach nothing."""
    unreadable: int


def write(source: Path, built: Path, labels: Sequence[str]) -> Path:
    """Write the page beside the training records; returns it."""
    out = built.with_suffix(".html")
    pool, train = list(records.read(source)), list(records.read(built))
    page = render("pool.html.j2", **examine(pool, train, source.parent, labels), title=f"{source.name} → {built.name}")
    with replacing(out) as handle:
        handle.write(page.encode())
    return out


def examine(pool: Sequence[Record], train: Sequence[Record], root: Path, labels: Sequence[str]) -> dict[str, Any]:
    """Everything the page shows.

    Args:
        pool: scored records.
        train: what was built from them.
        root: folder that media paths are relative to.
        labels: that made the reward.
    """
    summary = records.summary(pool)
    names = list(summary["labels"])
    rewards = [[level(c.labels["reward"]) for c in record.candidates if "reward" in c.labels] for record in train]
    margins = [max(row) - min(row) for row in rewards if len(row) > 1]
    prompts = Counter(plain_text(record.prompt) for record in pool)
    return {
        "summary": summary,
        "train": records.summary(train),
        "labels": {name: histogram(found) for name, found in _values(pool, names).items()},
        "used": list(labels),
        "agreements": agreements(pool, names),
        "makers": makers(pool, train, names),
        "margins": histogram(margins) if margins else None,
        "prompt_words": histogram([float(len(prompt.split())) for prompt in prompts.elements()]) if pool else None,
        "answer_words": _answer_words(train),
        "repeated_prompts": sum(count > 1 for count in prompts.values()),
        "files": files(pool, root),
        "candidates": sum(len(record.candidates) for record in pool),
    }


def _values(pool: Iterable[Record], names: Sequence[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in names}
    for record in pool:
        for candidate in record.candidates:
            for name, value in candidate.labels.items():
                found[name].append(level(value))
    return found


def agreements(pool: Iterable[Record], names: Sequence[str]) -> list[Agreement]:
    """Of every two labels."""
    alike: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for record in pool:
        for a, b in combinations(record.candidates, 2):
            signs = {n: _sign(a, b, n) for n in names if n in a.labels and n in b.labels}
            for pair in combinations((name for name, sign in signs.items() if sign), 2):
                total[pair] += 1
                alike[pair] += signs[pair[0]] == signs[pair[1]]
    pairs = combinations(names, 2)
    return [Agreement(*pair, alike[pair] / total[pair] if total[pair] else None, total[pair]) for pair in pairs]


def _sign(a: Candidate, b: Candidate, name: str) -> int:
    x, y = level(a.labels[name]), level(b.labels[name])
    return (x > y) - (x < y)


def makers(pool: Iterable[Record], train: Iterable[Record], names: Sequence[str]) -> list[Maker]:
    """The models of a pool, as the origins of its candidates name them."""
    values: defaultdict[str, dict[str, list[float]]] = defaultdict(lambda: {name: [] for name in names})
    counts: Counter[str] = Counter()
    for record in pool:
        for candidate in record.candidates:
            counts[_maker(candidate)] += 1
            for name, value in candidate.labels.items():
                values[_maker(candidate)][name].append(level(value))
    best: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    for record in train:
        rated = [c for c in record.candidates if "reward" in c.labels]
        shown.update({_maker(candidate) for candidate in rated})
        if len(rated) > 1:
            best[_maker(max(rated, key=lambda c: level(c.labels["reward"])))] += 1
    return [
        Maker(name, n, {k: fmean(v) for k, v in values[name].items() if v}, best[name], shown[name])
        for name, n in sorted(counts.items())
    ]


def _maker(candidate: Candidate) -> str:
    return str(candidate.origin.get("source") or candidate.origin.get("model") or "unknown")


def _answer_words(train: Iterable[Record]) -> dict[str, Histogram]:
    """Lengths of preferred and other texts: a reward that likes length shows here."""
    found: dict[str, list[float]] = {"preferred": [], "others": []}
    for record in train:
        rated = [c for c in record.candidates if c.text is not None and "reward" in c.labels]
        if len(rated) > 1:
            best = max(rated, key=lambda c: level(c.labels["reward"]))
            for candidate in rated:
                words = float(len(plain_text(candidate.text or "").split()))
                found["preferred" if candidate is best else "others"].append(words)
    return {name: histogram(values) for name, values in found.items() if values}


def files(pool: Iterable[Record], root: Path, most: int = MOST_FILES) -> Files:
    """Sizes and copies among the first candidates of a pool."""
    sizes: Counter[str] = Counter()
    seen: set[bytes] = set()
    looked_at = copies = within = unreadable = 0
    for record in pool:
        own: set[bytes] = set()
        for candidate in record.candidates:
            if looked_at == most:
                break
            looked_at += 1
            try:
                size, digest = _look(candidate, root)
            except (UserError, OSError):
                unreadable += 1
                continue
            sizes[size] += 1
            copies += digest in seen or digest in own
            within += digest in own
            own.add(digest)
        seen |= own
    return Files(looked_at, sizes.most_common(12), copies, within, unreadable)


def _look(candidate: Candidate, root: Path) -> tuple[str, bytes]:
    """Size in words, and a digest of the content."""
    if candidate.text is not None:
        return "text", hashlib.blake2b(plain_text(candidate.text).encode(), digest_size=16).digest()
    assert candidate.sample is not None
    path = media_path(root, candidate.sample)
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).digest()
    if media_kind(candidate.sample) != "image":
        return media_kind(candidate.sample), digest
    width, height = records.image_size(root, candidate.sample)
    return f"{width} × {height}", digest
