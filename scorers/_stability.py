"""What decides whether a solid stands: its hull, mass properties and support; no simulator.

A body is z-up, its longest side is 1, its lowest point at z = 0 and its box centred over the origin. Its density is
uniform, 1000 kg/m^3.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from diffalign import mesh
from diffalign.errors import UserError

Up = Literal["y", "z"]
Source = Literal["voxels", "mesh", "hull"]
DENSITY = 1000.0
FLAT = 1e-6
"""Smallest volume of a hull, of its box."""
CONTACT = 1e-4
"""Hull vertices that much of the height above the lowest one touch the ground as well."""
TURNS = {"z": np.eye(3), "y": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])}
"""Rotations to z-up: exchanging two axes would mirror the shape."""


class Solid(NamedTuple):
    """Volume, centre (3,) and inertia (3, 3) about the centre of a solid of density 1, and where they are from."""

    volume: float
    centre: np.ndarray
    inertia: np.ndarray
    source: Source = "mesh"


class Body(NamedTuple):
    """Hull (H, 3), outward triangles of the hull (T, 3), and the solid inside it; metres, see the module."""

    hull: np.ndarray
    faces: np.ndarray
    solid: Solid


class Support(NamedTuple):
    """How a body stands on its lowest vertices, without moving it."""

    margin: float
    """Distance of the centre of mass, seen from above, to the edge of the support, negative outside."""
    angle: float
    """Degrees the body can be tilted before its centre of mass is over the edge."""
    corners: int
    """Of the support polygon: a body on a line (2) or a point (1) does not stand."""

    @property
    def stable(self) -> bool:
        """Whether the body stands by itself, the least disturbance included."""
        return self.corners > 2 and self.margin > 0


def load_body(path: Path, up: Up) -> Body:
    """The body of a mesh (``.ply``, ``.obj``) or an occupancy grid (``.npz``).

    A grid is the union of its voxels. A mesh that is closed, with all faces turned one way, weighs what it encloses;
    another one what its convex hull does. Parts that overlap count twice, and loose parts are one rigid body.

    Raises:
        UserError: the file is no shape, or one without a volume.
    """
    if up not in get_args(Up):
        raise UserError(f"up {up!r}: choose {', '.join(get_args(Up))}")
    if path.suffix.lower() == ".npz":
        grid = mesh.read_occupancy(path)
        if not grid.any():
            raise UserError(f"{path}: a degenerate shape: the grid is empty")
        points, solid = _corners(grid), _of_voxels(grid)
    else:
        points, faces = _cleaned(*mesh.read_mesh(path))
        solid = _of_triangles(points[faces]) if _is_closed(faces) else None
    try:
        return _placed(points, solid, TURNS[up])
    except _Flat as error:
        raise UserError(f"{path}: a degenerate shape: {error}") from None


def support(body: Body) -> Support:
    """The support of a body as it is placed; exact for polyhedra, and 0 or less on a line or a point."""
    height = np.ptp(body.hull[:, 2])
    feet = body.hull[body.hull[:, 2] <= body.hull[:, 2].min() + CONTACT * height, :2]
    polygon = _polygon(feet)
    centre = body.solid.centre
    distance = _distance(polygon, centre[:2])
    inside = len(polygon) > 2 and bool((_sides(polygon, centre[:2]) > 0).all())
    margin = distance if inside else -distance
    return Support(margin, math.degrees(math.atan2(margin, centre[2])), len(polygon))


# --- mass ---------------------------------------------------------------------------------------------------------


def _of_voxels(grid: np.ndarray) -> Solid:
    """The union of unit boxes around integer points."""
    centres = np.argwhere(grid) + 0.5
    centre = centres.mean(0)
    offsets = centres - centre
    moments = offsets.T @ offsets + len(centres) / 12 * np.eye(3)  # of a unit box about itself: 1/12 along each axis
    return Solid(float(len(centres)), centre, _inertia(moments), "voxels")


def _of_triangles(triangles: np.ndarray) -> Solid | None:
    """What closed triangles (F, 3, 3) enclose, as signed tetrahedra; None if that is nothing or no solid.

    Faces that all point inwards are taken as turned.
    """
    origin = triangles.mean((0, 1))
    local = triangles - origin
    volumes = np.einsum("fi,fi->f", local[:, 0], np.cross(local[:, 1], local[:, 2])) / 6
    volumes *= np.sign(volumes.sum())
    volume = volumes.sum()
    if not volume > 0:
        return None
    sums = local.sum(1)
    centre = volumes @ sums / (4 * volume)
    moments = np.einsum("f,fki,fkj->ij", volumes, local, local) + np.einsum("f,fi,fj->ij", volumes, sums, sums)
    inertia = _inertia(moments / 20 - volume * np.outer(centre, centre))
    axes = np.linalg.eigvalsh(inertia)
    if not (axes[0] > 0 and axes[0] + axes[1] >= axes[2] * (1 - 1e-9)):
        return None
    return Solid(float(volume), centre + origin, inertia)


def _inertia(moments: np.ndarray) -> np.ndarray:
    """Inertia tensor of the second moments, the integrals of x_i x_j."""
    return np.trace(moments) * np.eye(3) - moments


def _is_closed(faces: np.ndarray) -> bool:
    """Every edge is walked as often one way as the other; more than two faces may meet at it."""
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    count = int(faces.max()) + 1
    forth, back = np.sort(start * count + end), np.sort(end * count + start)
    return bool((forth == back).all())


def _cleaned(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that faces use, each once, and faces with three corners, each once."""
    points, index = np.unique(points, axis=0, return_inverse=True)
    faces = index.reshape(-1)[faces]
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]
    first = np.argmin(faces, axis=1) if len(faces) else np.zeros(0, int)
    turned = np.take_along_axis(faces, (first[:, None] + np.arange(3)) % 3, axis=1)
    faces = np.unique(turned, axis=0)
    used, faces = np.unique(faces, return_inverse=True)
    return points[used], faces.reshape(-1, 3)


# --- shape --------------------------------------------------------------------------------------------------------


class _Flat(Exception):
    """A shape without a volume."""


def _corners(grid: np.ndarray) -> np.ndarray:
    """Corners of the lowest and highest voxel of every column, which the hull is made of."""
    columns = np.argwhere(grid.any(2))
    low = grid.argmax(2)[tuple(columns.T)]
    high = grid.shape[2] - grid[:, :, ::-1].argmax(2)[tuple(columns.T)]
    steps = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    flat = (columns[:, None] + steps).reshape(-1, 2)
    ends = [np.column_stack([flat, np.repeat(z, 4)]) for z in (low, high)]
    return np.unique(np.concatenate(ends), axis=0).astype(np.float64)


def _placed(points: np.ndarray, solid: Solid | None, turn: np.ndarray) -> Body:
    """The body of points that may be turned and of any size; without a solid, the hull is it."""
    from scipy.spatial import ConvexHull, QhullError

    points = points @ turn.T
    if len(points) < 4:
        raise _Flat(f"{len(points)} points")
    sides = np.ptp(points, axis=0)
    scale = 1 / sides.max()
    middle = (points.min(0) + points.max(0)) / 2
    origin = np.array([middle[0], middle[1], points[:, 2].min()])
    points = (points - origin) * scale
    try:
        found = ConvexHull(points)
    except QhullError:
        raise _Flat("its points lie in a plane") from None
    if not found.volume > FLAT * np.prod(sides * scale):
        raise _Flat("its points lie in a plane")
    corner = np.zeros(len(points), np.int64)
    corner[found.vertices] = np.arange(len(found.vertices))
    hull, faces = points[found.vertices], corner[_outward(points, found.simplices, found.equations)]
    if solid is not None:
        centre = (turn @ solid.centre - origin) * scale
        inertia = turn @ solid.inertia @ turn.T * scale**5
        solid = Solid(float(solid.volume * scale**3), centre, inertia, solid.source)
    if solid is None or (found.equations[:, :3] @ solid.centre + found.equations[:, 3]).max() > 0:
        filled = _of_triangles(hull[faces])
        if filled is None:
            raise _Flat("its hull has no volume")
        solid = filled._replace(source="hull")
    return Body(hull, faces, solid)


def _outward(points: np.ndarray, faces: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Triangles turned so that their normals are those of their planes, which look outwards."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    inward = (np.cross(b - a, c - a) * planes[:, :3]).sum(1) < 0
    return np.where(inward[:, None], faces[:, ::-1], faces)


def _polygon(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull in the plane, counterclockwise; two if the points are on a line, one if they are one.

    Both up to :data:`CONTACT` of the longest side of the body.
    """
    from scipy.spatial import ConvexHull

    offsets = points - points.mean(0)
    _, _, axes = np.linalg.svd(offsets, full_matrices=True)
    along, across = (offsets @ axis for axis in axes)
    if np.ptp(along) < CONTACT:
        return points.mean(0, keepdims=True)
    if np.ptp(across) < CONTACT:
        return points[[along.argmin(), along.argmax()]]
    return points[ConvexHull(points).vertices]


def _sides(polygon: np.ndarray, point: np.ndarray) -> np.ndarray:
    """For every edge, whether the point is left (positive) or right of it."""
    edges, offsets = np.roll(polygon, -1, axis=0) - polygon, point - polygon
    return edges[:, 0] * offsets[:, 1] - edges[:, 1] * offsets[:, 0]


def _distance(polygon: np.ndarray, point: np.ndarray) -> float:
    """From a point to the nearest edge."""
    edges, offsets = np.roll(polygon, -1, axis=0) - polygon, point - polygon
    lengths = np.maximum((edges**2).sum(1), np.finfo(float).tiny)
    along = np.clip((edges * offsets).sum(1) / lengths, 0, 1)
    return float(np.linalg.norm(offsets - along[:, None] * edges, axis=1).min())
