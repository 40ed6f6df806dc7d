"""A scorer that keeps count: every scoring leaves a line in a file and has a value of its own."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass

from diffalign.scoring import Score


def build(log: str, seconds: float = 0.0) -> Counting:
    """Write the text or prompt of each sample to ``log``; a call takes ``seconds``."""
    return Counting(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), seconds)


@dataclass
class Counting:
    """Values are random, so that an item that was scored twice is told by its value."""

    log: int
    seconds: float
    accepts: frozenset[str] = frozenset({"text", "image"})

    def __call__(self, samples):
        os.write(self.log, "".join(f"{sample.prompt}\n" for sample in samples).encode())
        time.sleep(self.seconds)  # a kill in here finds items that were scored and have no outcome
        return [Score(float(secrets.randbits(53))) for _ in samples]
