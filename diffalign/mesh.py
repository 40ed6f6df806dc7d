"""Occupancy grids as triangle meshes, and the files of both.

A grid (R, R, R) fills the unit cube: voxel (i, j, k) is centred at ((i, j, k) + 1/2) / R - 1/2. Axes are x, y, z with z
up, as in TRELLIS (arXiv:2412.01506) and DSO.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.files import replacing

LARGEST = 1024  # voxels along a side that a file may ask for
MESH_FILES = (".ply", ".obj")


def triangulate(occupancy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Marching cubes on a grid, empty beyond its border, so that the surface is closed.

    Returns:
        Vertices (V, 3) float32 in [-1/2, 1/2], half-way between centres of full and empty voxels, and outward faces
        (F, 3) int64; both of length 0 for an empty grid.
    """
    measure = _sim("skimage.measure")
    grid = np.pad(_checked(occupancy), 1).astype(np.float32)
    if not grid.any():
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)
    # the original table keeps voxels that share an edge apart; the newer one joins them, and four faces meet there
    vertices, faces, _, _ = measure.marching_cubes(grid, 0.5, method="lorensen", gradient_direction="ascent")
    side = np.float32(occupancy.shape[0])
    return ((vertices - 0.5) / side - 0.5).astype(np.float32), faces.astype(np.int64)


def write_occupancy(path: Path, occupancy: np.ndarray) -> None:
    """Write a grid (R, R, R) of 0 and 1 as ``.npz``, eight voxels to a byte, all at once; parent folders are made."""
    grid = _checked(occupancy)
    with replacing(path, durable=False) as handle:
        np.savez_compressed(handle, bits=np.packbits(grid.reshape(-1)), side=np.int64(grid.shape[0]))


def read_occupancy(path: Path) -> np.ndarray:
    """A grid (R, R, R) of bools that :func:`write_occupancy` wrote; nothing in the file is unpickled.

    Raises:
        UserError: the file is missing or broken, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such grid")
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            side = int(file["side"])
            if not 0 < side <= LARGEST:
                raise ValueError(f"a side of {side} voxels")
            bits = file["bits"]
        if bits.dtype != np.uint8 or bits.shape != (-(-(side**3) // 8),):
            raise ValueError(f"{bits.dtype} {bits.shape} for a side of {side} voxels")
    except Exception as error:  # numpy and zipfile have many ways to say so
        raise UserError(f"{path}: not an occupancy grid: {type(error).__name__}: {error}") from None
    return np.unpackbits(bits, count=side**3).astype(bool).reshape(side, side, side)


def write_mesh(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Write a mesh as ``.ply`` or ``.obj``, all at once; parent folders are made.

    Raises:
        UserError: another ending.
    """
    kind = _kind(path)
    mesh = _sim("trimesh").Trimesh(vertices, faces, process=False)
    content = mesh.export(file_type=kind)
    with replacing(path, durable=False) as handle:
        handle.write(content if isinstance(content, bytes) else content.encode())


def read_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64 and triangles (F, 3) int64 of a ``.ply`` or ``.obj`` file, as they stand in it.

    Raises:
        UserError: another ending, or the file is missing or broken, or has no triangles.
    """
    kind = _kind(path)
    if not path.is_file():
        raise UserError(f"{path}: no such mesh")
    trimesh = _sim("trimesh")
    try:
        with path.open("rb") as handle:  # an open file has no neighbours: materials it names are not looked for
            mesh = trimesh.load_mesh(handle, file_type=kind, process=False)
        vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
        if not len(faces) or not np.isfinite(vertices).all() or faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError("no triangles between finite vertices")
    except Exception as error:  # trimesh raises whatever its parsers meet
        raise UserError(f"{path}: not a mesh: {type(error).__name__}: {error}") from None
    return vertices, faces


def _checked(occupancy: np.ndarray) -> np.ndarray:
    if occupancy.ndim != 3 or len(set(occupancy.shape)) != 1:
        raise ValueError(f"expected a grid (R, R, R), got {occupancy.shape}")
    return occupancy > 0


def _kind(path: Path) -> str:
    if path.suffix.lower() not in MESH_FILES:
        raise UserError(f"{path}: meshes are {' or '.join(MESH_FILES)} files")
    return path.suffix.lower()[1:]


def _sim(module: str) -> Any:
    """A module of the extra ``sim``.

    Raises:
        UserError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"meshes need {module.partition('.')[0]}: pip install 'diffalign[sim]' ({error})") from None
