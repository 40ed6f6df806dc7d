"""Soft edges (HED, arXiv:1504.06375), white on black: the network that ControlNet ships, ControlNetHED."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Extractor
from ._networks import grey, in_batches, load_weights, pick_device, to_tensor

BLOCKS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""Channels in and out, and how many convolutions."""


def build(path: str, *, device: str = "auto", batch: int = 8) -> Extractor:
    """The sigmoid of the mean of the five side outputs, each brought to the size of the picture.

    Args:
        path: ``ControlNetHED.pth``, or its weights as safetensors.
        batch: pictures of one size that go through the network at a time.
    """
    place = pick_device(device)
    net = load_weights(_HED(), path, "the weights of ControlNetHED").to(place)
    return in_batches(lambda images: net(to_tensor(images, place)), grey, batch)


class _Block(nn.Module):
    def __init__(self, given: int, made: int, depth: int) -> None:
        super().__init__()
        channels = [given] + [made] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.projection = nn.Conv2d(made, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class _HED(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> edges (B, 1, H, W) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        for number, sizes in enumerate(BLOCKS, 1):
            self.add_module(f"block{number}", _Block(*sizes))

    def forward(self, images: Tensor) -> Tensor:
        x, sides = images * 255 - self.norm, []
        for number in range(1, len(BLOCKS) + 1):
            if number > 1:
                x = F.max_pool2d(x, 2)
            x, side = cast(Any, self.get_submodule(f"block{number}"))(x)
            sides.append(F.interpolate(side, images.shape[2:], mode="bilinear", align_corners=False))
        return torch.stack(sides).mean(0).sigmoid()
