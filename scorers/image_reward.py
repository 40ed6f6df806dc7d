"""ImageReward 1.0, BLIP with a reward head trained on human rankings (arXiv:2304.05977)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffalign.scoring import Outcome, Sample, Score, Scorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ._blip import RewardNet
    from ._loading import Place

FILE = "ImageReward.pt"
LENGTH = 35  # tokens; the rest of a longer prompt is not read


def build(
    weights: str = "THUDM/ImageReward",
    tokenizer: str = "bert-base-uncased",
    device: str = "auto",
    dtype: str = "fp32",
    batch: int = 32,
) -> Scorer:
    """ImageReward 1.0, BLIP with a reward head trained on human rankings (arXiv:2304.05977).

    Args:
        weights: ``ImageReward.pt``, or the Hub id or folder that holds it.
        tokenizer: the folder or Hub id of BERT's tokenizer.
        device, dtype, batch: see ``_loading.place``; the head runs in fp32.
    """
    from ._blip import RewardNet, Sizes, renamed
    from ._loading import fill, find_weights, loading, place, read_tensors

    where = place(device, dtype, batch)
    file = find_weights(weights, FILE)
    with loading(tokenizer):
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(tokenizer)
        words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})  # as BLIP has it
    sizes = Sizes()
    net = RewardNet(sizes)
    fill(net, renamed(read_tensors(file)), file)
    net.eval().requires_grad_(False).to(*where)
    net.head.float()
    return _ImageReward(net, words, sizes.image, where, batch)


@dataclass(frozen=True, slots=True)
class _ImageReward:
    net: RewardNet
    tokenizer: Callable[..., Mapping[str, Tensor]]
    size: int
    where: Place
    batch: int
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        from ._loading import score_pictures

        return score_pictures(samples, self._scores, self.batch)

    def _scores(self, samples: Sequence[Sample]) -> Iterator[Score]:
        import torch

        from ._pixels import normalise, resize_crop

        images: list[Any] = [sample.image for sample in samples]
        pixels = torch.stack([normalise(resize_crop(image, self.size)) for image in images]).to(*self.where)
        prompts = [sample.prompt for sample in samples]
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        ids, mask = (tokens[name].to(self.where.device) for name in ("input_ids", "attention_mask"))
        with torch.inference_mode():
            return map(Score, self.net(pixels, ids, mask).tolist())
