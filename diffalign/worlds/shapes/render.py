"""Renderer of the shapes world: GenEval metadata -> 32x32 images, batched, with analytic anti-aliasing.

A scene is up to four objects; an object is a signed distance field filled with one colour. Everything is a function
of an explicit ``torch.Generator``. Lengths are pixels, hues degrees. Letters: B images, N = 4 object slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.worlds.shapes.prompts import COLORS, SHAPES, Metadata

SIZE = 32
SLOTS = 4
HUES = tuple(COLORS.values())
RADIUS = {1: (6.0, 9.0), 2: (5.2, 7.0), 3: (4.7, 5.6), 4: (4.5, 4.8)}  # by number of objects in the scene
REACH = 1.1  # no shape extends further than this many radii from its centre
GAP = 1.2  # pixels between the reach of two objects, so that equal colours never touch
AXIS_RATIO = 1.25  # "left of" is drawn with |dx| > 1.25 |dy|, well inside GenEval's 60 degree cone
_SIDE, _TRIANGLE, _ARM, _HOLE = 0.78, 1.1, 0.36, 0.5  # shape proportions in radii
AREA = {  # area of each shape with radius 1
    "circle": math.pi,
    "square": 4 * _SIDE**2,
    "triangle": 0.75 * math.sqrt(3.0) * _TRIANGLE**2,
    "cross": 8 * _ARM - 4 * _ARM**2,
    "ring": math.pi * (1 - _HOLE**2),
}


def _box(dx: Tensor, dy: Tensor, half_x: Tensor, half_y: Tensor) -> Tensor:
    qx, qy = dx.abs() - half_x, dy.abs() - half_y
    outside = torch.hypot(qx.clamp_min(0), qy.clamp_min(0))
    return outside + torch.maximum(qx, qy).clamp_max(0)


def signed_distance(shape: str, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Distance in pixels to the outline of ``shape`` of radius ``r``, negative inside. ``dy`` points down."""
    if shape == "circle":
        return torch.hypot(dx, dy) - r
    if shape == "ring":
        d = torch.hypot(dx, dy)
        return torch.maximum(d - r, _HOLE * r - d)
    if shape == "square":
        return _box(dx, dy, _SIDE * r, _SIDE * r)
    if shape == "cross":
        return torch.minimum(_box(dx, dy, r, _ARM * r), _box(dx, dy, _ARM * r, r))
    if shape == "triangle":  # equilateral, centroid at the origin, apex up; inradius = half the circumradius
        slope = math.sqrt(3.0) / 2
        sides = torch.maximum(slope * dx.abs() - 0.5 * dy, dy)
        return sides - 0.5 * _TRIANGLE * r
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, cx: Tensor, cy: Tensor, r: Tensor) -> Tensor:
    """Share of every pixel covered by the shape: (..., ) centres and radii -> (..., SIZE, SIZE) in [0, 1]."""
    axis = torch.arange(SIZE, dtype=cx.dtype) + 0.5
    dx = axis - cx[..., None, None]
    dy = axis[:, None] - cy[..., None, None]
    return (0.5 - signed_distance(shape, dx, dy, r[..., None, None])).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Scenes:
    """B scenes: ``shape`` and ``color`` index SHAPES and COLORS, -1 marks an empty slot; all tensors are (B, N)."""

    shape: Tensor
    color: Tensor
    cx: Tensor
    cy: Tensor
    r: Tensor


def _uniform(low: Tensor | float, high: Tensor | float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _relation_holds(relation: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """Slot 1 stands in ``relation`` (index of RELATIONS, -1 = none) to slot 0."""
    dx, dy = cx[:, 1] - cx[:, 0], cy[:, 1] - cy[:, 0]
    wide, tall = dx.abs() > AXIS_RATIO * dy.abs(), dy.abs() > AXIS_RATIO * dx.abs()
    options = torch.stack([wide & (dx < 0), wide & (dx > 0), tall & (dy < 0), tall & (dy > 0)], 1)
    return (relation < 0) | options.gather(1, relation.clamp_min(0)[:, None])[:, 0]


def _layout(count: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Non-overlapping centres and radii by rejection: every round redraws all scenes that still fail."""
    b = len(count)
    used = torch.arange(SLOTS) < count[:, None]
    both = used[:, :, None] & used[:, None, :] & ~torch.eye(SLOTS, dtype=torch.bool)
    bounds = torch.tensor([RADIUS[n] for n in range(1, SLOTS + 1)])[count - 1]
    cx, cy, r = (torch.zeros(b, SLOTS) for _ in range(3))
    todo = torch.arange(b)
    while len(todo):
        shape = (len(todo), SLOTS)
        r_new = _uniform(bounds[todo, :1], bounds[todo, 1:], shape, generator)
        margin = REACH * r_new + 0.5
        x_new = _uniform(margin, SIZE - margin, shape, generator)
        y_new = _uniform(margin, SIZE - margin, shape, generator)
        distance = torch.hypot(x_new[:, :, None] - x_new[:, None], y_new[:, :, None] - y_new[:, None])
        apart = distance > REACH * (r_new[:, :, None] + r_new[:, None]) + GAP
        cx[todo], cy[todo], r[todo] = x_new, y_new, r_new
        ok = (apart | ~both[todo]).flatten(1).all(1) & _relation_holds(relation[todo], x_new, y_new)
        todo = todo[~ok]
    return cx, cy, r


def sample_scenes(batch: Sequence[Metadata], generator: torch.Generator) -> Scenes:
    """Draw one scene that satisfies each prompt; what the prompt leaves open (colours, places, sizes) is random."""
    from diffalign.worlds.shapes.prompts import RELATIONS

    b = len(batch)
    shape = torch.full((b, SLOTS), -1)
    color = torch.randint(len(HUES), (b, SLOTS), generator=generator)
    relation = torch.full((b,), -1)
    names = list(COLORS)
    for row, metadata in enumerate(batch):
        slot = 0
        for item in metadata["include"]:
            first = slot
            for _ in range(item["count"]):
                shape[row, slot] = SHAPES.index(item["class"])
                if "color" in item:
                    color[row, slot] = names.index(item["color"])
                elif item["count"] > 1:
                    color[row, slot] = color[row, first]
                slot += 1
            if "position" in item:
                relation[row] = RELATIONS.index(item["position"][0])
    cx, cy, r = _layout((shape >= 0).sum(1), relation, generator)
    return Scenes(shape, color, cx, cy, r)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _background(b: int, generator: torch.Generator) -> Tensor:
    level = _uniform(0.35, 0.75, (b, 1, 1, 1), generator)
    tint = _uniform(-0.02, 0.02, (b, 3, 1, 1), generator)
    slope_x, slope_y = (_uniform(-0.1, 0.1, (b, 1, 1, 1), generator) for _ in range(2))
    axis = torch.linspace(-1, 1, SIZE)
    return level + tint + slope_x * axis + slope_y * axis[:, None]


def render(scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Scenes -> (B, 3, SIZE, SIZE) in [0, 1]: grey gradient, then each object with a little colour jitter."""
    b = len(scenes.shape)
    image = _background(b, generator)
    hue = torch.tensor(HUES)[scenes.color] + _uniform(-8, 8, (b, SLOTS), generator)
    paint = _hsv_to_rgb(hue % 360, _uniform(0.8, 1, (b, SLOTS), generator), _uniform(0.75, 1, (b, SLOTS), generator))
    alpha = torch.zeros(b, SLOTS, SIZE, SIZE)
    for index, name in enumerate(SHAPES):
        rows, slots = (scenes.shape == index).nonzero(as_tuple=True)
        alpha[rows, slots] = coverage(name, scenes.cx[rows, slots], scenes.cy[rows, slots], scenes.r[rows, slots])
    for slot in range(SLOTS):
        a = alpha[:, slot, None]
        image = image * (1 - a) + a * paint[:, slot, :, None, None]
    return image


def render_prompts(batch: Sequence[Metadata], generator: torch.Generator) -> Tensor:
    """One clean image per prompt: (B, 3, SIZE, SIZE) in [0, 1]."""
    return render(sample_scenes(batch, generator), generator)
