"""LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE) on CLIP ViT-L/14; reads no prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.scoring import Outcome, Sample, Score, Scorer

if TYPE_CHECKING:
    from torch import nn

    from ._clip import Encoder

MODEL = "ViT-L-14"
WIDTH = 768
FILE = "sac+logos+ava1-l14-linearMSE.pth"


def build(
    weights: str,
    model: str = MODEL,
    pretrained: str = "openai",
    device: str = "auto",
    dtype: str = "fp32",
    batch: int = 32,
) -> Scorer:
    """LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE) on CLIP ViT-L/14; reads no prompt.

    The score is some 1 to 10. With the same ``model`` and ``pretrained`` the scorer ``clip`` shares the network and
    its work.

    Args:
        weights: ``sac+logos+ava1-l14-linearMSE.pth`` of christophschuhmann/improved-aesthetic-predictor, or its folder.
        model, pretrained: OpenAI's ViT-L/14 as the scorer ``clip`` names it: open_clip's tag, or for weights in a file
            ``ViT-L-14-quickgelu`` and that file.
        device, dtype, batch: see ``_loading.place``; the head runs in fp32.
    """
    from torch import nn

    from ._clip import open_clip_encoder
    from ._head import linear_stack
    from ._loading import fill, find_weights, place, read_tensors

    where = place(device, dtype, batch)
    file = find_weights(weights, FILE)
    head = linear_stack(WIDTH)
    fill(nn.ModuleDict({"layers": head}), read_tensors(file), file)
    return _Aesthetic(open_clip_encoder(model, pretrained, where), head.eval().to(where.device), batch)


@dataclass(frozen=True, slots=True)
class _Aesthetic:
    encoder: Encoder
    head: nn.Module
    batch: int
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        from ._loading import score_pictures

        return score_pictures(samples, self._scores)

    def _scores(self, samples: Sequence[Sample]) -> Iterator[Score]:
        import torch

        images: list[Any] = [sample.image for sample in samples]
        with torch.inference_mode():
            return map(Score, self.head(self.encoder.images(images, self.batch))[:, 0].tolist())
