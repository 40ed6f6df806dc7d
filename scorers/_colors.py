"""GenEval's colour of an object: CLIP's zero-shot choice among ten words for its cut-out on grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.geneval import COLORS

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ._clip import Encoder

BACKGROUND = "#999"
BATCH = 16
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class Cutout(NamedTuple):
    """An object to be named a colour: its image (RGB), mask (H, W), box in pixels and class."""

    image: Image.Image
    mask: np.ndarray
    box: tuple[float, float, float, float]
    label: str

    def picture(self) -> Image.Image:
        """The object alone on grey, cropped to its box."""
        from PIL import Image

        blank = Image.new("RGB", self.image.size, BACKGROUND)
        alone = Image.composite(self.image, blank, Image.fromarray(self.mask))
        x1, y1, x2, y2 = (round(side) for side in self.box)
        return alone.crop((x1, y1, x2, y2))


class Colors:
    """Names colours with a CLIP. The words of a class are encoded once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._words: dict[str, Tensor] = {}

    def _classifier(self, label: str) -> Tensor:
        """(10, C): per colour the mean of the normalised templates, normalised."""
        if label not in self._words:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            features = self.encoder.texts(texts, len(texts))
            self._words[label] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)
        return self._words[label]

    def __call__(self, cutouts: Sequence[Cutout]) -> list[str]:
        """The colour of each."""
        if not cutouts:
            return []
        features = self.encoder.images([cutout.picture() for cutout in cutouts], BATCH)
        words = torch.stack([self._classifier(cutout.label) for cutout in cutouts])
        return [COLORS[index] for index in torch.einsum("nc,nkc->nk", features, words).argmax(1).tolist()]
