"""Depth from one picture, near is bright: DPT, Depth Anything or another depth model of transformers."""

from __future__ import annotations

import numpy as np
from PIL import Image

from . import Extractor
from ._networks import grey, in_batches, pick_device, transformers_model


def build(path: str, *, device: str = "auto", batch: int = 8) -> Extractor:
    """Depth of each picture, its smallest value black and its largest white.

    ControlNet++ brings its ground truth to that range as well, and divides a prediction by its maximum alone.

    Args:
        path: folder or Hub id of a model for depth estimation, as ``Intel/dpt-large``.
        batch: pictures of one size that go through the network at a time.
    """
    place = pick_device(device)
    net, prepare = transformers_model("AutoModelForDepthEstimation", path, place)
    return in_batches(lambda images: net(prepare(images)).predicted_depth, _normal, batch)


def _normal(depth: np.ndarray) -> Image.Image:
    low, high = depth.min(), depth.max()
    return grey((depth - low) / (high - low) if high > low else np.zeros_like(depth))
