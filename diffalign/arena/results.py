"""``results.json`` of an arena: many methods from one base under one budget, and what they say in words. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from diffalign.charts import count
from diffalign.config.arena import BASE, Contrast, Target
from diffalign.errors import UserError
from diffalign.files import write_json
from diffalign.results import Interval, Measured, Verdict, number, parse, shown, verdict

FILE = "results.json"


class _Read(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# --- what is asked ------------------------------------------------------------------------------------------------


class Label(_Read):
    """One score of a sample, for readers."""

    title: str
    about: str = ""


class Trial(_Read):
    """One setting that tuning tried; without a score it failed."""

    learning_rate: float
    score: float | None = None


class Entry(_Read):
    """A method with its settings."""

    name: str
    title: str
    group: str = Field(default="", description="entries of a group share a chart, such as offline and online")
    learning_rate: float | None = None
    tuning: list[Trial] = Field(default_factory=list)
    note: str = ""


# --- what was found -----------------------------------------------------------------------------------------------


class Scored(Measured):
    """The mean over seeds, next to the base's, and every seed's own value."""

    seeds: list[float] = Field(default_factory=list)


class Spread(_Read):
    """A number that a run has one of: mean over seeds, and every seed's own."""

    mean: float
    seeds: list[float]


class Moment(_Read):
    """An entry after so many updates; evaluations and seconds are means over seeds."""

    updates: int
    evaluations: float
    seconds: float
    scores: dict[str, Scored]
    kl: Spread
    diversity: Spread


class Failure(_Read):
    """A run that did not finish."""

    seed: int
    reason: str


class Peak(_Read):
    """Where the held-out score was best, and the first moment of over-optimisation after it, if any."""

    best_updates: int
    best_kl: float
    best_score: float
    updates: int | None = None
    kl: float | None = None
    change: float | None = Field(default=None, description="of the held-out score since its best")
    change_interval: Interval | None = None


class EntryResult(_Read):
    """What became of an entry; without moments every seed failed."""

    entry: Entry
    seeds: list[int] = Field(description="that finished")
    failures: list[Failure] = Field(default_factory=list)
    moments: list[Moment] = Field(default_factory=list)
    peak: Peak | None = None
    to_best: Scored | None = Field(default=None, description="difference of the final score to the leading entry's")

    @property
    def final(self) -> Moment | None:
        """The last moment, unless every seed failed."""
        return self.moments[-1] if self.moments else None


class Answer(_Read):
    """A contrast with its paired difference over the seeds that both finished; None if it cannot be answered."""

    contrast: Contrast
    seeds: list[int] = Field(default_factory=list)
    difference: Scored | None = None
    text: str

    @property
    def verdict(self) -> Verdict:
        """What the interval says of the first."""
        return verdict(self.difference and self.difference.difference_interval)


class Reached(_Read):
    """When an entry's curve first reached the score: network evaluations, None if never."""

    entry: str
    evaluations: float | None = None
    seeds: list[float | None]
    ratio: float | None = Field(default=None, description="evaluations of the reference over those of this entry")
    ratio_interval: tuple[float, float | None] | None = Field(
        default=None, description="95 %; an end of None has no bound"
    )


class Reach(_Read):
    """A target with everyone's way to it."""

    target: Target
    value: float | None = Field(default=None, description="the score to reach; None if the entry that sets it failed")
    rows: list[Reached] = Field(default_factory=list)
    texts: list[str]


class ArenaResults(_Read):
    """Everything that the page of an arena shows."""

    title: str
    main: str = Field(description="label that entries are ranked by")
    trained: str = Field(description="label of the reward that was trained on")
    labels: dict[str, Label]
    n: int = Field(description="held-out samples per snapshot")
    prompts: int
    trained_prompts: int = Field(default=0, description="of these prompts, those that are in training as well")
    trained_samples: int = Field(default=0, description="of these samples, those of such a prompt")
    failed: int = Field(
        default=0, description="samples that the judge could not score for someone; left out of everyone"
    )
    seeds: list[int]
    resamples: int
    base: Moment
    entries: list[EntryResult]
    contrasts: list[Answer] = Field(default_factory=list)
    reaches: list[Reach] = Field(default_factory=list)
    tuning: str = Field(default="", description="what every method was given to find its settings")
    settings: dict[str, Any] = Field(default_factory=dict)
    waiting: list[str] = Field(default_factory=list, description="titles of entries that have not run yet")
    machine: str = Field(default="", description="date, hardware and versions of this summary")
    command: str = Field(default="", description="makes all of this again")

    def ranked(self) -> list[EntryResult]:
        """The best final score first, entries of which every seed failed last."""
        return sorted(self.entries, key=lambda one: -one.final.scores[self.main].policy if one.final else float("inf"))

    def titles(self) -> dict[str, str]:
        """Name -> title, the base included."""
        return titles([one.entry for one in self.entries])


def write(path: Path, results: ArenaResults) -> None:
    """``results.json``, atomically."""
    write_json(path, results.model_dump(mode="json", exclude_none=True))


def read(path: Path) -> ArenaResults:
    """``results.json``.

    Raises:
        UserError: it is absent, or not the results of an arena.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run the arena first")
    return parse(ArenaResults, path.read_bytes(), str(path))


def titles(entries: list[Entry]) -> dict[str, str]:
    """Name -> title, the base included."""
    return {BASE: "the base", **{entry.name: entry.title for entry in entries}}


# --- in words -----------------------------------------------------------------------------------------------------


def headline(results: ArenaResults) -> list[str]:
    """What came out, in sentences that claim no more than the intervals allow."""
    finished = [one for one in results.ranked() if one.final]
    failed = [one.entry.title for one in results.entries if not one.final]
    lost = f"{_listed(failed)} finished no run." if failed else ""
    if not finished:
        return [lost or "No results yet."]
    best = finished[0]
    assert best.final
    score = best.final.scores[results.main]
    label = results.labels[results.main].title
    sentences = [f"{best.entry.title} ends highest: {label} {change(score)}."]
    tied = [
        one.entry.title for one in finished[1:] if one.to_best and verdict(one.to_best.difference_interval) != "worse"
    ]
    if tied:
        sentences.append(f"Not significantly below: {_listed(tied)}.")
    verdicts = [verdict(one.final.scores[results.main].difference_interval) for one in finished if one.final]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    sentences.append(
        f"{better} of {len(finished)} methods end significantly above the base, {worse} significantly below it."
    )
    return [*sentences, lost] if lost else sentences


def change(score: Measured) -> str:
    """``.40 → .51 (+.11, 95 % interval +.08 to +.14)``."""
    gain = shown(score.difference, score.difference_interval, sign=True)
    if gain is None or score.against is None:
        return number(score.policy)
    return f"{number(score.against)} → {number(score.policy)} ({gain.value}, 95 % interval {gain.interval})"


def contrast_text(
    contrast: Contrast, difference: Measured, seeds: int, names: dict[str, str], labels: dict[str, Label]
) -> str:
    """A paired difference as a sentence."""
    first, second = names[contrast.first], names[contrast.second]
    label, other = labels[contrast.label].title, labels[contrast.second_label or contrast.label].title
    if label != other:
        first, second, label = f"{first} ({label})", f"{second} ({other})", "score"
    gain = shown(difference.difference, difference.difference_interval, sign=True)
    assert gain is not None
    assert difference.against is not None
    claim = {
        "better": f"{first} ends above {second}",
        "worse": f"{first} ends below {second}",
    }.get(verdict(difference.difference_interval), f"No significant difference between {first} and {second}")
    over = f"{seeds} seeds" if seeds > 1 else "one seed, so the interval covers prompts alone"
    scores = f"{number(difference.policy)} against {number(difference.against)}"
    sentence = f"{claim}: {label} {scores} ({gain.value}, 95 % interval {gain.interval}; {over})."
    return _capital(sentence)


def reach_text(row: Reached, reference: Reached | None, budget: float, names: dict[str, str]) -> str:
    """When an entry reached the score, next to the reference, as a sentence."""
    name = names[row.entry]
    if row.evaluations is None:
        return _capital(f"{name} does not reach it within {count(budget)} network evaluations.")
    arrival = f"{name} reaches it after {count(row.evaluations)} network evaluations"
    if reference is None or reference.entry == row.entry:
        return _capital(f"{arrival}.")
    other = names[reference.entry]
    if reference.evaluations is None:
        return _capital(f"{arrival}; {other} does not reach it.")
    ratio = f"{other} after {count(reference.evaluations)}"
    if row.ratio is None:
        return _capital(f"{arrival}, {ratio}.")
    return _capital(f"{arrival}, {ratio}: {ratio_text(row)}.")


def ratio_text(row: Reached) -> str:
    """``4.9 times as many (95 % interval 3.1 to 9.0)``."""
    if row.ratio is None:
        return ""
    text = f"{row.ratio:.1f} times as many"
    if row.ratio_interval is None:
        return text
    low, high = row.ratio_interval
    interval = f"{low:.1f} to {high:.1f}" if high is not None else f"{low:.1f} or more"
    unsure = low <= 1 and (high is None or high >= 1)
    return f"{text} (95 % interval {interval}{', so no significant difference' if unsure else ''})"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def markdown(results: ArenaResults) -> str:
    """The final scores as a table, the best first."""
    lines = ["| method | held-out score | gain (95 % interval) | KL to the base |", "|---|---:|---:|---:|"]
    for one in results.ranked():
        if one.final is None:
            lines.append(f"| {one.entry.title} | failed | | |")
            continue
        score = one.final.scores[results.main]
        gain = shown(score.difference, score.difference_interval, sign=True)
        assert gain
        cells = (one.entry.title, number(score.policy), f"{gain.value} ({gain.interval})", count(one.final.kl.mean))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
