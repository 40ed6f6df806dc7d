"""Meshes of occupancy grids: closed, outward, of the right volume and place; files of both, and files that are not."""

import re
import sys

import numpy as np
import pytest
import trimesh

from diffalign import mesh
from diffalign.errors import UserError


def ball(side: int, radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """Voxels whose centres are within a ball in the unit cube."""
    axis = (np.arange(side) + 0.5) / side - 0.5
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < radius**2


def test_a_ball_is_closed_outward_and_of_the_right_volume():
    shape = trimesh.Trimesh(*mesh.triangulate(ball(64, 0.4)), process=False)
    assert shape.is_watertight
    assert shape.is_winding_consistent
    assert shape.volume == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=5e-3)
    np.testing.assert_allclose(shape.center_mass, 0.0, atol=1e-6)
    assert shape.euler_number == 2


def test_axes_and_origin_are_those_of_the_grid():
    centre = (-0.2, 0.05, 0.25)
    shape = trimesh.Trimesh(*mesh.triangulate(ball(48, 0.15, centre)), process=False)
    np.testing.assert_allclose(shape.center_mass, centre, atol=2e-3)
    grid = np.zeros((8, 8, 8), bool)
    grid[1, 2, 6] = True
    vertices, _ = mesh.triangulate(grid)
    middle = (np.array([1, 2, 6]) + 0.5) / 8 - 0.5
    np.testing.assert_allclose(np.abs(vertices - middle).sum(1), 0.5 / 8, atol=1e-7)  # an octahedron


@pytest.mark.parametrize("seed", range(4))
def test_any_grid_is_closed_up_to_the_border_of_the_cube(seed):
    grid = np.random.default_rng(seed).random((7, 7, 7)) < 0.4
    shape = trimesh.Trimesh(*mesh.triangulate(grid), process=False)
    assert shape.is_watertight
    assert shape.volume > 0
    assert np.abs(shape.vertices).max() <= 0.5
    full = trimesh.Trimesh(*mesh.triangulate(np.ones((6, 6, 6))), process=False)
    assert full.is_watertight
    assert 0.95 < full.volume < 1


def test_an_empty_grid_is_an_empty_mesh():
    vertices, faces = mesh.triangulate(np.zeros((4, 4, 4)))
    assert vertices.shape == faces.shape == (0, 3)


@pytest.mark.parametrize("side", [1, 5, 16])
def test_grids_come_back(side, tmp_path):
    grid = np.random.default_rng(side).random((side, side, side)) < 0.5
    for values in (grid, grid.astype(np.float32)):
        mesh.write_occupancy(tmp_path / "deep" / "grid.npz", values)
        found = mesh.read_occupancy(tmp_path / "deep" / "grid.npz")
        assert found.dtype == bool
        np.testing.assert_array_equal(found, grid)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["grid.npz"]


def test_equal_grids_are_equal_files(tmp_path):
    for name in ("a.npz", "b.npz"):
        mesh.write_occupancy(tmp_path / name, ball(16, 0.3))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.npz").stat().st_size < 16**3 / 8 + 500


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 5), (1, 4, 4, 4)])
def test_other_shapes_are_a_mistake_of_the_caller(shape, tmp_path):
    for use in (mesh.triangulate, lambda grid: mesh.write_occupancy(tmp_path / "x.npz", grid)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            use(np.zeros(shape))


BITS = np.zeros(8, np.uint8)
BROKEN = {
    "side is missing": {"bits": BITS},
    "bits are missing": {"side": np.int64(4)},
    "too many bits": {"bits": np.zeros(9, np.uint8), "side": np.int64(4)},
    "floats": {"bits": BITS.astype(np.float32), "side": np.int64(4)},
    "huge": {"bits": BITS, "side": np.int64(10**6)},
    "negative": {"bits": BITS, "side": np.int64(-4)},
    "two sides": {"bits": BITS, "side": np.array([4, 4])},
    "pickled": {"bits": np.array([{}], object), "side": np.int64(4)},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_grid_is_refused(content, tmp_path):
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(UserError, match=r"x.npz: not an occupancy grid: \w+"):
        mesh.read_occupancy(tmp_path / "x.npz")


def test_missing_and_cut_off_grids_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such grid"):
        mesh.read_occupancy(tmp_path / "x.npz")
    mesh.write_occupancy(tmp_path / "x.npz", ball(16, 0.3))
    content = (tmp_path / "x.npz").read_bytes()
    for part in (b"", content[: len(content) // 2], b"text"):
        (tmp_path / "x.npz").write_bytes(part)
        with pytest.raises(UserError, match="not an occupancy grid"):
            mesh.read_occupancy(tmp_path / "x.npz")


@pytest.mark.parametrize("ending", [".ply", ".obj", ".PLY"])
def test_meshes_come_back(ending, tmp_path):
    vertices, faces = mesh.triangulate(ball(12, 0.3))
    mesh.write_mesh(tmp_path / "deep" / f"ball{ending}", vertices, faces)
    again = mesh.read_mesh(tmp_path / "deep" / f"ball{ending}")
    np.testing.assert_allclose(again[0], vertices, atol=1e-7)
    np.testing.assert_array_equal(again[1], faces)


def test_what_is_no_mesh_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.ply or \.obj"):
        mesh.read_mesh(tmp_path / "x.stl")
    with pytest.raises(UserError, match=r"\.ply or \.obj"):
        mesh.write_mesh(tmp_path / "x", np.zeros((3, 3)), np.array([[0, 1, 2]]))
    for ending in mesh.MESH_FILES:
        path = tmp_path / f"x{ending}"
        with pytest.raises(UserError, match="no such mesh"):
            mesh.read_mesh(path)
        for content in (b"", b"\0\1\2", b"v 0 0 0\nv 0 0 1\nv 0 1 0\nf 1 2 9\n", b"v 0 0 0\n"):
            path.write_bytes(content)
            with pytest.raises(UserError, match="not a mesh"):
                mesh.read_mesh(path)


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    with pytest.raises(UserError, match=r"pip install 'diffalign\[sim\]'"):
        mesh.triangulate(ball(4, 0.3))
