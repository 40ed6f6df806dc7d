"""Whether a 3D shape stands on the ground: let go in MuJoCo, also a little tilted, or its static margin (DSO)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

from diffalign.errors import UserError
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

from . import _simulation as simulation
from ._stability import Body, Support, Up, load_body, support

Reward = Literal["binary", "graded", "margin"]


def build(
    reward: Reward = "binary",
    *,
    up: Up = "z",
    threshold: float = 20.0,
    timestep: float = 0.002,
    duration: float = 10.0,
    perturbation: float = 0.1,
    workers: int = 0,
) -> Scorer:
    """Score meshes (``.ply``, ``.obj``) and occupancy grids (``.npz``) of uniform density, each scaled to 1 m.

    Other than in the release of DSO (arXiv:2503.22677), a shape is turned and never mirrored, weighs what it encloses
    and not what MuJoCo takes its hull for, is let go tilted as well, so that balancing on a tip is no success, and its
    tilt is judged, which spinning in place does not change. ``perturbation: 0`` starts it as it stands alone.

    A shape without a volume is a failure with its reason, not a low score. ``detail`` says how it fell: ``tilt``
    (the worst, degrees), ``rotation`` (of the start as it stands, degrees in [0, 180]), ``drop`` and ``drift`` of the
    centre of mass and ``speed`` at the end (of the worst; m, m/s), ``status`` (``settled`` or still ``moving``), and
    for all rewards ``margin`` (m), ``critical_angle`` (degrees), ``corners`` of the support and ``mass`` (kg).
    ``mass_source`` is ``voxels``, ``mesh``, or ``hull`` for a mesh that is not closed.

    Args:
        reward: ``binary`` is 1 if the worst tilt is below the threshold; ``graded`` falls from 1 to 0 at 90 degrees;
            ``margin`` is how far inside its support the centre of mass is (m), from geometry alone, without MuJoCo.
        up: the axis of the shapes that points up.
        threshold: degrees.
        timestep: seconds of simulated time; more than 0.01 is too coarse for MuJoCo's contacts.
        duration: seconds of simulated time a start may take.
        perturbation: degrees of the tilts. At 1 degree, rocking topples shapes whose critical angle is 5.7.
        workers: processes; 0 is this one.
    """
    if not 0 < threshold <= 180:
        raise UserError(f"threshold {threshold}: must be above 0 and up to 180 degrees")
    if not (0 < timestep <= 0.01 and timestep <= duration <= 3600):
        raise UserError(f"timestep {timestep} must be in (0, 0.01], duration {duration} between it and 3600 seconds")
    if not 0 <= perturbation < 10:
        raise UserError(f"perturbation {perturbation}: must be in [0, 10) degrees")
    if workers < 0:
        raise UserError(f"workers {workers}: must not be negative")
    settings = None if reward == "margin" else simulation.Settings(timestep, duration, perturbation)
    return _Stability(reward, threshold, partial(_judge, up=up, settings=settings), _Pool(workers))


class _Verdict(NamedTuple):
    body: Body
    support: Support
    falls: Sequence[simulation.Fall]


def _judge(path: Path, *, up: Up, settings: simulation.Settings | None) -> _Verdict | Failure:
    """Everything about one file; runs in the workers."""
    try:
        body = load_body(path, up)
    except UserError as error:
        return Failure("input", str(error))
    try:
        falls = [] if settings is None else simulation.simulate(body, settings)
    except simulation.Diverged as error:
        return Failure("not-finite", f"{path}: {error}")
    return _Verdict(body, support(body), falls)


class _Pool:
    """Processes that are started by the first call and kept for the next; a crashed worker costs its batch only."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._processes: ProcessPoolExecutor | None = None

    def map(self, work: Any, items: Sequence[Path]) -> list[Any]:
        if not self.workers:
            return [work(item) for item in items]
        if self._processes is None:  # spawned: a fork of a process with threads may hang
            self._processes = ProcessPoolExecutor(self.workers, get_context("spawn"))
        try:
            return list(self._processes.map(work, items))
        except BrokenProcessPool:
            self._processes = None
            raise


@dataclass(frozen=True, slots=True)
class _Stability:
    reward: Reward
    threshold: float
    judge: Any
    pool: _Pool
    accepts: frozenset[str] = field(default=frozenset({"mesh"}))

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        paths = [sample.mesh for sample in samples if sample.mesh is not None]
        contents = [(path.suffix.lower(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
        different = dict(zip(contents, paths, strict=True))  # a shape that comes twice is judged once
        verdicts = dict(zip(different, self.pool.map(self.judge, list(different.values())), strict=True))
        return [self._outcome(verdicts[content]) for content in contents]

    def _outcome(self, verdict: _Verdict | Failure) -> Outcome:
        if isinstance(verdict, Failure):
            return verdict
        stands, solid = verdict.support, verdict.body.solid
        detail: dict[str, Any] = {
            "margin": stands.margin,
            "critical_angle": stands.angle,
            "corners": stands.corners,
            "mass": solid.volume * simulation.DENSITY,
            "mass_source": solid.source,
        }
        if not verdict.falls:
            return Score(stands.margin, detail=detail)
        worst = max(verdict.falls, key=lambda fall: fall.tilt)
        status = "settled" if max(fall.speed for fall in verdict.falls) < simulation.REST else "moving"
        motion = {"drop": worst.drop, "drift": worst.drift, "speed": worst.speed, "status": status}
        detail = {"tilt": worst.tilt, "rotation": verdict.falls[0].rotation, **motion, **detail}
        if self.reward == "binary":
            return Score(float(worst.tilt < self.threshold), detail=detail)
        return Score(1 - min(worst.tilt, 90.0) / 90, detail=detail)
