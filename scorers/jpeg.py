"""How well a picture compresses as JPEG: a reward without a network, whose optimum everybody can see (DDPO)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffalign.errors import UserError
from diffalign.scoring import Sample, Score, Scorer

Metric = Literal["compressibility", "incompressibility"]


def build(metric: Metric = "compressibility", quality: int = 95) -> Scorer:
    """Size of the picture as JPEG in kB (1000 bytes), negative for ``compressibility`` (arXiv:2305.13301).

    The release of DDPO takes quality 95 and these units; Flow-GRPO divides by 500.
    """
    if not 1 <= quality <= 95:  # above 95 the encoder leaves out steps
        raise UserError(f"quality {quality}: choose 1 to 95")
    return _Jpeg(-1.0 if metric == "compressibility" else 1.0, quality)


@dataclass(frozen=True, slots=True)
class _Jpeg:
    sign: float
    quality: int
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self.sign * self._size(sample) / 1000) for sample in samples]

    def _size(self, sample: Sample) -> int:
        assert sample.image is not None
        buffer = io.BytesIO()
        sample.image.save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell()
