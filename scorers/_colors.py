"""GenEval's colour of an object: CLIP's zero-shot choice among ten words for its cut-out on grey."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError
from diffalign.geneval import COLORS

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

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


class Clip(NamedTuple):
    """A CLIP with what turns images and words into its input."""

    net: Any
    transform: Any
    tokenize: Any


def load_clip(model: str, weights: str, device: torch.device) -> Clip:
    """An open_clip model in float32: ``weights`` is one of its names for published weights, or a file.

    OpenAI's weights belong to QuickGELU, which open_clip only warns of.

    Raises:
        UserError: open_clip is not installed or knows no such model or weights.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'diffalign[scorers]'") from None
    try:
        quick = open_clip.get_pretrained_cfg(model, weights).get("quick_gelu", False)
        net, _, transform = open_clip.create_model_and_transforms(
            model, pretrained=weights, device=device, force_quick_gelu=quick, require_pretrained=True
        )
        tokenize = open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"CLIP {model} with weights {weights}: {error}") from None
    return Clip(net.eval().requires_grad_(False), transform, tokenize)


class Colors:
    """Names colours. The words of a class are encoded once."""

    def __init__(self, clip: Clip, device: torch.device) -> None:
        self.clip, self.device = clip, device
        self._words: dict[str, Tensor] = {}

    def _classifier(self, label: str) -> Tensor:
        """(10, C): per colour the mean of the normalised templates, normalised."""
        if label not in self._words:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            features = F.normalize(self.clip.net.encode_text(self.clip.tokenize(texts).to(self.device)), dim=-1)
            self._words[label] = F.normalize(features.unflatten(0, (len(COLORS), -1)).mean(1), dim=-1)
        return self._words[label]

    @torch.inference_mode()
    def __call__(self, cutouts: Sequence[Cutout]) -> list[str]:
        """The colour of each."""
        names: list[str] = []
        for start in range(0, len(cutouts), BATCH):
            chunk = cutouts[start : start + BATCH]
            pixels = torch.stack([self.clip.transform(cutout.picture()) for cutout in chunk]).to(self.device)
            features = F.normalize(self.clip.net.encode_image(pixels), dim=-1)
            words = torch.stack([self._classifier(cutout.label) for cutout in chunk])
            best = torch.einsum("nc,nkc->nk", features, words).argmax(1).tolist()
            names += [COLORS[index] for index in best]
        return names
