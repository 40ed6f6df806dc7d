"""Scorers that are not real, and a module outside the project that builds them."""

import math
from dataclasses import dataclass, field

import numpy as np

from diffalign.records import Candidate, Record
from diffalign.scoring import Sample, Score


@dataclass
class Length:
    """Scores a text by its length and remembers what it was asked."""

    scale: float = 1.0
    fail_after: float = math.inf
    refuses: set[str] = field(default_factory=set)
    accepts: frozenset[str] = frozenset({"text"})
    batches: list[list[str]] = field(default_factory=list)

    def __call__(self, samples):
        if len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt("killed")
        if any(s.text in self.refuses for s in samples):
            raise RuntimeError("refused")
        self.batches.append([s.text for s in samples])
        return [Score(self.scale * len(s.text)) for s in samples]


@dataclass
class Returns:
    """Returns the same answer whatever it is asked."""

    answer: object
    accepts: frozenset[str] = frozenset({"text"})

    def __call__(self, samples):
        return self.answer


@dataclass
class Brightness:
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples):
        return [Score(float(np.asarray(s.image).mean()), detail={"tag": s.meta.get("tag", "")}) for s in samples]


class OutOfMemoryError(RuntimeError):
    pass


@dataclass
class Picky:
    """Fails on the text "bad", whatever else is in the batch."""

    error: Exception = field(default_factory=lambda: KeyError("bad"))
    accepts: frozenset[str] = frozenset({"text"})

    def __call__(self, samples):
        if isinstance(self.error, OutOfMemoryError) or any(s.text == "bad" for s in samples):
            raise self.error
        return [Score(float(len(s.text)), detail={"seen": s.text}) for s in samples]


@dataclass
class Together:
    """Ranks the texts of a record by their length."""

    together = True
    accepts: frozenset[str] = frozenset({"text"})
    batches: list[list[str]] = field(default_factory=list)

    def __call__(self, samples):
        self.batches.append([s.text for s in samples])
        order = sorted(samples, key=lambda s: len(s.text))
        return [Score(float(order.index(s))) for s in samples]


@dataclass
class Seen:
    """Keeps what it was shown."""

    accepts: frozenset[str] = frozenset({"video", "mesh"})
    samples: list[Sample] = field(default_factory=list)

    def __call__(self, samples):
        self.samples += samples
        return [Score(0.0) for _ in samples]


def texts(name: str, *contents: str, **meta) -> Record:
    return Record(id=name, prompt=f"prompt {name}", candidates=[Candidate(text=c) for c in contents], meta=meta)


def labels(rows, label="n") -> list[list[float]]:
    return [[c.labels[label] for c in row.candidates] for row in rows]
