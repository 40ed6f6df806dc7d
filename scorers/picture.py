"""What pictures look like in numbers: drift in these is how reward hacking shows first. No reward, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffalign.scoring import Sample, Score, Scorer

Metric = Literal["brightness", "contrast", "saturation", "sharpness", "high_frequency"]


def build(metric: Metric = "sharpness") -> Scorer:
    """Brightness, contrast, saturation, sharpness or high-frequency energy of a picture, each in its own unit.

    ``brightness`` and ``contrast``: mean and standard deviation of the luma in [0, 1] (Rec. 601). ``saturation``: mean
    over pixels of (max - min) / max of the channels. ``sharpness``: variance of the Laplacian of the luma in [0, 255].
    ``high_frequency``: share of the luma's variance at more than half the Nyquist frequency.
    """
    return _Picture(METRICS[metric])


@dataclass(frozen=True, slots=True)
class _Picture:
    metric: Callable[[np.ndarray], float]
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self.metric(np.asarray(sample.image, dtype=np.float64) / 255)) for sample in samples]


def _luma(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.array([0.299, 0.587, 0.114])


def _saturation(pixels: np.ndarray) -> float:
    high, low = pixels.max(-1), pixels.min(-1)
    return float(np.mean((high - low) / np.where(high > 0, high, 1.0)))


def _sharpness(pixels: np.ndarray) -> float:
    y = 255 * _luma(pixels)
    inner = y[1:-1, 1:-1]
    laplacian = y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * inner
    return float(laplacian.var()) if laplacian.size else 0.0


def _high_frequency(pixels: np.ndarray) -> float:
    y = _luma(pixels)
    power = np.abs(np.fft.fft2(y - y.mean())) ** 2
    rows, columns = (np.abs(np.fft.fftfreq(side)) for side in y.shape)
    high = np.maximum(rows[:, None], columns[None]) > 0.25
    return float(power[high].sum() / power.sum()) if power.sum() > 0 else 0.0


METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "brightness": lambda pixels: float(_luma(pixels).mean()),
    "contrast": lambda pixels: float(_luma(pixels).std()),
    "saturation": _saturation,
    "sharpness": _sharpness,
    "high_frequency": _high_frequency,
}
