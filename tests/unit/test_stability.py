"""Which shapes stand: published and analytic cases, exact masses, files of all kinds, workers."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from diffalign.scorers import _stability as statics

from diffalign import mesh
from diffalign.errors import UserError
from diffalign.records import Candidate, Record
from diffalign.scoring import Failure, Sample, Score, load_scorer, score_records

GOLDEN = json.loads(Path(__file__).with_name("stability.json").read_text(encoding="utf-8"))["cases"]
CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
SIDES = ("0132", "4675", "0451", "2376", "0264", "1573")  # outwards
FACES = np.array([[int(s[i]) for i in corners] for s in SIDES for corners in ((0, 1, 2), (0, 2, 3))])


def prism(shear: float, width: float = 0.4) -> np.ndarray:
    corners = CUBE * [width, width, 1]
    corners[:, 0] += shear * corners[:, 2]
    return corners


def write(path: Path, vertices: np.ndarray, faces: np.ndarray = FACES) -> Path:
    mesh.write_mesh(path, vertices, faces)
    return path


def grid(path: Path, *boxes: tuple[slice, slice, slice], side: int = 16) -> Path:
    occupancy = np.zeros((side, side, side), bool)
    for box in boxes:
        occupancy[box] = True
    mesh.write_occupancy(path, occupancy)
    return path


def score(path: Path, **params) -> Score:
    [outcome] = load_scorer("stability", **params)([Sample("", mesh=path)])
    assert isinstance(outcome, Score), outcome
    return outcome


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_reference_numbers(case, tmp_path):
    given, expected = case["params"], case["expected"]
    vertices = np.array(case["inputs"]["vertices"])
    path = write(tmp_path / "shape.obj", vertices, np.array(case["inputs"]["faces"]))
    settings = {"threshold": given["threshold_deg"], "timestep": given["timestep_s"], "duration": given["duration_s"]}
    found = score(path, **settings, perturbation=given["perturbation_deg"])
    alone = score(path, **settings, perturbation=0.0)
    near = {"abs": given["angle_tolerance_deg"]}

    size = np.ptp(vertices, axis=0).max()
    assert found.detail["mass_source"] == "mesh"
    assert found.detail["mass"] / 1000 * size**3 == pytest.approx(expected["volume"], rel=1e-6)
    if expected["support_margin"] is None:
        assert found.detail["corners"] < 3
        assert score(path, reward="margin").value <= 0
    else:
        assert found.detail["corners"] > 2
        assert found.detail["margin"] * size == pytest.approx(expected["support_margin"], rel=1e-9)
        assert score(path, reward="margin").value * size == pytest.approx(expected["support_margin"], rel=1e-9)
        assert found.detail["critical_angle"] == pytest.approx(expected["critical_tilt_deg"], rel=1e-9)
        assert (found.detail["margin"] > 0) == expected["statically_stable"]
    assert alone.detail["rotation"] == pytest.approx(expected["simulated_rotation_deg"], **near)
    assert alone.detail["tilt"] == pytest.approx(expected["simulated_tilt_deg"], **near)
    assert bool(alone.value) == expected["simulated_stable"]
    assert found.detail["tilt"] == pytest.approx(expected["worst_tilt_after_perturbation"], **near)
    assert found.value == (expected["worst_tilt_after_perturbation"] < given["threshold_deg"])
    if "analytic_rest_rotation_deg" in expected:
        assert alone.detail["rotation"] == pytest.approx(expected["analytic_rest_rotation_deg"], **near)


def test_reference_centres():
    for case in GOLDEN:
        vertices, faces = (np.array(case["inputs"][key]) for key in ("vertices", "faces"))
        solid = statics._of_triangles(vertices[faces])
        assert solid is not None
        np.testing.assert_allclose(solid.centre, case["expected"]["center_of_mass"], atol=1e-9)


@pytest.mark.parametrize("shear", [0.41, 0.5, 0.75, 1.0])
def test_a_leaning_prism_falls_on_its_side(shear, tmp_path):
    found = score(write(tmp_path / "prism.ply", prism(shear)), reward="graded")
    rest = 90 - math.degrees(math.atan(shear))
    assert found.detail["tilt"] == pytest.approx(rest, abs=0.5)
    assert found.value == pytest.approx(1 - rest / 90, abs=0.01)
    assert found.detail["status"] == "settled"
    assert found.detail["drop"] > 0.05
    assert found.detail["drift"] > 0.1


class TestMass:
    def test_of_a_box_of_voxels(self, tmp_path):
        path = grid(tmp_path / "box.npz", (slice(2, 6), slice(4, 6), slice(3, 11)))  # 4 x 2 x 8
        solid = statics.load_body(path, "z").solid
        assert solid.source == "voxels"
        assert solid.volume == pytest.approx(0.5 * 0.25)
        np.testing.assert_allclose(solid.centre, [0, 0, 0.5], atol=1e-12)
        x, y, z = 0.5, 0.25, 1.0
        expected = solid.volume / 12 * np.diag([y**2 + z**2, x**2 + z**2, x**2 + y**2])
        np.testing.assert_allclose(solid.inertia, expected, atol=1e-12)

    def test_voxels_and_their_surface_agree(self, tmp_path):
        """The same solid as boxes and as triangles, in any direction."""
        rng = np.random.default_rng(1)
        occupancy = rng.random((5, 5, 5)) < 0.5
        mesh.write_occupancy(tmp_path / "grid.npz", occupancy)
        corners = np.argwhere(occupancy)
        vertices = (corners[:, None] + CUBE).reshape(-1, 3)
        faces = (8 * np.arange(len(corners))[:, None, None] + FACES).reshape(-1, 3)
        write(tmp_path / "boxes.ply", vertices, faces)  # touching boxes: edges where more than two faces meet
        for up in ("z", "y"):
            boxes, triangles = (statics.load_body(tmp_path / f, up) for f in ("grid.npz", "boxes.ply"))
            assert (boxes.solid.source, triangles.solid.source) == ("voxels", "mesh")
            assert boxes.solid.volume == pytest.approx(triangles.solid.volume)
            np.testing.assert_allclose(boxes.solid.centre, triangles.solid.centre, atol=1e-6)
            np.testing.assert_allclose(boxes.solid.inertia, triangles.solid.inertia, atol=1e-6)
            np.testing.assert_allclose(np.ptp(boxes.hull, axis=0), np.ptp(triangles.hull, axis=0), atol=1e-6)

    def test_agrees_with_trimesh(self, tmp_path):
        import trimesh

        shape = trimesh.creation.torus(1.0, 0.3)
        shape.apply_transform(trimesh.transformations.random_rotation_matrix(np.array([0.1, 0.7, 0.3])))
        body = statics.load_body(write(tmp_path / "torus.ply", shape.vertices, shape.faces), "z")
        shape.apply_scale(1 / shape.extents.max())
        assert body.solid.volume == pytest.approx(shape.volume, rel=1e-5)
        moved = body.solid.centre - [0, 0, shape.center_mass[2] - shape.bounds[0, 2]]
        np.testing.assert_allclose(moved, [*(shape.center_mass[:2] - shape.bounds.mean(0)[:2]), 0], atol=1e-5)
        np.testing.assert_allclose(body.solid.inertia, shape.moment_inertia, atol=1e-6)

    def test_what_is_not_closed_is_its_hull(self, tmp_path):
        opened = score(write(tmp_path / "open.ply", prism(0.3), FACES[:-1]))
        closed = score(write(tmp_path / "closed.ply", prism(0.3)))
        flipped = np.array([FACES[0][::-1], *FACES[1:]])
        mixed = score(write(tmp_path / "mixed.ply", prism(0.3), flipped))
        assert [s.detail["mass_source"] for s in (opened, closed, mixed)] == ["hull", "mesh", "hull"]
        assert opened.detail["mass"] == pytest.approx(closed.detail["mass"]) == pytest.approx(mixed.detail["mass"])

    def test_faces_that_all_look_inwards_are_turned(self, tmp_path):
        inwards = score(write(tmp_path / "in.ply", prism(0.3), FACES[:, ::-1]))
        outwards = score(write(tmp_path / "out.ply", prism(0.3)))
        assert inwards.detail["mass_source"] == outwards.detail["mass_source"] == "mesh"
        assert inwards.detail["mass"] == pytest.approx(outwards.detail["mass"])
        assert inwards.detail["margin"] == pytest.approx(outwards.detail["margin"])

    def test_vertices_that_come_twice_are_one(self, tmp_path):
        soup = prism(0.3)[FACES].reshape(-1, 3)
        found = score(write(tmp_path / "soup.obj", soup, np.arange(len(soup)).reshape(-1, 3)))
        assert found.detail["mass_source"] == "mesh"


def test_up_is_a_rotation(tmp_path):
    """An asymmetric shape given y-up lands on the original, not on its mirror image."""
    shape = grid(tmp_path / "z.npz", (slice(0, 9), slice(0, 2), slice(0, 2)), (slice(0, 2), slice(0, 5), slice(0, 3)))
    occupancy = mesh.read_occupancy(shape)
    y_up = np.flip(occupancy, 1).transpose(0, 2, 1)  # (x, y, z) -> (x, z, -y)
    mesh.write_occupancy(tmp_path / "y.npz", y_up)
    z, y = statics.load_body(shape, "z"), statics.load_body(tmp_path / "y.npz", "y")
    np.testing.assert_allclose(z.solid.centre, y.solid.centre, atol=1e-12)
    np.testing.assert_allclose(z.solid.inertia, y.solid.inertia, atol=1e-12)
    assert np.linalg.det(statics.TURNS["y"]) == 1


def test_position_and_size_do_not_matter(tmp_path):
    moved = score(write(tmp_path / "moved.ply", prism(0.41) * 7 + [30, -4, 11]))
    here = score(write(tmp_path / "here.ply", prism(0.41)))
    assert moved.value == here.value == 0
    for key in ("tilt", "margin", "critical_angle", "mass"):
        assert moved.detail[key] == pytest.approx(here.detail[key], rel=1e-3)


def test_margins_by_hand(tmp_path):
    """A centre over the middle, beyond an edge, beyond a corner; on two feet; a line; a tip."""
    plate, far = (slice(0, 4), slice(0, 4), slice(0, 1)), statics.Solid(1.0, np.array([0.0, 0.0, 0.5]), np.eye(3))
    body = statics.load_body(grid(tmp_path / "plate.npz", plate), "z")
    for centre, margin in (([0, 0], 0.5), ([0.2, 0.1], 0.3), ([0.8, 0.2], -0.3), ([0.8, 0.9], -0.5)):
        found = statics.support(body._replace(solid=far._replace(centre=np.array([*centre, 0.5]))))
        assert found.margin == pytest.approx(margin)
        assert found.angle == pytest.approx(math.degrees(math.atan2(margin, 0.5)))
        assert found.stable == (margin > 0)
    legs = (slice(0, 1), slice(0, 1), slice(0, 3)), (slice(5, 6), slice(0, 1), slice(0, 3))
    table = statics.load_body(grid(tmp_path / "table.npz", *legs, (slice(0, 6), slice(0, 1), slice(3, 4))), "z")
    height = (2 * 3 * 1.5 + 6 * 3.5) / 12  # of the centre of mass: two legs of 3 and a top of 6 voxels
    assert statics.support(table) == pytest.approx((0.5 / 6, math.degrees(math.atan2(0.5, height)), 4))
    on_edge = CUBE @ np.array([[1, 0, 0], [0, 0.5**0.5, 0.5**0.5], [0, -(0.5**0.5), 0.5**0.5]]).T
    found = statics.support(statics.load_body(write(tmp_path / "edge.ply", on_edge), "z"))
    assert found.corners == 2
    assert not found.stable
    assert found.margin == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("vertices", "reason"),
    [
        (CUBE * [1, 1, 0], "points"),
        (CUBE @ np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]]), "plane"),
        (CUBE * [1, 1, 1e-9], "plane"),
    ],
)
def test_shapes_without_a_volume_are_failures(vertices, reason, tmp_path):
    [found] = load_scorer("stability")([Sample("", mesh=write(tmp_path / "flat.obj", vertices))])
    assert isinstance(found, Failure)
    assert found.kind == "input"
    assert "degenerate" in found.reason


def test_one_bad_file_costs_no_other_its_score(tmp_path):
    (tmp_path / "broken.ply").write_text("no mesh")
    mesh.write_occupancy(tmp_path / "empty.npz", np.zeros((4, 4, 4)))
    write(tmp_path / "fine.ply", prism(0.1))
    names = ("broken.ply", "empty.npz", "fine.ply")
    record = Record(id="a", prompt="a prism", candidates=[Candidate(sample=name) for name in names])
    [scored] = score_records([record], tmp_path, {"stands": load_scorer("stability")}, batch=8)
    broken, empty, fine = scored.candidates
    assert "not a mesh" in broken.errors["stands"]
    assert "the grid is empty" in empty.errors["stands"]
    assert fine.labels == {"stands": 1.0}
    assert scored.meta["scores"]["stands"][2]["status"] == "settled"


def test_workers_give_the_same_scores(tmp_path):
    samples = [Sample("", mesh=write(tmp_path / f"{s}.ply", prism(s))) for s in (0.1, 0.45, 0.8)]
    (tmp_path / "broken.ply").write_text("no mesh")
    samples.append(Sample("", mesh=tmp_path / "broken.ply"))
    pooled = load_scorer("stability", reward="graded", workers=1)
    assert list(pooled(samples)) == list(load_scorer("stability", reward="graded")(samples))
    assert list(pooled(samples[::-1])) == list(pooled(samples))[::-1], "the pool is kept"


def test_a_shape_that_comes_twice_is_judged_once(tmp_path, monkeypatch):
    from diffalign.scorers import _simulation

    seen = []
    simulate = _simulation.simulate
    monkeypatch.setattr(_simulation, "simulate", lambda *args: seen.append(args) or simulate(*args))
    samples = [Sample("", mesh=write(tmp_path / f"{n}.ply", prism(s))) for n, s in enumerate((0.1, 0.5, 0.1))]
    first, other, again = load_scorer("stability")(samples)
    assert first == again != other
    assert len(seen) == 2


def test_a_simulation_without_numbers_is_a_failure(tmp_path, monkeypatch):
    from diffalign.scorers import _simulation

    def diverge(*_):
        raise _simulation.Diverged("diverged")

    monkeypatch.setattr(_simulation, "simulate", diverge)
    [found] = load_scorer("stability")([Sample("", mesh=write(tmp_path / "a.ply", prism(0.1)))])
    assert isinstance(found, Failure)
    assert found.kind == "not-finite"


def test_without_mujoco_the_margin_is_left(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ply", prism(0.3))
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert score(path, reward="margin").value == pytest.approx(0.05)
    with pytest.raises(UserError, match=r"diffalign\[sim\]"):
        score(path)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"reward": "gradual"}, "choose binary, graded, margin"),
        ({"up": "x"}, "choose y, z"),
        ({"threshold": 0}, "threshold 0"),
        ({"timestep": 0.1}, "timestep 0.1"),
        ({"duration": 0.0001}, "duration 0.0001"),
        ({"perturbation": -1}, "perturbation -1"),
        ({"workers": -1}, "workers -1"),
    ],
)
def test_refusals(params, message):
    with pytest.raises(UserError, match=message):
        load_scorer("stability", **params)
