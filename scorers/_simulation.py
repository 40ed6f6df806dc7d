"""A body let go on an infinite plane, in MuJoCo."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import numpy as np

from diffalign.errors import UserError

from ._stability import DENSITY, Body

DIRECTIONS = 8
REST = 1e-3
"""Speed (m/s, rad/s) below which all velocities are those of a body at rest ..."""
REST_TIME = 0.25
"""... if they stay there for so many seconds."""
LOOKS = 10
"""How often within that time the speed is looked at."""


class Settings(NamedTuple):
    """How a body is simulated: seconds, and degrees of the first tilts (0: from its pose alone)."""

    timestep: float
    duration: float
    perturbation: float


class Fall(NamedTuple):
    """Where one start ended: degrees, metres (of a body whose longest side is 1) and m/s or rad/s."""

    rotation: float
    """From the upright pose, whatever the axis, in [0, 180]."""
    tilt: float
    """Between the body's axis and the vertical."""
    drop: float
    drift: float
    speed: float


class Diverged(Exception):
    """The simulation lost its numbers."""


def simulate(body: Body, settings: Settings) -> list[Fall]:
    """The body let go as it stands, and tilted a little in each of eight directions.

    A start ends when the body is at rest or its time is over. Without tilts it always takes the full time: a body in an
    unstable balance is at rest too. The number of steps, never a clock, bounds the work.

    Raises:
        UserError: MuJoCo is not installed.
        Diverged: no number came out.
    """
    model, data, mujoco = _model(body, settings.timestep)
    starts = [np.array([1.0, 0.0, 0.0, 0.0])]
    if settings.perturbation:
        half = math.radians(settings.perturbation) / 2
        turns = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
        starts += [np.array([np.cos(half), *(np.sin(half) * np.array([np.cos(a), np.sin(a), 0.0]))]) for a in turns]
    return [_fall(body, settings, quaternion, model, data, mujoco) for quaternion in starts]


def _fall(body: Body, settings: Settings, quaternion: np.ndarray, model: Any, data: Any, mujoco: Any) -> Fall:
    mujoco.mj_resetData(model, data)
    centre = body.solid.centre
    turned = body.hull @ _matrix(quaternion, mujoco).T
    data.qpos[:] = [0.0, 0.0, -turned[:, 2].min(), *quaternion]  # the lowest point touches the plane
    mujoco.mj_forward(model, data)
    start = data.xipos[1].copy()
    look = max(1, round(REST_TIME / LOOKS / settings.timestep))
    left, still, speed = round(settings.duration / settings.timestep), 0, math.inf
    while left > 0 and not (settings.perturbation and still >= LOOKS):
        mujoco.mj_step(model, data, nstep=min(look, left))
        left -= look
        speed = float(np.abs(data.qvel).max())
        still = still + 1 if speed < REST else 0
    mujoco.mj_forward(model, data)
    if not np.isfinite(data.qpos).all() or any(data.warning[w].number for w in _numbers(mujoco)):
        raise Diverged(f"the simulation of a body with centre of mass {centre.round(3).tolist()} diverged")
    matrix, moved = _matrix(data.qpos[3:], mujoco), start - data.xipos[1]
    tilt = math.degrees(math.atan2(math.hypot(matrix[0, 2], matrix[1, 2]), matrix[2, 2]))  # arccos(R_zz), exact at 0
    rotation = math.degrees(2 * math.atan2(float(np.linalg.norm(data.qpos[4:])), abs(data.qpos[3])))
    return Fall(rotation, tilt, float(moved[2]), float(np.linalg.norm(moved[:2])), speed)


def _matrix(quaternion: np.ndarray, mujoco: Any) -> np.ndarray:
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def _numbers(mujoco: Any) -> tuple[Any, ...]:
    warnings = mujoco.mjtWarning
    return warnings.mjWARN_BADQPOS, warnings.mjWARN_BADQVEL, warnings.mjWARN_BADQACC


def _model(body: Body, timestep: float) -> tuple[Any, Any, Any]:
    """A plane and a free body: a plane touches a body where it touches the hull, so the hull collides.

    Mass and inertia are given, since those that MuJoCo would compute from the hull are not the body's.
    """
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except ImportError:
        raise UserError("this reward needs mujoco: pip install 'diffalign[sim]', or take reward 'margin'") from None
    if mujoco.get_mju_user_warning() is None:  # its own handler writes a file into the current folder
        mujoco.set_mju_user_warning(lambda message: None)
    spec = mujoco.MjSpec()
    spec.option.timestep = timestep
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1])
    spec.add_mesh(name="hull", uservert=body.hull.reshape(-1).tolist(), userface=body.faces.reshape(-1).tolist())
    solid = body.solid
    inertia = solid.inertia * DENSITY
    free = spec.worldbody.add_body(
        explicitinertial=True,
        mass=solid.volume * DENSITY,
        ipos=solid.centre.tolist(),
        fullinertia=[*np.diag(inertia), inertia[0, 1], inertia[0, 2], inertia[1, 2]],
    )
    free.add_freejoint()
    free.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="hull")
    model = spec.compile()
    return model, mujoco.MjData(model), mujoco
