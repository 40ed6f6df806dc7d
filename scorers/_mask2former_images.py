"""From an image to Mask2Former's input and from its output to instances, as mmdet 2's test pipeline does it.

A keep-ratio resize into 1333 x 800 with OpenCV's bilinear filter for bytes, padding with grey to a multiple of 32,
ImageNet's mean and deviation; then the best 100 of queries x classes, masks at the size of the image, and a box around
each. Letters: B images of one size, Q queries, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

LONG, SHORT = 1333, 800  # no side of a resized image is longer than these
DIVISOR = 32
GREY = 128  # what padding shows, before it is normalised
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
ONE = 2048  # OpenCV's weights of the two neighbours are whole numbers that sum to this
MOST = 100  # instances of an image


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """A detected object: the index of its class, score in [0, 1], box (x1, y1, x2, y2; x2 and y2 exclusive), mask."""

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray  # bool (H, W)


def resized_size(height: int, width: int) -> tuple[int, int]:
    """The (height, width) of an image fitted into LONG x SHORT."""
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _taps(length: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every target position the one before its place in the source, and the weight of the one after (of ONE)."""
    place = ((torch.arange(target, dtype=torch.float64) + 0.5) * (length / target) - 0.5).float()
    first = place.floor()
    return first.long().to(device), ((place - first) * ONE).round().int().to(device)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 (B, 3, H, W) to uint8 (B, 3, height, width), byte for byte as ``cv2.resize(..., INTER_LINEAR)``.

    No filter against aliasing, and OpenCV's fixed-point arithmetic with its truncations.
    """
    source_height, source_width = images.shape[2:]
    left, after = _taps(source_width, width, images.device)
    after = after.masked_fill((left < 0) | (left >= source_width - 1), 0)
    left = left.clamp(0, source_width - 1)
    whole = images.int()
    rows = whole[..., left] * (ONE - after) + whole[..., (left + 1).clamp_max(source_width - 1)] * after
    rows >>= 4
    top, below = _taps(source_height, height, images.device)
    first, second = (rows[:, :, (top + step).clamp(0, source_height - 1)] for step in (0, 1))
    below = below[:, None]
    return ((((first * (ONE - below)) >> 16) + ((second * below) >> 16) + 2) >> 2).to(torch.uint8)


def prepare(images: Sequence[Image.Image], device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """RGB images of one size to (B, 3, H, W) float32, H and W multiples of 32, and the size of the unpadded part."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).to(device)
    size = resized_size(*pixels.shape[1:3])
    small = resize(pixels.permute(0, 3, 1, 2), *size).float()
    padded = F.pad(small, (0, -size[1] % DIVISOR, 0, -size[0] % DIVISOR), value=GREY)
    mean, std = (padded.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (padded - mean) / std, size


def boxes_of(masks: Tensor) -> Tensor:
    """bool (N, H, W) to float (N, 4): first column, first row, last column + 1, last row + 1; zeros without a pixel."""
    sides = []
    for axis in (1, 2):  # over rows: which columns; over columns: which rows
        has = masks.any(axis).int()
        sides += [has.argmax(1), has.shape[1] - has.flip(1).argmax(1)]
    x1, x2, y1, y2 = sides
    boxes = torch.stack([x1, y1, x2, y2], 1).float()
    return boxes * masks.flatten(1).any(1, keepdim=True)


def instances(
    classes: Tensor, masks: Tensor, inner: tuple[int, int], size: tuple[int, int], *, above: float
) -> list[Instance]:
    """The instances of one image, in no particular order.

    A score is the probability of the class times the mean probability inside the mask, and never exceeds the first:
    what cannot come out above ``above`` is not worked on. It changes nothing else.

    Args:
        classes: (Q, classes + 1) logits, the last for nothing.
        masks: (Q, H / 4, W / 4) logits of the padded input.
        inner: (height, width) of the resized image without padding.
        size: (height, width) of the image; masks and boxes are in its pixels.
    """
    count = classes.shape[1] - 1
    scores, best = classes.float().softmax(-1)[:, :-1].flatten().topk(min(MOST, len(classes) * count))
    best, scores = best[scores > above], scores[scores > above]
    if not len(best):
        return []
    queries, back = (best // count).unique(return_inverse=True)
    padded = tuple(-(-length // DIVISOR) * DIVISOR for length in inner)
    logits = F.interpolate(masks[queries].float()[None], padded, mode="bilinear", align_corners=False)
    logits = logits[..., : inner[0], : inner[1]]
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    mean = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    scores = scores * mean[back]
    boxes, pixels = boxes_of(inside)[back].tolist(), inside.cpu().numpy()
    found = zip((best % count).tolist(), scores.tolist(), boxes, back.tolist(), strict=True)
    return [
        Instance(label, score, (box[0], box[1], box[2], box[3]), pixels[query])
        for label, score, box, query in found
        if score > above
    ]


@torch.inference_mode()
def detect(
    net: nn.Module, images: Sequence[Image.Image], *, batch: int, dtype: torch.dtype, above: float
) -> list[list[Instance]]:
    """The instances of every image; images of one size go through the network ``batch`` at a time."""
    device = next(net.parameters()).device
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.height, image.width), []).append(index)
    found: list[list[Instance]] = [[] for _ in images]
    for size, members in groups.items():
        for start in range(0, len(members), batch):
            chunk = members[start : start + batch]
            pixels, inner = prepare([images[index] for index in chunk], device)
            classes, masks = net(pixels.to(dtype))
            for row, index in enumerate(chunk):
                found[index] = instances(classes[row], masks[row], inner, size, above=above)
    return found
