"""Held-out rewards during an online run, and when to stop: they fall while the trained reward rises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

FILE, BEST = "held_out.jsonl", "best.safetensors"


class Watch:
    """Measures the trained and the held-out rewards on held-out prompts, from the same noise every time.

    Args:
        stop: what to measure, and how often.
        settings: the trained rewards and their weights.
    """

    def __init__(self, core: Core, stop: cfg.StopConfig, settings: cfg.OnlineConfig) -> None:
        self._core = core
        self._every = stop.every
        self._prompts = read_prompts(stop.prompts, stop.seed)
        self._root = Path(stop.prompts.source).parent
        self._sampling = stop.sampling or settings.sampling
        self._seed = stop.seed
        trained = score.by_label(settings.scorers)
        held_out = score.by_label(stop.scorers)
        if trained.keys() & held_out.keys():
            label = sorted(trained.keys() & held_out.keys())[0]
            raise UserError(f"online.stop: {label!r} is trained on; a held-out reward needs a label of its own")
        self._trained: dict[str, Scorer] = score.load_scorers(trained)
        self._held_out: dict[str, Scorer] = score.load_scorers(held_out)
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

    def _write(self) -> None:
        with replacing(self._core.run.folder / FILE) as handle:
            for step, outcomes in self._lines.items():
                handle.write(json.dumps({"step": step, "outcomes": outcomes}).encode() + b"\n")

    def says_stop(self, step: int) -> bool:
        """Measure after ``step`` updates; the weights to export are the best so far.

        Returns:
            Whether held-out rewards have fallen since the best measurement while the trained one rose: the weights
            are then those of that measurement again.
        """
        self._lines[step] = self._measure()
        trained = {at: self._lines[at]["trained"] for at in self._lines}
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
                state = {name: whole(value).contiguous() for name, value in core.weights.state_dict().items()}
                with replacing(core.run.folder / BEST) as handle:
                    handle.write(save(state))
        if stop is None:
            return False
        core.run.accelerator.wait_for_everyone()
        core.weights.load_state_dict(load_file(core.run.folder / BEST, device=str(core.run.device)))
        if core.run.is_main:
            print(f"stop: held-out rewards were best after {best} updates, and have fallen while the trained one rose")
        return True

    def _measure(self) -> dict[str, Any]:
        """Label -> outcomes; the trained rewards together are ``trained``."""
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
        return {**found, "trained": weighted(found, self._weights)}


@contextmanager
def uncounted(core: Core) -> Iterator[None]:
    """What it costs to look is not what it costs to train."""
    count = core.tally.count if core.tally else 0
    yield
    if core.tally:
        core.tally.count = count
