"""How well a picture shows the quoted text of its prompt: RapidOCR reads it, edit distance compares (Flow-GRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from diffalign.errors import UserError
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

if TYPE_CHECKING:
    from PIL import Image

Metric = Literal["similarity", "accuracy"]


def build(metric: Metric = "similarity") -> Scorer:
    """Score pictures by the text that can be read in them, spaces left out and in lower case.

    The target is ``meta.text`` if it is there, else what stands between the first two double quotes of the prompt; a
    record without either is a failure. ``similarity`` is the reward of Flow-GRPO (arXiv:2505.05470): 1 if the target is
    part of what is read, else ``1 - min(d, n) / n`` with the edit distance d to all that is read and the length n of
    the target. ``accuracy`` is 1 if exactly the target is read, else 0. ``detail`` has ``read`` and ``target``.

    A picture on which the reader fails is a failure, where Flow-GRPO's release takes it for a 0. That release reads
    with PaddleOCR; RapidOCR runs models of the same line, packed with it, without network.
    """
    return _OCR(metric, _Reader())


class _Reader:
    """All text of a picture, from top to bottom; the models are loaded for the first one."""

    @cached_property
    def _engine(self) -> Any:
        try:
            from rapidocr import RapidOCR
        except ImportError:
            raise UserError("scorer 'ocr' needs rapidocr: pip install 'diffalign[ocr]'") from None
        return RapidOCR(params={"Global.log_level": "critical"})  # it would log every picture without text

    def __call__(self, image: Image.Image) -> str:
        import numpy as np

        found = self._engine(np.asarray(image.convert("RGB"))[:, :, ::-1])  # it reads arrays as BGR
        return "".join(found.txts or ())


@dataclass(frozen=True, slots=True)
class _OCR:
    metric: Metric
    read: Any
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> Outcome:
        target = _normal(_target(sample))
        if not target:
            return Failure(
                "input", f"prompt {sample.prompt!r} has no text in double quotes, and its record no meta.text"
            )
        assert sample.image is not None
        try:
            read = self.read(sample.image)
        except UserError:
            raise
        except Exception as error:
            return Failure(type(error).__name__, str(error))
        shown = _normal(read)
        value = _similarity(shown, target) if self.metric == "similarity" else float(shown == target)
        return Score(value, detail={"read": read, "target": target})


def _target(sample: Sample) -> str:
    given = sample.meta.get("text")
    if isinstance(given, str):
        return given
    parts = sample.prompt.split('"', 2)
    return parts[1] if len(parts) == 3 else ""


def _normal(text: str) -> str:
    return text.replace(" ", "").lower()


def _similarity(read: str, target: str) -> float:
    """1 if the target is part of what is read, else 1 minus the edit distance, in lengths of the target."""
    from rapidfuzz.distance import Levenshtein

    if target in read:
        return 1.0
    return 1 - min(Levenshtein.distance(read, target), len(target)) / len(target)
