"""How different the samples of one prompt are from each other, on thumbnails. No reward, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from diffalign.errors import UserError
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

Metric = Literal["distance", "variance"]


def build(metric: Metric = "distance", side: int = 16) -> Scorer:
    """A sample's distance to the others of its prompt, or its share of their variance.

    Of thumbnails of ``side`` x ``side`` in [0, 1]. ``distance``: root mean squared difference, averaged over the other
    samples. ``variance``: squared distance to the
    prompt's mean thumbnail, times K / (K - 1), so that its mean is the unbiased variance of a feature.
    """
    if side < 1:
        raise UserError(f"side {side}: must be at least 1")
    return _Diversity(metric, side)


@dataclass(frozen=True, slots=True)
class _Diversity:
    metric: Metric
    side: int
    accepts: frozenset[str] = frozenset({"image"})
    together: bool = True

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        if len(samples) < 2:
            return [Failure("input", "diversity compares the samples of a prompt, and this one has a single one")]
        points = np.stack([self._thumbnail(sample) for sample in samples])
        if self.metric == "variance":
            away = ((points - points.mean(0)) ** 2).mean(1) * len(points) / (len(points) - 1)
            return [Score(float(value)) for value in away]
        apart = np.sqrt(((points[:, None] - points[None]) ** 2).mean(-1))
        return [Score(float(row.sum() / (len(points) - 1))) for row in apart]

    def _thumbnail(self, sample: Sample) -> np.ndarray:
        assert sample.image is not None
        small = sample.image.resize((self.side, self.side), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float64).reshape(-1) / 255
