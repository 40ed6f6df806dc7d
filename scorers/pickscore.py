"""PickScore, CLIP ViT-H/14 trained on the choices of Pick-a-Pic's users (arXiv:2305.01569)."""

from __future__ import annotations

from typing import Literal

from diffalign.scoring import Scorer

Metric = Literal["published", "cosine"]


def build(
    weights: str = "yuvalkirstain/PickScore_v1",
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    metric: Metric = "published",
    device: str = "auto",
    dtype: str = "fp32",
    batch: int = 32,
) -> Scorer:
    """PickScore, CLIP ViT-H/14 trained on the choices of Pick-a-Pic's users (arXiv:2305.01569).

    Args:
        weights: a ``CLIPModel`` of transformers, a folder or a Hub id.
        tokenizer: the folder or Hub id of its tokenizer.
        metric: ``published`` = exp(logit_scale) cosine, some 18 to 24; ``cosine`` alone, as SmPO reads it.
        device, dtype, batch: see ``_loading.place``.
    """
    from ._clip import CosineScorer, transformers_encoder
    from ._loading import place

    encoder = transformers_encoder(weights, tokenizer, place(device, dtype, batch))
    scale = encoder.scale if metric == "published" else 1.0
    return CosineScorer(encoder, lambda cosine: scale * cosine, batch)
