"""Exact judge of the shapes world: images -> objects -> GenEval verdict, strict verdict and graded score.

Objects are found by analysis by synthesis: connected regions of one hue, each compared with a rendering of all five
shapes at the region's centroid and area. No network, no threshold tuned on generated images. Letters: B images,
M regions, S = 5 shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign import geneval
from diffalign.worlds.shapes.prompts import COLORS, SHAPES, Metadata
from diffalign.worlds.shapes.render import AREA, HUES, SIZE, coverage

CHROMA = 0.22  # a pixel with less colour than this is background
MIN_IOU = 0.68  # a region is a shape when it overlaps a clean rendering of it this much
MIN_AREA = 14.0  # pixels; the smallest rendered shape has 35
SPECK = 4  # regions of fewer pixels are noise and are not even counted as malformed
_DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True, slots=True)
class Region:
    """One connected region of one hue. ``iou`` has an entry per shape, ``hue`` is its mean in degrees."""

    box: tuple[float, float, float, float]
    area: float
    hue: float
    color: str
    iou: tuple[float, ...]

    @property
    def shape(self) -> str:
        return SHAPES[max(range(len(SHAPES)), key=self.iou.__getitem__)]

    @property
    def is_object(self) -> bool:
        return max(self.iou) >= MIN_IOU and self.area >= MIN_AREA

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """``correct``: GenEval's rule. ``strict``: correct and nothing extra or malformed. ``graded``: in [0, 1]."""

    correct: bool
    strict: bool
    graded: float
    reason: str


def _hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """Chroma in [0, 1] and hue in degrees, both (B, H, W)."""
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    r, g, b = images.unbind(1)
    safe = chroma.clamp_min(1e-6)
    hue = torch.where(high == r, ((g - b) / safe) % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    return chroma, hue * 60


def _circular_distance(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b + 180) % 360 - 180).abs()


def _label_regions(kind: Tensor) -> Tensor:
    """4-connected components of equal ``kind`` (B, H, W; -1 is background) -> labels, 0 for background."""
    b, h, w = kind.shape
    labels = torch.arange(1, h * w + 1, dtype=torch.int32).reshape(1, h, w).expand(b, h, w) * (kind >= 0)
    same_x, same_y = kind[:, :, 1:] == kind[:, :, :-1], kind[:, 1:] == kind[:, :-1]
    while True:  # every pixel takes the largest label among itself and its equal neighbours, until nothing moves
        new = labels.clone()
        new[:, :, 1:] = torch.maximum(new[:, :, 1:], labels[:, :, :-1] * same_x)
        new[:, :, :-1] = torch.maximum(new[:, :, :-1], labels[:, :, 1:] * same_x)
        new[:, 1:] = torch.maximum(new[:, 1:], labels[:, :-1] * same_y)
        new[:, :-1] = torch.maximum(new[:, :-1], labels[:, 1:] * same_y)
        if torch.equal(new, labels):
            return labels
        labels = new


def _soft_mask(mask: Tensor, chroma: Tensor, taken: Tensor) -> Tensor:
    """Anti-aliased coverage (M, H, W) of each region: chroma relative to its own 70th percentile, one pixel around."""
    inside = torch.where(mask, chroma, torch.nan).flatten(1)
    full = inside.nanquantile(0.7, dim=1)[:, None, None]
    near = F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0].bool() & (mask | ~taken)
    floor = 0.06  # the background's own tint
    return ((chroma - floor) / (full - floor)).clamp(0, 1) * near


def _shape_overlaps(alpha: Tensor) -> Tensor:
    """Soft IoU (M, S) of each region with every shape of the same area at the same centroid."""
    axis = torch.arange(SIZE, dtype=alpha.dtype) + 0.5
    area = alpha.sum((1, 2))
    cx = (alpha.sum(1) * axis).sum(1) / area
    cy = (alpha.sum(2) * axis).sum(1) / area
    overlaps = []
    for name in SHAPES:
        ideal = coverage(name, cx, cy, (area / AREA[name]).sqrt())
        overlaps.append(torch.minimum(alpha, ideal).sum((1, 2)) / torch.maximum(alpha, ideal).sum((1, 2)))
    return torch.stack(overlaps, 1)


@torch.no_grad()
def find_regions(images: Tensor) -> list[list[Region]]:
    """(B, 3, SIZE, SIZE) in [0, 1] -> the coloured regions of each image, in no particular order."""
    images = images.float().clamp(0, 1)
    if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"the shapes judge reads (B, 3, {SIZE}, {SIZE}) images, got {tuple(images.shape)}")
    chroma, hue = _hue(images)
    distance = _circular_distance(hue[..., None], torch.tensor(HUES))
    kind = torch.where(chroma > CHROMA, distance.argmin(-1), -1)
    labels = _label_regions(kind).long()
    keys = labels + torch.arange(len(images))[:, None, None] * (SIZE * SIZE + 1)
    found, counts = keys[labels > 0].unique(return_counts=True)
    found = found[counts >= SPECK]
    out: list[list[Region]] = [[] for _ in images]
    if not len(found):
        return out
    owner = found // (SIZE * SIZE + 1)
    mask = keys[owner] == found[:, None, None]
    alpha = _soft_mask(mask, chroma[owner], labels[owner] > 0)
    overlaps = _shape_overlaps(alpha)
    angle = torch.deg2rad(hue[owner])
    mean_hue = torch.atan2((alpha * angle.sin()).sum((1, 2)), (alpha * angle.cos()).sum((1, 2))).rad2deg() % 360
    nearest = _circular_distance(mean_hue[:, None], torch.tensor(HUES)).argmin(1)
    columns, rows = mask.any(1), mask.any(2)
    x1, y1 = columns.int().argmax(1), rows.int().argmax(1)
    x2, y2 = SIZE - columns.flip(1).int().argmax(1), SIZE - rows.flip(1).int().argmax(1)
    boxes = torch.stack([x1, y1, x2, y2], 1).tolist()
    names = list(COLORS)
    columns_of = zip(
        owner.tolist(), boxes, alpha.sum((1, 2)).tolist(), mean_hue.tolist(), nearest.tolist(), overlaps.tolist(),
        strict=True,
    )  # fmt: skip
    for image, box, area, mean, color, iou in columns_of:
        out[image].append(Region(tuple(box), area, mean, names[color], tuple(iou)))
    return out


def _fit(region: Region, clause: Metadata) -> float:
    """How well a region serves as the object a clause asks for, in [0, 1]: half shape, half colour."""
    shape = min(max((region.iou[SHAPES.index(clause["class"])] - 0.4) / 0.5, 0.0), 1.0)
    if "color" not in clause:
        return shape
    gap = abs((region.hue - COLORS[clause["color"]] + 180) % 360 - 180)
    color = min(max((60.0 - gap) / 50.0, 0.0), 1.0)
    return 0.5 * (shape + color)


def _relation_fit(a: Region, b: Region, relation: str) -> float:
    """1 inside GenEval's cone, falling to 0 on the opposite side."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    ux, uy = _DIRECTION[relation]
    norm = max((dx * dx + dy * dy) ** 0.5, 1e-6)
    return min(max(((dx * ux + dy * uy) / norm + 1.0) / 1.5, 0.0), 1.0)


def _graded(metadata: Metadata, regions: Sequence[Region]) -> float:
    """Mean fit of the best assignment of regions to requested objects, less for every region too many."""
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    slots: list[Region | None] = [*regions, *[None] * len(wanted)]
    relation = next((c["position"][0] for c in metadata["include"] if "position" in c), None)
    fits = [[0.0 if r is None else _fit(r, clause) for r in slots] for clause in wanted]
    if len(metadata["include"]) == 1:  # identical requests: the best regions serve
        best = sum(sorted(fits[0], reverse=True)[: len(wanted)]) / len(wanted)
    else:
        best = 0.0
        for i, j in permutations(range(len(slots)), 2):
            value = (fits[0][i] + fits[1][j]) / 2
            a, b = slots[j], slots[i]
            if relation is not None:
                value *= 0.4 + 0.6 * (_relation_fit(a, b, relation) if a and b else 0.0)
            best = max(best, value)
    return best / (1.0 + 0.25 * max(0, len(regions) - len(wanted)))


def verdict(metadata: Metadata, regions: Sequence[Region]) -> Verdict:
    """Judge one image from its regions."""
    objects = [geneval.Found(r.shape, max(r.iou), r.box, r.color) for r in regions if r.is_object]
    correct, reason = geneval.check(metadata, objects)
    wanted = sum(clause["count"] for clause in metadata["include"])
    strict = correct and len(objects) == len(regions) == wanted
    return Verdict(correct, strict, _graded(metadata, regions), reason)


def judge(images: Tensor, batch: Sequence[Metadata]) -> list[Verdict]:
    """(B, 3, SIZE, SIZE) in [0, 1] and their prompts' metadata -> one verdict each."""
    regions = find_regions(images)
    return [verdict(m, r) for m, r in zip(batch, regions, strict=True)]
