"""A model in memory on held-out prompts: samples from fixed noise, scored, without a file in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffalign.comparison import Outcomes
from diffalign.generate import candidate_seed, chunks, sample_media
from diffalign.records import Record
from diffalign.scoring import Score, Scorer, score_batch
from diffalign.train.feedback import as_samples, requests
from diffalign.types import Sampling


class Judged(NamedTuple):
    """What was sampled, and what scorers say of it."""

    samples: Tensor
    """(N, ...) decoded."""
    outcomes: dict[str, Outcomes]
    """By label."""


def judge(
    family: Any,
    prompts: Sequence[Record],
    sampling: Sampling,
    batch: int,
    seed: int,
    scorers: Mapping[str, Scorer],
    root: Path,
) -> Judged:
    """One sample per record from noise that ``seed`` and the record's id decide; failures are NaN.

    Args:
        family: its network as it is to be judged.
        root: folder of the prompts' files.
    """
    found: dict[str, Any] = {label: defaultdict(lambda: defaultdict(list)) for label in scorers}
    made = []
    with torch.no_grad():
        for group in chunks(prompts, batch):
            asked = requests(family, group, root, (candidate_seed(seed, record.id, 0) for record in group))
            made.append(sample_media(family, asked, sampling).cpu())
            with as_samples(family, group, made[-1], root) as samples:
                for label, scorer in scorers.items():
                    outcomes = score_batch(label, scorer, samples, [record.id for record in group])
                    for record, outcome in zip(group, outcomes, strict=True):
                        value = outcome.value if isinstance(outcome, Score) else float("nan")
                        found[label][str(record.meta.get("tag", "all"))][str(record.prompt)].append(value)
    return Judged(torch.cat(made), {label: plain(one) for label, one in found.items()})


def plain(found: Outcomes) -> dict[str, dict[str, list[float]]]:
    """Outcomes of plain dictionaries."""
    return {task: {prompt: list(row) for prompt, row in prompts.items()} for task, prompts in found.items()}


def weighted(outcomes: Mapping[str, Outcomes], weights: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    """The weighted sum of some labels."""
    first = outcomes[next(iter(weights))]
    return {
        task: {
            prompt: [
                sum(weight * outcomes[label][task][prompt][n] for label, weight in weights.items())
                for n in range(len(row))
            ]
            for prompt, row in prompts.items()
        }
        for task, prompts in first.items()
    }
