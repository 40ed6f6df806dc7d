"""`diffalign train`: which loop a config asks for."""

from __future__ import annotations

from pathlib import Path

from diffalign.config import TrainConfig
from diffalign.errors import UserError


def run(config: TrainConfig, dry_run: bool = False) -> Path:
    """Train and write the final weights; returns the run directory."""
    if config.online is not None:
        from diffalign.train import online

        return online.run(config, dry_run)
    if config.data is None:
        raise UserError("train: give `data` to train on records, or `online` to train on samples of the policy")
    from diffalign.train import offline

    return offline.run(config, dry_run)
