"""Held-out rewards during an online run, and when to stop: they fall while the trained reward rises."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from diffalign import config as cfg
from diffalign import score
from diffalign.comparison import Outcomes
from diffalign.errors import UserError
from diffalign.files import replacing
from diffalign.generate import make_sampling
from diffalign.held_out import judge, weighted
from diffalign.overoptimisation import held_out_score, stop_rule
from diffalign.prompts import read_prompts
from diffalign.scoring import Scorer
from diffalign.sharding import whole
from diffalign.train.core import Core, ends_with
from diffalign.train.feedback import refuse_together
from diffalign.train.run import checkpoints

FILE = "held_out.jsonl"
TOTAL = "trained"
"""In that file, the trained rewards together."""


class Watch:
    """Measures the trained and the held-out rewards on held-out prompts, from the same noise every time.

    Args:
        stop: what to measure, and how often.
        settings: the weights of the trained rewards, and how to sample.
        trained: label -> scorer.
    """

    def __init__(
        self, core: Core, stop: cfg.StopConfig, settings: cfg.OnlineConfig, trained: Mapping[str, Scorer]
    ) -> None:
        self._core = core
        self._every = stop.every
        self._prompts = read_prompts(stop.prompts, stop.seed)
        self._root = Path(stop.prompts.source).parent
        self._sampling = stop.sampling or settings.sampling
        self._seed = stop.seed
        held_out = score.by_label(stop.scorers)
        for label in sorted(held_out.keys() & {TOTAL, *trained}):
            raise UserError(f"online.stop: {label!r} is trained on; a held-out reward needs a label of its own")
        self._trained = dict(trained)
        self._held_out: dict[str, Scorer] = score.load_scorers(held_out)
        refuse_together(self._held_out)
        self._weights = {label: settings.reward.get(label, 0.0 if settings.reward else 1.0) for label in trained}
        self._lines: dict[int, dict[str, Outcomes]] = {}

    def due(self, index: int) -> bool:
        """Whether to measure before this round."""
        return index % self._every == 0

    def restore(self, first: int) -> None:
        """Take up what was measured before update ``first``."""
        path = self._core.run.folder / FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        self._lines = {row["step"]: row["outcomes"] for row in rows if row["step"] < first}
        if self._core.run.is_main:
            self._write()
            for step, kept in self._kept().items():
                if step >= first:
                    kept.unlink()

    def _kept(self) -> dict[int, Path]:
        """Weights that were the best so far, by step, oldest first."""
        return {int(path.stem.removeprefix("best-")): path for path in sorted(self._core.run.folder.glob("best-*"))}

    def _keep(self, step: int) -> None:
        """Keep the weights of now, and let go of those that no checkpoint can lead back to."""
        weights, folder = self._core.weights, self._core.run.folder
        state = {name: whole(value).contiguous() for name, value in weights.state_dict().items()}
        with replacing(folder / f"best-{step:06d}.safetensors") as handle:
            handle.write(save(state))
        oldest = next(iter(checkpoints(folder)), step + 1)
        for path in [path for at, path in self._kept().items() if at < oldest][:-1]:
            path.unlink()

    def _write(self) -> None:
        with replacing(self._core.run.folder / FILE) as handle:
            for step, outcomes in self._lines.items():
                handle.write(json.dumps({"step": step, "outcomes": outcomes}).encode() + b"\n")

    def says_stop(self, step: int) -> bool:
        """Measure after ``step`` updates.

        Returns:
            Whether held-out rewards have fallen since the best measurement while the trained one rose: the weights
            are then those of that measurement again. The main process decides.
        """
        self._lines[step] = self._measure()
        trained = {at: self._lines[at][TOTAL] for at in self._lines}
        start = {label: self._lines[next(iter(self._lines))][label] for label in self._held_out}
        held_out = {
            at: held_out_score({label: found[label] for label in self._held_out}, start)
            for at, found in self._lines.items()
        }
        best, stop = stop_rule(trained, held_out)
        core = self._core
        if core.run.is_main:
            self._write()
            if best == step:
                self._keep(step)
        from accelerate.utils import broadcast

        best, stops = broadcast(torch.tensor([best, stop is not None], device=core.run.device)).tolist()  # type: ignore[union-attr]
        if not stops:
            return False
        core.weights.load_state_dict(load_file(self._kept()[best], device=str(core.run.device)))
        if core.run.is_main:
            print(f"stop: held-out rewards were best after {best} updates, and have fallen while the trained one rose")
        return True

    def _measure(self) -> dict[str, Any]:
        """Label -> outcomes; the trained rewards together are :data:`TOTAL`."""
        core = self._core
        with core.weights.use(ends_with(core)), uncounted(core):
            found = judge(
                core.family,
                self._prompts,
                make_sampling(self._sampling),  # type: ignore[arg-type]
                self._sampling.batch,
                self._seed,
                {**self._trained, **self._held_out},
                self._root,
            ).outcomes
        for label, tasks in found.items():
            values = [value for prompts in tasks.values() for row in prompts.values() for value in row]
            if not any(map(math.isfinite, values)):
                raise UserError(f"online.stop: {label!r} scores none of the {len(values)} held-out samples")
        return {**found, TOTAL: weighted(found, self._weights)}


@contextmanager
def uncounted(core: Core) -> Iterator[None]:
    """What it costs to look is not what it costs to train."""
    count = core.tally.count if core.tally else 0
    yield
    if core.tally:
        core.tally.count = count
