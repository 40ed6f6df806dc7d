"""`diffalign train`: which loop a config asks for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from diffalign.config import TrainConfig
from diffalign.errors import UserError
from diffalign.train.tally import Cost


def run(config: TrainConfig, dry_run: bool = False) -> Path:
    """Train and write the final weights; returns the run directory.

    Raises:
        UserError: the config does not say what to train on, or asks for what does not go together.
    """
    return _loop(config).run(config, dry_run)


def cost(config: TrainConfig) -> Cost:
    """What the smallest whole of a run takes, measured by training on it; weights are not kept.

    Raises:
        UserError: as :func:`run`.
    """
    return _loop(config).cost(config)


def _loop(config: TrainConfig) -> Any:
    """The module of the loop; the other one is not imported."""
    if config.online is None and config.data is None:
        raise UserError("train: give `data` to train on records, or `online` to train on samples of the policy")
    return importlib.import_module(f"diffalign.train.{'offline' if config.online is None else 'online'}")
