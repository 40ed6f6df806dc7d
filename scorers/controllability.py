"""How well a generated picture keeps to its condition: read it off again and compare (ControlNet++)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffalign.errors import UserError
from diffalign.extractors import Extractor, load_extractor
from diffalign.records import read_image
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Metric = Literal["f1", "miou", "rmse", "ssim"]
EXTRACTORS: dict[str, tuple[str, ...]] = {
    "f1": ("canny",),
    "miou": ("segmentation",),
    "rmse": ("depth",),
    "ssim": ("hed", "lineart"),
}
"""What each metric can be measured on; the first is taken where none is named."""
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
SMALLEST = WINDOW * 2 ** (len(WEIGHTS) - 1)


def build(metric: Metric = "f1", extractor: str | None = None, params: Mapping[str, Any] | None = None) -> Scorer:
    """Read the condition off each picture and compare it with the record's, as ControlNet++ does (arXiv:2404.07987).

    - ``f1`` (canny): of the edge pixels of both, in [0, 1]; 0 without any edge.
    - ``miou`` (segmentation, ADE20K's colours): mean over all classes in either of intersection over union, in [0, 1].
      Pixels without a class in the condition are left out. ``detail`` has both numbers by class: the published value is
      a mean over classes of their sums over all pictures, which is not the mean of the scores.
    - ``rmse`` (depth): minus the root mean squared difference of grey levels, in [-255, 0].
    - ``ssim`` (hed, lineart): multi-scale structural similarity (Wang et al., 2003), in [0, 1], for which a picture
      needs 176 pixels a side.

    ControlNet++ generates four pictures per condition and has one F1 or SSIM of the four together; here each picture
    has its own. What else its extractors do differently is in :mod:`diffalign.extractors`. A condition of another size
    is scaled to that of the picture. A record without one, or with one of another shape, is a failure.

    Args:
        extractor: see `diffalign list extractors`.
        params: parameters of the extractor, as ``path``.
    """
    name = extractor or EXTRACTORS[metric][0]
    if name not in EXTRACTORS[metric]:
        raise UserError(f"metric {metric!r} is for {' and '.join(EXTRACTORS[metric])}, not for {name!r}")
    return _Controllability(metric, load_extractor(name, **(params or {})))


@dataclass(frozen=True, slots=True)
class _Controllability:
    metric: Metric
    extract: Extractor
    accepts: frozenset[str] = frozenset({"image"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        given = [self._condition(sample) for sample in samples]
        usable = [sample.image for sample, known in zip(samples, given, strict=True) if not isinstance(known, Failure)]
        found = iter(self.extract([image.convert("RGB") for image in usable if image is not None]))
        return [known if isinstance(known, Failure) else self._compare(known, next(found)) for known in given]

    def _condition(self, sample: Sample) -> Image.Image | Failure:
        """The condition in the size of the picture."""
        from PIL import Image

        assert sample.image is not None
        if sample.condition is None:
            return Failure("input", "the record has no condition")
        try:
            known = read_image(sample.condition.parent, sample.condition.name)
        except UserError as error:
            return Failure("input", str(error))
        (width, height), (given, high) = sample.image.size, known.size
        if abs(given * height - high * width) > max(given, high, width, height):  # more than rounding of a side
            return Failure("input", f"a condition of {given}x{high} for a picture of {width}x{height}")
        if self.metric == "ssim" and min(width, height) < SMALLEST:
            return Failure("input", f"SSIM over five scales needs {SMALLEST} pixels a side, not {width}x{height}")
        flat = self.metric in ("f1", "miou")  # between two edges or colours there is none
        return known.resize((width, height), Image.Resampling.NEAREST if flat else Image.Resampling.BILINEAR)

    def _compare(self, known: Image.Image, found: Image.Image) -> Outcome:
        if self.metric == "miou":
            return _miou(known, found)
        import numpy as np

        truth, read = (np.asarray(image.convert("L"), np.float64) for image in (known, found))
        if self.metric == "rmse":
            return Score(-float(np.sqrt(((truth - read) ** 2).mean())))
        if self.metric == "ssim":
            return Score(_ssim(truth / 255, read / 255))
        edges, marked = truth > 127, read > 127
        total = int(edges.sum() + marked.sum())
        return Score(2 * int((edges & marked).sum()) / total if total else 0.0)


def _miou(known: Image.Image, found: Image.Image) -> Outcome:
    import numpy as np

    from diffalign.extractors.segmentation import NONE, PALETTE, classes

    truth, read = classes(known), classes(found)
    truth, read = truth[truth != NONE], read[truth != NONE]
    if not truth.size:
        return Failure("input", "the condition has no pixel with a class")
    sizes = [np.bincount(part[part != NONE], minlength=len(PALETTE)) for part in (truth, read, truth[truth == read])]
    shared, union = sizes[2], sizes[0] + sizes[1] - sizes[2]
    seen = np.flatnonzero(union)
    both = {str(index): [int(shared[index]), int(union[index])] for index in seen}
    return Score(float((shared[seen] / union[seen]).mean()), detail={"intersection_and_union": both})


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Multi-scale SSIM of two grey pictures in [0, 1], as torchmetrics has it: windows inside, negative terms as 0."""
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(a)[None, None]
    y = torch.from_numpy(b)[None, None]
    axis = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    kernel = torch.exp(-0.5 * (axis / SIGMA) ** 2)
    kernel = kernel / kernel.sum()

    def blur(image: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(image, kernel[None, None, :, None]), kernel[None, None, None, :])

    value = 1.0
    for scale, weight in enumerate(WEIGHTS):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        contrast = (2 * (blur(x * y) - mean_x * mean_y) + C2) / (var_x.clamp(0) + var_y.clamp(0) + C2)
        last = scale == len(WEIGHTS) - 1
        light = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1) if last else 1.0
        value *= max(float((light * contrast).mean()), 0.0) ** weight
    return value
