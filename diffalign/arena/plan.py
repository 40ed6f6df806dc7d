"""What a cell of an arena is to do, where its files are, and the configs of the verbs that do it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import config as cfg
from diffalign.config.file import validate


@dataclass(frozen=True)
class Plan:
    """A cell to run: an entry with a seed and a learning rate, trained to a budget."""

    config: cfg.ArenaConfig
    name: str
    seed: int
    lr: float
    budget: int
    prompts: cfg.PromptsConfig
    """What it is judged on."""
    moments: tuple[float, ...]
    folder: Path
    guided: bool
    """Whether it is judged with guidance as well, in the end."""

    @property
    def entry(self) -> cfg.ArenaEntry:
        """What is the entry's own."""
        return self.config.entries[self.name]

    @property
    def result(self) -> Path:
        """The file of its snapshots."""
        return self.folder / "cell.json"

    @property
    def failure(self) -> Path:
        """The file that says why there is no result."""
        return self.folder / "failed.txt"

    @property
    def pool(self) -> Path:
        """The folder of what the offline entries of a seed share."""
        return Path(self.config.dir) / f"pool-{self.seed}-{self.budget}"

    @property
    def records(self) -> Path:
        """What the entry trains on, beside the pool's images."""
        return self.pool / f"{self.name}.jsonl"

    def identity(self) -> dict[str, Any]:
        """What decides the result, beside what all cells share."""
        return self.entry.model_dump(mode="json", exclude={"title", "group", "note"})

    def building(self) -> cfg.BuildConfig:
        """How the entry's records are made of the pool."""
        rules = {"reward": self.config.reward, "page": False, **(self.entry.build or {})}
        files = {"records": str(self.pool / "scored.jsonl"), "out": str(self.pool / f"{self.name}-built.jsonl")}
        return validate(cfg.BuildConfig, {**rules, **files})

    def training(self, steps: int, save_every: int = 0) -> cfg.TrainConfig:
        """The config of the cell's run, as a user could have written it; ``steps`` are rounded up to a round."""
        config, entry = self.config, self.entry
        rounds: dict[str, Any] | None = None
        if entry.online is not None:
            shared = config.rounds.model_dump(exclude_unset=True)
            rounds = {**shared, **entry.online, "scorers": config.scorers, "reward": config.reward}
        return validate(
            cfg.TrainConfig,
            {
                "model": config.model,
                "data": {"records": str(self.records)} if entry.build is not None else None,
                "online": rounds,
                "method": entry.method,
                "optim": {**config.optim, "lr": self.lr},
                "run": {
                    "dir": str(self.folder / "train"),
                    "steps": max(steps, (rounds or {}).get("updates", 1)),
                    "batch": entry.batch,
                    "precision": config.precision,
                    "seed": self.seed,
                    "save_every": save_every,
                    "snapshots": True,
                    "resume": "latest",
                },
            },
        )


def planned(config: cfg.ArenaConfig, name: str, seed: int) -> Plan:
    """A cell to be; its learning rate is that of the middle until tuning has chosen one."""
    moments, prompts = tuple(config.moments), config.evaluate.prompts
    folder = Path(config.dir) / "cells" / f"{name}-{seed}"
    return Plan(config, name, seed, config.entries[name].lr, config.budget, prompts, moments, folder, guided=True)


def trials(config: cfg.ArenaConfig, name: str) -> list[Plan]:
    """The cells that an entry's learning rate is chosen by, one per factor, on training prompts."""
    how, root = config.tuning, Path(config.dir) / "tuning"
    rates = {f"{name}-{factor:g}": config.entries[name].lr * factor for factor in how.factors}
    return [
        Plan(config, name, how.seed, lr, how.budget, how.prompts, (1.0,), root / folder, guided=False)
        for folder, lr in rates.items()
    ]
