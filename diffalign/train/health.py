"""Is a run still learning what it should? Named alarms from its metrics, before the samples show it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Any

from diffalign.errors import UserError

WINDOW = 50  # steps that an alarm looks back over
ENOUGH = 20  # steps before the first alarm
SPIKE = 10.0  # times the median gradient norm
RISEN = 0.05  # of the reference's error
SATURATED = 8.0  # nats of margin: the sigmoid's gradient is 3e-4 there


class Diverged(UserError):
    """The loss or its gradient is not finite: the weights are no longer of use."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


def check(step: int, metrics: Mapping[str, float]) -> None:
    """Stop a run whose step ``step``, counted from 1, cannot be applied.

    Raises:
        Diverged: a loss or gradient that is not finite.
    """
    if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
        raise Diverged(step, f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; lower optim.lr")


def check_moves(step: int, metrics: Mapping[str, float]) -> None:
    """Stop a run one of whose first steps has data that prefer something, and moves nothing.

    Raises:
        UserError: no gradient reached what trains.
    """
    if metrics["grad_live"] == 0.0:
        raise UserError(
            f"step {step}: no trainable parameter received a gradient; check model.lora.targets and the rewards"
        )


class Health:
    """Watches the last steps; an alarm sounds once, when it begins.

    ``winner-error``: the error of winners is above the reference's by more than a twentieth of it, so that the policy
    gets worse at what it should prefer. ``margin-saturated``: implicit margins are so large that pairs no longer teach.
    ``gradient-spike``: the gradient is ten times its usual size.

    Args:
        past: metrics of the steps before, of a run that continues.
    """

    def __init__(self, past: Iterable[Mapping[str, Any]] = ()) -> None:
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=WINDOW)
        self._sounding: set[str] = set()
        for metrics in past:
            self.watch(metrics)

    def watch(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Take one step's metrics; the alarms that begin with it, by name, and what they say."""
        usual = median(row["grad_norm"] for row in self._recent) if self._recent else math.inf
        self._recent.append(metrics)
        found: dict[str, str] = {}
        if len(self._recent) > ENOUGH:
            found = dict(self._alarms(metrics, usual))
        new = {name: text for name, text in found.items() if name not in self._sounding}
        self._sounding = set(found)
        return new

    def _alarms(self, metrics: Mapping[str, Any], usual: float) -> Iterable[tuple[str, str]]:
        if metrics["grad_norm"] > SPIKE * usual > 0:
            yield "gradient-spike", f"gradient norm {metrics['grad_norm']:.3g}, usually {usual:.3g}"
        drift, reference, margin = (self._mean(n) for n in ("drift/chosen", "err/reference", "reward/margin"))
        if drift is not None and reference is not None and drift > RISEN * abs(reference):
            share = 100 * drift / abs(reference) if reference else math.inf
            yield (
                "winner-error",
                f"winners' error is {share:.0f} % above the reference's: raise beta, or add an extra `sft` or a "
                "`winner_guard` shaping",
            )
        if margin is not None and margin > SATURATED:
            yield "margin-saturated", f"mean margin {margin:.1f}: pairs no longer teach; lower beta or stop"

    def _mean(self, name: str) -> float | None:
        values = [row[name] for row in self._recent if name in row]
        return fmean(values) if len(values) > ENOUGH else None
