"""Extractors: what reads a condition (edges, depth ...) off a picture, as ControlNets are given it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffalign.errors import UserError, nearest

Extractor = Callable[[Sequence[Image.Image]], list[Image.Image]]
"""RGB pictures -> their conditions, of the same sizes."""


def load_extractor(name: str, **params: Any) -> Extractor:
    """An extractor by name.

    Raises:
        UserError: unknown name or parameter, or a package is not installed.
    """
    if name not in EXTRACTORS:
        raise UserError(f"unknown extractor {name!r}{nearest(name, EXTRACTORS)}")
    valid = inspect.signature(EXTRACTORS[name]).parameters
    wrong = next((key for key in params if key not in valid), None)
    if wrong is not None:
        raise UserError(f"extractor {name!r}: unknown parameter {wrong!r}{nearest(wrong, valid)}")
    return EXTRACTORS[name](**params)


def canny(low: float = 0.1, high: float = 0.2, sigma: float = 1.0) -> Extractor:
    """Canny edges, white on black; thresholds on the gradient of a grey picture in [0, 1]."""
    try:
        from skimage.feature import canny as edges
    except ImportError:
        raise UserError("extractor 'canny' needs scikit-image: pip install 'diffalign[sim]'") from None

    def extract(images: Sequence[Image.Image]) -> list[Image.Image]:
        grey = [np.asarray(image.convert("L"), dtype=np.float64) / 255 for image in images]
        found = [edges(one, sigma, low, high).astype(np.uint8) * 255 for one in grey]
        return [Image.fromarray(one).convert("RGB") for one in found]

    return extract


EXTRACTORS: dict[str, Callable[..., Extractor]] = {"canny": canny}
