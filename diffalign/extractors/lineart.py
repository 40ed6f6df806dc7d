"""Line drawings, white on black: the network of ControlNet's lineart, sk_model (arXiv:2203.12691)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import Extractor
from ._networks import grey, in_batches, load_weights, pick_device, to_tensor

STRIDE = 4
RESIDUAL = 3


def build(path: str, *, device: str = "auto", batch: int = 8) -> Extractor:
    """One minus the drawing, which is black on white.

    ControlNet++ does the same to its conditions. To its predictions it does so in 8 bits, where ``1 - x`` wraps around:
    pure black becomes 1 and not 255.

    Args:
        path: ``sk_model.pth`` (or ``sk_model2.pth``, coarser), or its weights as safetensors.
        batch: pictures of one size that go through the network at a time.
    """
    place = pick_device(device)
    net = load_weights(_LineArt(), path, "the weights of lineart's sk_model").to(place)
    return in_batches(lambda images: 1 - net(to_tensor(images, place)), grey, batch)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)
        again = nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)
        self.conv_block = nn.Sequential(*half, nn.ReLU(), *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def _scaled(conv: nn.Module, width: int) -> list[nn.Module]:
    return [conv, nn.InstanceNorm2d(width), nn.ReLU()]


class _LineArt(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> drawings (B, 1, H, W) in [0, 1]; the positions in the lists are published."""

    def __init__(self) -> None:
        super().__init__()
        down: dict[str, Any] = {"stride": 2, "padding": 1}
        up: dict[str, Any] = {**down, "output_padding": 1}
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), *_scaled(nn.Conv2d(3, 64, 7), 64))
        self.model1 = nn.Sequential(
            *_scaled(nn.Conv2d(64, 128, 3, **down), 128), *_scaled(nn.Conv2d(128, 256, 3, **down), 256)
        )
        self.model2 = nn.Sequential(*(_Residual(256) for _ in range(RESIDUAL)))
        self.model3 = nn.Sequential(
            *_scaled(nn.ConvTranspose2d(256, 128, 3, **up), 128), *_scaled(nn.ConvTranspose2d(128, 64, 3, **up), 64)
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        x = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        for part in (self.model0, self.model1, self.model2, self.model3, self.model4):
            x = part(x)
        return x[:, :, :height, :width]
