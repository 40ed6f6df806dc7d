"""Human Preference Score v2.1, CLIP ViT-H/14 trained on HPDv2 (arXiv:2306.09341)."""

from __future__ import annotations

from diffalign.scoring import Scorer

MODEL = "ViT-H-14"
FILE = "HPS_v2.1_compressed.pt"


def build(weights: str = "xswu/HPSv2", device: str = "auto", dtype: str = "fp32", batch: int = 32) -> Scorer:
    """Human Preference Score v2.1, CLIP ViT-H/14 trained on HPDv2 (arXiv:2306.09341).

    The score is the bare cosine, some 0.2 to 0.35; tables show it times 100.

    Args:
        weights: ``HPS_v2.1_compressed.pt``, or the same as safetensors, or the Hub id or folder that holds it. With
            ``HPS_v2_compressed.pt`` it is version 2.0, which gives other numbers.
        device, dtype, batch: see ``_loading.place``.
    """
    from ._clip import CosineScorer, hps_encoder
    from ._loading import find_weights, place

    encoder = hps_encoder(MODEL, find_weights(weights, FILE), place(device, dtype, batch))
    return CosineScorer(encoder, lambda cosine: cosine, batch)
