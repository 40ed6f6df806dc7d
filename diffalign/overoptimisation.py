"""When a run starts to please its reward alone: trained and held-out rewards over training, and a rule to stop.

A reward that is optimised far enough stops to measure what it stands for (arXiv:2210.10760): it keeps rising while
rewards that were not trained on fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev

from diffalign.comparison import Outcomes, common, compare
from diffalign.results import Measured, Point, Trajectory

FILE = "trajectory.json"
NOT_A_REWARD = ("diversity", "picture")
"""Labels that begin so describe samples; more of them is not better."""


def follow(name: str, measured: Mapping[int, Mapping[str, Outcomes]], trained: str, note: str = "") -> Trajectory:
    """The curves of a run.

    Args:
        measured: step -> label -> outcomes, on the same prompts and noise at every step, step 0 first.
        trained: label of the reward that was trained on.
    """
    steps = list(measured)
    labels = list(measured[steps[0]])
    held_out = [label for label in labels if label != trained and not label.startswith(NOT_A_REWARD)]
    start = measured[steps[0]]
    points = [
        Point(step=step, values={label: _paired(found[label], start[label]) for label in labels})
        for step, found in measured.items()
    ]
    scores = {step: held_out_score({label: measured[step][label] for label in held_out}, start) for step in steps}
    best, stop = stop_rule({step: measured[step][trained] for step in steps}, scores)
    return Trajectory(name=name, trained=trained, held_out=held_out, points=points, best=best, stop=stop, note=note)


def held_out_score(found: Mapping[str, Outcomes], start: Mapping[str, Outcomes]) -> Outcomes:
    """One number per sample: the mean over labels of the gain on the start's mean, in the start's deviations."""
    scaled = []
    for label, one in found.items():
        values = [v for prompts in start[label].values() for row in prompts.values() for v in row if math.isfinite(v)]
        centre, scale = fmean(values), pstdev(values) or 1.0
        scaled.append(
            {
                task: {prompt: [(v - centre) / scale for v in row] for prompt, row in prompts.items()}
                for task, prompts in one.items()
            }
        )
    if not scaled:
        return {}
    return {
        task: {
            prompt: [fmean(row) for row in zip(*(one[task][prompt] for one in scaled), strict=True)]
            for prompt in prompts
        }
        for task, prompts in scaled[0].items()
    }


def stop_rule(trained: Mapping[int, Outcomes], held_out: Mapping[int, Outcomes]) -> tuple[int, int | None]:
    """The step to keep, and the first at which the trained reward is higher than there and held-out ones lower.

    Lower means that the paired 95 % interval of the difference excludes 0. The step to keep is the best one so far by
    the held-out score; without held-out rewards the last.
    """
    steps = list(trained)
    if not held_out[steps[0]]:
        return steps[-1], None
    return onset(
        steps,
        lambda step, best: _paired(held_out[step], held_out[best]),
        lambda step, best: _paired(trained[step], trained[best]),
    )


def onset(
    steps: Sequence[int], held_out: Callable[[int, int], Measured], trained: Callable[[int, int], Measured]
) -> tuple[int, int | None]:
    """The best step so far, and the first at which the trained reward is higher than there and the held-out lower.

    Args:
        steps: in order, the start first.
        held_out: (step, best so far) -> the paired difference of the held-out score; lower means that its interval
            excludes 0.
        trained: the same of the trained reward.
    """
    best = steps[0]
    for step in steps[1:]:
        change = held_out(step, best)
        assert change.difference is not None
        assert change.difference_interval is not None
        if change.difference > 0:
            best = step
            continue
        gain = trained(step, best).difference
        if change.difference_interval[1] < 0 and gain is not None and gain > 0:
            return best, step
    return best, None


def verdict(trajectory: Trajectory) -> str:
    """One sentence."""
    if not trajectory.held_out:
        return f"{trajectory.name}: no held-out reward in the panel, so over-optimisation cannot be seen"
    held_out = ", ".join(trajectory.held_out)
    if trajectory.stop is None:
        return (
            f"{trajectory.name}: no over-optimisation seen: held-out rewards ({held_out}) are best at step "
            f"{trajectory.best} and have not significantly fallen since while {trajectory.trained} rose"
        )
    return (
        f"{trajectory.name}: stop at step {trajectory.best}: by step {trajectory.stop} {trajectory.trained} has risen "
        f"further while held-out rewards ({held_out}) have significantly fallen"
    )


def _paired(one: Outcomes, other: Outcomes) -> Measured:
    found, _ = common(one, other)
    return compare(*found)["overall"]
