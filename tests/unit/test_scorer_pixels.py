"""Preprocessing of the learned scorers: equal to the published transforms, and pinned against all of them changing."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import scoring

px = importlib.import_module(f"{scoring._package()}._pixels")

SIZES = ((224, 224), (225, 224), (224, 229), (300, 517), (517, 300), (64, 97), (1000, 333))
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.RandomState(width * height).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(
        np.stack([255 * x // width, 255 * y // height, (37 * x + 59 * y) % 256], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("mode", "ours"), [("shortest", px.resize_crop), ("squash", px.squash)])
def test_resized_like_open_clip(size, mode, ours):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    theirs = image_transform_v2(PreprocessCfg(resize_mode=mode), is_train=False)(noise(*size))
    torch.testing.assert_close(px.normalise(ours(noise(*size), 224)), theirs, **TOLERANCE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_like_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil()(noise(*size), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(px.normalise(px.resize_crop(noise(*size), 224, down=True)), theirs, **TOLERANCE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padded_like_hpsv2(size):
    """HPSv2 1.2.0 puts these steps of torchvision together; it needs the long side to differ from 224."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tv

    pixels = tv.to_tensor(noise(*size))
    scale = 224 / max(size)
    height, width = (round(side * scale) for side in pixels.shape[1:])
    pixels = tv.resize(pixels, [height, width], InterpolationMode.BICUBIC)
    rows, columns = 224 - height, 224 - width
    pixels = tv.pad(pixels, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2])
    theirs = tv.normalize(pixels, list(px.CLIP_MEAN), list(px.CLIP_STD))
    torch.testing.assert_close(px.normalise(px.resize_pad(noise(*size), 224)), theirs, **TOLERANCE)


def test_a_long_side_of_the_right_length_is_padded():
    pixels = px.resize_pad(noise(224, 100), 224)
    assert pixels.shape == (3, 224, 224)
    assert pixels[:, :62].abs().max() == 0 == pixels[:, 162:].abs().max()
    assert torch.equal(
        (pixels[:, 62:162] * 255).round().byte(), torch.from_numpy(np.array(noise(224, 100))).permute(2, 0, 1)
    )


def test_a_thin_picture_keeps_a_line():
    assert px.resize_pad(noise(1000, 1), 224).shape == (3, 224, 224)


WAYS = {
    "torchvision": lambda image: px.resize_crop(image, 224),
    "transformers": lambda image: px.resize_crop(image, 224, down=True),
    "squash": lambda image: px.squash(image, 224),
    "hpsv2": lambda image: px.resize_pad(image, 224),
}
GOLDEN = {
    ("torchvision", (640, 427)): (0.182251, 0.821078, 0.012887, 0.311509),
    ("torchvision", (333, 500)): (0.179715, 0.858263, -0.328394, -0.228854),
    ("transformers", (640, 427)): (0.178543, 0.821647, 0.012887, 1.164713),
    ("transformers", (333, 500)): (0.179715, 0.858263, -0.328394, -0.228854),
    ("squash", (640, 427)): (0.180441, 0.922788, 0.894531, 0.183528),
    ("squash", (333, 500)): (0.179691, 0.927286, -0.129313, 0.254628),
    ("hpsv2", (640, 427)): (-0.440796, 1.145461, 0.447853, 0.192871),
    ("hpsv2", (333, 500)): (-0.441236, 1.155040, 0.755447, -1.480220),
}


@pytest.mark.parametrize(("way", "size"), GOLDEN)
def test_numbers_are_pinned(way, size):
    """Mean, standard deviation, and two pixels of the third channel; of the published transforms (open_clip 3.3.0,
    transformers 5.23, hpsv2 1.2.0)."""
    found = px.normalise(WAYS[way](gradient(*size))).double()
    numbers = (found.mean(), found.std(), found[2, 100, 50], found[2, 111, 223])
    assert torch.stack(numbers).tolist() == pytest.approx(GOLDEN[way, size], abs=2e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_modes_become_rgb(mode):
    image = noise(60, 40).convert(mode)
    for way in WAYS.values():
        assert torch.equal(way(image), way(image.convert("RGB")))
