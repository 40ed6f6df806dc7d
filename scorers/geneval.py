"""GenEval's judge: Mask2Former finds the objects, CLIP names their colours, the rules of the benchmark decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign import geneval
from diffalign.errors import UserError
from diffalign.geneval import COUNTING_THRESHOLD, MAX_OBJECTS, THRESHOLD, Found
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import nn

    from ._colors import Colors
    from ._loading import Place
    from ._mask2former_images import Instance

Rules = Literal["official", "soft", "strict"]
DType = Literal["fp32", "bf16", "fp16"]
COUNTING = "counting"  # the tag with a threshold of its own


def build(
    checkpoint: str,
    *,
    rules: Rules = "official",
    clip: str = "ViT-L-14",
    clip_weights: str = "openai",
    threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = 1.0,
    device: str = "auto",
    dtype: DType = "fp32",
    batch: int = 8,
) -> Scorer:
    """A score per image, from GenEval's metadata as ``meta``; ``detail`` has the reason and the detections.

    Args:
        checkpoint: mmdet's ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``, as ``.pth`` or safetensors.
        rules: ``official`` is the benchmark, 0 or 1: a count is a lower bound and only ``exclude`` makes it exact.
            The other two are rewards, not to be reported as GenEval. ``strict``: 0 or 1, every count exact. ``soft``:
            the mean over all conditions of how far they hold, in [0, 1]; other than in flow_grpo's reward a failed
            position is not also counted as a met one (:func:`diffalign.geneval.graded`).
        clip: open_clip's name of the model that names colours; read when a prompt first asks for one.
        clip_weights: open_clip's name of its weights, or a file; a file of OpenAI's is for ``ViT-L-14-quickgelu``.
        threshold: detections with a higher score count.
        counting_threshold: the same for prompts with the tag ``counting``.
        max_objects: detections of a class that are looked at.
        max_overlap: below 1, objects that overlap a better one of their class by that much are dropped.
        dtype: of the detector; the thresholds were set with fp32.
        batch: images of one size that go through the detector at a time.
    """
    from ._loading import place

    for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
        if not 0 <= value < 1:
            raise UserError(f"{name} {value}: must be in [0, 1)")
    if max_objects < 1 or not 0 < max_overlap <= 1:
        raise UserError("max_objects must be positive, max_overlap in (0, 1]")
    if not Path(checkpoint).is_file():
        raise UserError(f"checkpoint: no file {checkpoint}")
    limits = _Limits(threshold, counting_threshold, max_objects, max_overlap)
    return _GenEval(rules, _Models(checkpoint, clip, clip_weights, place(device, dtype, batch), batch), limits)


@dataclass(frozen=True, slots=True)
class _Limits:
    threshold: float
    counting: float
    max_objects: int
    max_overlap: float

    def keep(self, found: Sequence[_Detected], tag: str) -> list[_Detected]:
        threshold = self.counting if tag == COUNTING else self.threshold
        return geneval.keep(found, threshold=threshold, max_objects=self.max_objects, max_overlap=self.max_overlap)


@dataclass(frozen=True, slots=True, eq=False)
class _Detected(Found):
    """A detected object with its mask, bool (H, W)."""

    mask: np.ndarray = field(kw_only=True)


@dataclass(frozen=True)
class _Models:
    """The two networks, each loaded when it is first needed."""

    checkpoint: str
    clip: str
    clip_weights: str
    where: Place
    batch: int

    @cached_property
    def detector(self) -> nn.Module:
        from ._mask2former import load

        return load(self.checkpoint).to(*self.where)

    @cached_property
    def colors(self) -> Colors:
        import torch

        from . import _clip
        from ._colors import Colors

        # the clip of the release runs in float32
        return Colors(_clip.open_clip_encoder(self.clip, self.clip_weights, self.where._replace(dtype=torch.float32)))

    def detect(self, images: Sequence[Image.Image], above: float) -> list[list[Instance]]:
        from ._mask2former_images import detect

        return detect(self.detector, images, batch=self.batch, dtype=self.where.dtype, above=above)


@dataclass(frozen=True, slots=True)
class _GenEval:
    rules: Rules
    models: _Models
    limits: _Limits
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        wrong = [geneval.complaint(sample.meta, geneval.CLASSES, geneval.COLORS) for sample in samples]
        usable = [sample for sample, why in zip(samples, wrong, strict=True) if why is None]
        scores = iter(self._scores(usable))
        return [
            next(scores) if why is None else Failure("input", f"the record's meta is not GenEval's: {why}")
            for why in wrong
        ]

    def _scores(self, samples: Sequence[Sample]) -> list[Score]:
        if not samples:
            return []
        images = [sample.image.convert("RGB") for sample in samples if sample.image is not None]
        above = min(self.limits.threshold, self.limits.counting)
        found = [
            self.limits.keep([_detected(instance) for instance in instances], sample.meta["tag"])
            for sample, instances in zip(samples, self.models.detect(images, above), strict=True)
        ]
        self._color(samples, images, found)
        return [self._score(sample.meta, objects) for sample, objects in zip(samples, found, strict=True)]

    def _color(
        self, samples: Sequence[Sample], images: Sequence[Image.Image], found: Sequence[list[_Detected]]
    ) -> None:
        """Give a colour to the objects that a verdict depends on, those of all images in one go."""
        exact = self.rules != "official"
        wanted = [
            (row, index)
            for row, (sample, objects) in enumerate(zip(samples, found, strict=True))
            for index in geneval.to_color(sample.meta, objects, exact=exact)
        ]
        if not wanted:
            return
        from ._colors import Cutout

        asked = [(images[row], found[row][index]) for row, index in wanted]
        names = self.models.colors([Cutout(image, thing.mask, thing.box, thing.label) for image, thing in asked])
        for (row, index), name in zip(wanted, names, strict=True):
            found[row][index] = replace(found[row][index], color=name)

    def _score(self, metadata: Mapping[str, Any], found: Sequence[_Detected]) -> Score:
        correct, reason = geneval.check(metadata, found, exact=self.rules != "official")
        value = geneval.graded(metadata, found) if self.rules == "soft" else float(correct)
        detections: dict[str, list[list[float]]] = {}
        for thing in sorted(found, key=lambda thing: geneval.CLASSES.index(thing.label)):
            detections.setdefault(thing.label, []).append([*thing.box, thing.score])
        return Score(value, detail={"reason": reason, "detections": detections})


def _detected(instance: Instance) -> _Detected:
    return _Detected(geneval.CLASSES[instance.label], instance.score, instance.box, mask=instance.mask)
