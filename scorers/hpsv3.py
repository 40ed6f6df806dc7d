"""Human Preference Score v3, Qwen2-VL 7B trained on HPDv3 (arXiv:2508.03789)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.scoring import Outcome, Sample, Score, Scorer

if TYPE_CHECKING:
    from ._loading import Place
    from ._qwen_reward import Chats, RewardNet

FILE = "HPSv3.safetensors"


def build(
    wording: str,
    weights: str = "MizzenAI/HPSv3",
    base: str = "Qwen/Qwen2-VL-7B-Instruct",
    device: str = "auto",
    dtype: str = "bf16",
    batch: int = 8,
) -> Scorer:
    """Human Preference Score v3, Qwen2-VL 7B trained on HPDv3 (arXiv:2508.03789).

    The network predicts a normal distribution: the score is its mean, ``sigma`` in the detail its standard deviation.

    Args:
        wording: ``hpsv3/dataset/data_collator_qwen.py`` of the release, from which the words that the network was
            trained to be asked are read; it is not run.
        weights: ``HPSv3.safetensors``, or the Hub id or folder that holds it.
        base: the folder or Hub id of Qwen2-VL; of it the configuration and the tokenizer are read.
        device, dtype, batch: see ``_loading.place``; the head runs in fp32. The release runs in bf16.
    """
    from ._loading import find_weights, loading, place
    from ._qwen_reward import Chats, load_net, read_wording

    where = place(device, dtype, batch)
    words = read_wording(Path(wording).expanduser())
    with loading(base):
        from transformers import AutoTokenizer, Qwen2VLConfig

        config = Qwen2VLConfig.from_pretrained(base)
        chats = Chats(AutoTokenizer.from_pretrained(base), config.vision_config, words)
    net = load_net(find_weights(weights, FILE), config, where.dtype)
    net.eval().requires_grad_(False).to(where.device)
    return _Hps3(net, chats, where, batch)


@dataclass(frozen=True, slots=True)
class _Hps3:
    net: RewardNet
    chats: Chats
    where: Place
    batch: int
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        from ._loading import score_pictures

        return score_pictures(samples, self._scores, self.batch)

    def _scores(self, samples: Sequence[Sample]) -> list[Score]:
        import torch

        images: list[Any] = [sample.image for sample in samples]
        given = self.chats([sample.prompt for sample in samples], images)
        given = {name: value.to(self.where.device) for name, value in given.items()}
        with torch.inference_mode():
            means, logs = self.net(**given, token=self.chats.token).unbind(1)
        sigmas = logs.exp().tolist()
        return [Score(mean, detail={"sigma": sigma}) for mean, sigma in zip(means.tolist(), sigmas, strict=True)]
