"""Pictures as the learned scorers read them. Pinned here: libraries change how they resize, and scores with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resize_crop(image: Image.Image, size: int, *, down: bool = False, resample: str = "bicubic") -> Tensor:
    """(3, size, size) in [0, 1]: the short side resized to ``size``, then the middle.

    Args:
        down: an odd rest of the long side: True leaves the smaller half before the crop (transformers), False rounds
            half of it to the even number (torchvision).
    """
    width, height = image.size
    short, long = sorted(image.size)
    other = int(size * long / short)
    width, height = (size, other) if width <= height else (other, size)
    image = image.convert("RGB").resize((width, height), RESAMPLE[resample])
    left, top = ((side - size) // 2 if down else round((side - size) / 2) for side in (width, height))
    return _unit(image.crop((left, top, left + size, top + size)))


def squash(image: Image.Image, size: int, *, resample: str = "bicubic") -> Tensor:
    """(3, size, size) in [0, 1]: both sides resized."""
    return _unit(image.convert("RGB").resize((size, size), RESAMPLE[resample]))


def resize_pad(image: Image.Image, size: int) -> Tensor:
    """(3, size, size), about [0, 1]: the long side resized to ``size``, black around the middle (HPSv2).

    HPSv2 resizes float pixels, not bytes: nothing is rounded or clipped where bicubic overshoots. Antialiased, as
    torchvision does since 0.17. Its own code leaves a picture whose long side is ``size`` already without the padding.
    """
    pixels = _unit(image.convert("RGB"))
    scale = size / max(image.size)
    if scale != 1:
        height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    rows, columns = (size - side for side in pixels.shape[1:])
    return F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def normalise(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(..., 3, H, W) with the mean of each channel taken off, then divided by its standard deviation."""
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _unit(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).contiguous() / 255
