"""What extractors with a network share: devices, published weights, and pictures of several sizes in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.foreign import foreign_files, quiet

from . import Extractor


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA if there is one, else the CPU.

    Raises:
        UserError: no device of torch.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: expected auto, cpu, cuda or cuda:1") from None


def load_weights(net: nn.Module, path: str, what: str) -> nn.Module:
    """A network with the weights of a ``.pth`` or safetensors file, all of them under their published names.

    Raises:
        UserError: there is no such file, only running code could read it, or it holds other weights.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; expected {what}")
    with foreign_files(f"{path}: not weights that can be read without running code"):
        state = _state(path)
    own = net.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"{path}: not {what}: {wrong[0]} does not fit")
    net.load_state_dict(state)
    return net.float().eval().requires_grad_(False)


def _state(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def in_batches(
    run: Callable[[list[Image.Image]], Tensor], finish: Callable[[np.ndarray], Image.Image], batch: int
) -> Extractor:
    """An extractor that runs a network on up to ``batch`` pictures of one size at a time.

    Args:
        run: RGB pictures of one size -> a map of each, (B, h, w) or, with channels, (B, C, h, w), of any size h x w.
        finish: the map of one picture, brought to its size, in float32 -> its condition.
    """
    if batch < 1:
        raise UserError(f"batch {batch}: must be positive")

    def extract(images: Sequence[Image.Image]) -> list[Image.Image]:
        sizes: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            sizes.setdefault(image.size, []).append(index)
        found: dict[int, Image.Image] = {}
        for (width, height), indices in sizes.items():
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                with torch.inference_mode():
                    maps = run([images[index].convert("RGB") for index in part]).float()
                    maps = maps[:, None] if maps.ndim == 3 else maps
                    if maps.shape[2:] != (height, width):
                        maps = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
                for index, one in zip(part, maps.cpu().numpy(), strict=True):
                    found[index] = finish(one)
        return [found[index] for index in range(len(images))]

    return extract


def grey(values: np.ndarray) -> Image.Image:
    """A map (1, H, W) in [0, 1] as a grey picture in RGB; fractions of a level are cut off."""
    return Image.fromarray((values[0] * 255).clip(0, 255).astype(np.uint8)).convert("RGB")


def to_tensor(images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Pictures of one size as (B, 3, H, W) in [0, 1]."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)


def transformers_model(kind: str, path: str, device: torch.device) -> tuple[Any, Callable[[list[Image.Image]], Tensor]]:
    """A model of one of transformers' Auto classes from a folder or the Hub, and what prepares pictures for it.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    import transformers

    with quiet(), foreign_files(f"{path}: not a model for {kind}"):
        net = getattr(transformers, kind).from_pretrained(path).float().to(device).eval().requires_grad_(False)
        processor: Any = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")  # needs no torchvision

    def prepare(images: list[Image.Image]) -> Tensor:
        return processor(images=images, return_tensors="pt")["pixel_values"].to(device)

    return net, prepare
