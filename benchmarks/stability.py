"""The stability scorer against the static oracle on random shapes and against analytic falls, and its speed.

    python benchmarks/stability.py                # one process, one thread; a minute

The shapes are drawn from one seed and none is left out: not those whose centre of mass is just inside the support,
which a tilt of 0.1 degrees may topple (rocking lifts the centre of mass by up to that times the width, and tipping over
takes margin^2 / 2h) and with less than 0.003 soft contacts alone, nor those that a low arm catches before they have
fallen by the threshold.
"""

from __future__ import annotations

import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from _results import machine, write_section

from diffalign.mesh import triangulate, write_mesh, write_occupancy
from diffalign.scoring import Sample, Score, load_scorer

SIDE, SEED, PER_KIND = 32, 2026, 75
SHEARS = (0.41, 0.5, 0.6, 0.75, 1.0, 1.5)
WIDTH = 0.4
CLEAR = 0.018  # of the longest side


def gallows(rng: np.random.Generator) -> np.ndarray:
    """A post with an arm on one side of its top (an L upside down)."""
    (width, depth), height = rng.integers(2, 7, 2), rng.integers(6, 20)
    thick, reach = rng.integers(1, 5), rng.integers(1, 14)
    grid = np.zeros((SIDE, SIDE, SIDE), bool)
    grid[8 : 8 + width, 8 : 8 + depth, :height] = True
    grid[8 : 8 + width + reach, 8 : 8 + depth, height - thick : height] = True
    return grid


def tee(rng: np.random.Generator) -> np.ndarray:
    """A post with a bar anywhere on its top (a T)."""
    (width, depth), height = rng.integers(2, 7, 2), rng.integers(5, 18)
    long, wide, thick = rng.integers(4, 16), rng.integers(2, 9), rng.integers(1, 5)
    grid = np.zeros((SIDE, SIDE, SIDE), bool)
    grid[14 : 14 + width, 14 : 14 + depth, :height] = True
    x, y = 14 + width - 1 - rng.integers(0, long), 14 + depth - 1 - rng.integers(0, wide)
    grid[max(x, 0) : x + long, max(y, 0) : y + wide, height : height + thick] = True
    return grid


def stack(rng: np.random.Generator) -> np.ndarray:
    """Two to five blocks on each other, each overlapping the one below."""
    grid = np.zeros((SIDE, SIDE, SIDE), bool)
    corner, size, bottom = np.array([14, 14]), rng.integers(3, 9, 2), 0
    for _ in range(rng.integers(2, 6)):
        height = rng.integers(3, 7)
        grid[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1], bottom : bottom + height] = True
        bottom, above = bottom + height, rng.integers(3, 9, 2)
        corner = np.clip(corner + rng.integers(-above + 1, size), 0, SIDE - above)
        size = above
    return grid


def leaning(rng: np.random.Generator) -> np.ndarray:
    """A tower whose floors move aside with height, from the fourth voxel on."""
    (width, depth), height = rng.integers(3, 9, 2), rng.integers(6, 24)
    lean = rng.uniform(0, 0.8, 2)
    grid = np.zeros((SIDE, SIDE, SIDE), bool)
    for z in range(height):
        x, y = np.floor(4 + lean * max(z - 3, 0)).astype(int)
        grid[x : x + width, y : y + depth, z] = True
    return grid


KINDS = {"gallows": gallows, "T": tee, "stack": stack, "leaning tower": leaning}


def prism(shear: float) -> tuple[np.ndarray, np.ndarray]:
    """A square prism of height 1, its floors moved by ``shear`` times their height."""
    corners = np.array([[x, y, z] for x in (0, WIDTH) for y in (0, WIDTH) for z in (0, 1)], float)
    corners[:, 0] += shear * corners[:, 2]
    faces = [
        [0, 1, 3],
        [0, 3, 2],
        [4, 7, 5],
        [4, 6, 7],
        [0, 5, 1],
        [0, 4, 5],
        [2, 3, 7],
        [2, 7, 6],
        [0, 2, 6],
        [0, 6, 4],
        [1, 5, 7],
        [1, 7, 3],
    ]
    return corners, np.array(faces)


def scored(paths: list[Path], **params: object) -> list[Score]:
    outcomes = [load_scorer("stability", **params)([Sample("", mesh=path)])[0] for path in paths]
    wrong = [outcome for outcome in outcomes if not isinstance(outcome, Score)]
    assert not wrong, wrong
    return [outcome for outcome in outcomes if isinstance(outcome, Score)]


def agreement(paths: dict[str, list[Path]]) -> list[str]:
    lines = ["| shapes | n | stable by the oracle | same verdict | same, not tilted |", "|---|---:|---:|---:|---:|"]
    odd, clear = [], []
    totals = np.zeros(4, int)
    for kind, group in paths.items():
        tilted, upright = scored(group), scored(group, perturbation=0.0)
        oracle = [s.detail["corners"] > 2 and s.detail["margin"] > 0 for s in tilted]
        same, still = ([bool(s.value) == o for s, o in zip(found, oracle, strict=True)] for found in (tilted, upright))
        counts = len(group), sum(oracle), sum(same), sum(still)
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
        totals += counts
        odd += [(path.stem, s.detail) for path, s, fine in zip(group, tilted, same, strict=True) if not fine]
        clear += [fine for s, fine in zip(tilted, same, strict=True) if abs(s.detail["margin"]) >= CLEAR]
    n = totals[0]
    lines += [
        "",
        f"Same verdict: {totals[2]} of {n} ({totals[2] / n:.1%}), not tilted {totals[3]} ({totals[3] / n:.1%});",
    ]
    lines += [f"of the {len(clear)} with a margin of {CLEAR} or more, inside or outside, {sum(clear)}. The others:", ""]
    for name, detail in odd:
        margin, angle, tilt = (detail[key] for key in ("margin", "critical_angle", "tilt"))
        lines.append(f"- {name}: margin {margin:.4f}, critical angle {angle:.2f}, worst tilt {tilt:.2f}")
    return lines


def prisms(folder: Path) -> list[str]:
    lines = ["| shear | rests at | 90 - atan(shear) | difference |", "|---:|---:|---:|---:|"]
    for shear in SHEARS:
        path = folder / f"prism-{shear}.ply"
        write_mesh(path, *prism(shear))
        [score] = scored([path])
        exact = 90 - math.degrees(math.atan(shear))
        tilt = score.detail["tilt"]
        lines.append(f"| {shear} | {tilt:.3f} | {exact:.3f} | {tilt - exact:+.3f} |")
    return lines


def speed(paths: dict[str, list[Path]]) -> list[str]:
    """One process; the time of the processor tells more than the clock where others run."""
    lines = ["| input | timestep | shapes/s of processor time | shapes/s by the clock |", "|---|---:|---:|---:|"]
    for kind, group in paths.items():
        for timestep in (0.001, 0.002, 0.005):
            scorer = load_scorer("stability", timestep=timestep)
            samples = [Sample("", mesh=path) for path in group]
            scorer(samples[:1])
            clock, processor = time.perf_counter(), time.process_time()
            scorer(samples)
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            lines.append(f"| {kind} | {timestep} | {len(group) / processor:.1f} | {len(group) / clock:.1f} |")
    return lines


def main() -> None:
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grids: dict[str, list[Path]] = {kind: [] for kind in KINDS}
        meshes: list[Path] = []
        faces = 0
        for kind, draw in KINDS.items():
            for index in range(PER_KIND):
                grid = draw(rng)
                grids[kind].append(folder / f"{kind} {index}.npz")
                write_occupancy(grids[kind][-1], grid)
                if index < 15:
                    surface = triangulate(grid)
                    faces += len(surface[1])
                    meshes.append(folder / f"{kind}-{index}.ply")
                    write_mesh(meshes[-1], *surface)
        everything = [path for group in grids.values() for path in group]
        surfaces = f"{len(meshes)} marching-cubes meshes, {faces // len(meshes)} faces on average"
        timed = {f"{len(everything)} grids {SIDE}^3": everything, surfaces: meshes}
        libraries = ", ".join(f"{name} {version(name)}" for name in ("mujoco", "trimesh"))
        parts = [
            f"`python benchmarks/stability.py`, {machine()}, {libraries}.",
            *("", f"Random shapes, seed {SEED}, default settings, against the static oracle:", ""),
            *agreement(grids),
            *("", f"Prisms of height 1 and width {WIDTH}, which come to rest on their side:", ""),
            *prisms(folder),
            *("", "Speed, nine starts of up to 10 s each, one process, one thread:", ""),
            *speed(timed),
        ]
    body = "\n".join(parts)
    print(body)
    write_section("3D stability", body)


if __name__ == "__main__":
    main()
