"""CLIP similarity of a picture and its prompt (arXiv:2103.00020; CLIPScore arXiv:2104.08718); any open_clip model."""

from __future__ import annotations

from typing import Literal

from diffalign.scoring import Scorer

Metric = Literal["cosine", "clipscore", "logit"]


def build(
    model: str = "ViT-L-14",
    pretrained: str = "openai",
    metric: Metric = "cosine",
    device: str = "auto",
    dtype: str = "fp32",
    batch: int = 32,
) -> Scorer:
    """CLIP similarity of a picture and its prompt (arXiv:2103.00020; CLIPScore arXiv:2104.08718); any open_clip model.

    Args:
        model: open_clip's name, or ``hf-hub:owner/repo`` or ``local-dir:folder``.
        pretrained: open_clip's tag for the weights, or a file with the state dict. A file says nothing of its
            activation: OpenAI's weights are for the models that end in ``-quickgelu``.
        metric: ``cosine``; ``clipscore`` = 2.5 max(cosine, 0), the published one being with ViT-B-32; ``logit`` =
            exp(logit_scale) cosine / 100, the reward of DiffusionNFT.
        device, dtype, batch: see ``_loading.place``.
    """
    from ._clip import CosineScorer, open_clip_encoder
    from ._loading import place

    encoder = open_clip_encoder(model, pretrained, place(device, dtype, batch))
    values = {
        "cosine": lambda cosine: cosine,
        "clipscore": lambda cosine: 2.5 * max(cosine, 0.0),
        "logit": lambda cosine: encoder.scale * cosine / 100,
    }
    return CosineScorer(encoder, values[metric], batch)
