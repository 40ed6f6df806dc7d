"""A vision language model as the judge: ratings by a rubric, comparisons in both orders, clips segment by segment."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from diffalign.errors import UserError
from diffalign.scoring import Failure, Outcome, Sample, Score, Scorer

from ._http import NoAnswer
from ._openai import Endpoint, Part, picture, text_of, words

if TYPE_CHECKING:
    from pathlib import Path

Mode = Literal["rating", "pairwise", "segments"]
RATING = """You see what a generator made for this prompt: "{prompt}"
Rate it from {low} to {high}: does it show everything that the prompt asks for, and is it free of visible faults?
Give a short reason, then end with a line of the form "Score: <number>"."""
PAIRWISE = """You see what two generators made for this prompt: "{prompt}"
Which is better: closer to the prompt, and with fewer visible faults? Say tie unless one of them is clearly better.
Give a short reason, then end with a line of the form "Verdict: first", "Verdict: second" or "Verdict: tie"."""
SEGMENTS = """You see frames of the same second of two clips made for this prompt: "{prompt}"
Which has fewer artefacts: broken limbs, hands or faces, distorted or melting objects, flicker, abrupt changes? Judge
nothing else, and say tie unless one of them is clearly better.
Give a short reason, then end with a line of the form "Verdict: first", "Verdict: second" or "Verdict: tie"."""
INSTRUCTIONS = {"rating": RATING, "pairwise": PAIRWISE, "segments": SEGMENTS}
PATTERNS = {
    "rating": r"(?im)^[\s*_#]*(?:score\b[\s*_:]*)?(-?\d+(?:\.\d+)?)(?:\s*/\s*\d+)?[\s*_.]*$",
    "pairwise": r"(?im)^[\s*_#]*(?:verdict\b[\s*_:]*)?(first|second|tie)[\s*_.]*$",
}
PATTERNS["segments"] = PATTERNS["pairwise"]
WORTH = {"first": 1.0, "tie": 0.5, "second": 0.0}


def build(
    base_url: str,
    model: str,
    mode: Mode = "rating",
    instruction: str | None = None,
    pattern: str | None = None,
    scale: tuple[float, float] = (1.0, 5.0),
    segment_seconds: float = 1.0,
    fps: float = 8.0,
    max_tokens: int = 512,
    key_env: str | None = None,
    timeout: float = 120.0,
    budget: float = 300.0,
    workers: int = 8,
    options: dict[str, Any] | None = None,
) -> Scorer:
    """A number from what a model writes. An answer without one is a failure of kind ``remote``, never a default.

    Args:
        base_url: of an OpenAI-compatible server, with ``/v1``.
        mode: ``rating``: of pictures or texts, moved from ``scale`` to [0, 1]. ``pairwise``: the share of comparisons
            won against the other candidates of the record, a tie being half; each is asked in both orders, and a
            verdict that changes with the order is a tie. ``segments``: the same for each part of clips of equal
            length, in the label's units (DenseDPO, arXiv:2506.03517).
        instruction: with ``{prompt}`` and, for ratings, ``{low}`` and ``{high}`` in it.
        pattern: regular expression whose first group is the number, or first, second or tie; the last match counts.
        segment_seconds: length of a part of a clip; the last one may be shorter.
        fps: frames of a clip that are shown, per second.
        key_env: environment variable with the key of the server.
        timeout: seconds of one request.
        budget: seconds without any answer after which items are failures.
        workers: questions that are asked at the same time.
        options: keys of the request to add or, with null, to leave out.
    """
    if not scale[0] < scale[1] or segment_seconds <= 0 or fps <= 0:
        raise UserError("scale: low, high; segment_seconds and fps: above 0")
    try:
        found = re.compile(PATTERNS[mode] if pattern is None else pattern)
    except re.error as error:
        raise UserError(f"pattern: {error}") from None
    if found.groups < 1:
        raise UserError("pattern: needs a group")
    endpoint = Endpoint(
        base_url, model, key_env=key_env, timeout=timeout, budget=budget, workers=workers, options=options
    )
    judge = _Judge(endpoint, INSTRUCTIONS[mode] if instruction is None else instruction, found, max_tokens)
    if mode == "rating":
        return _Rating(judge, scale[0], scale[1])
    if mode == "pairwise":
        return _Pairwise(judge)
    return _Segments(judge, segment_seconds, fps)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Asks and reads the answer."""

    endpoint: Endpoint
    instruction: str
    pattern: re.Pattern[str]
    max_tokens: int

    def say(self, parts: Sequence[Part], **holes: str) -> str:
        """What the pattern finds in the answer.

        Raises:
            NoAnswer: there is none, or nothing in it.
        """
        text = self.instruction
        for name, value in holes.items():
            text = text.replace(f"{{{name}}}", value)
        answer = text_of(self.endpoint.ask([words(text), *parts], max_tokens=self.max_tokens))
        matches = list(self.pattern.finditer(answer))
        if not matches:
            raise NoAnswer(f"not an answer: {answer[-100:]!r}")
        return matches[-1].group(1)

    def duel(self, first: Sequence[Part], second: Sequence[Part], prompt: str) -> float | Failure:
        """1 if the first wins, 0 if the second does, .5 for a tie or a verdict that follows the order."""
        try:
            straight, swapped = self._verdict(first, second, prompt), 1 - self._verdict(second, first, prompt)
        except NoAnswer as error:
            return Failure("remote", str(error))
        return straight if straight == swapped else 0.5

    def _verdict(self, first: Sequence[Part], second: Sequence[Part], prompt: str) -> float:
        said = self.say([words("First:"), *first, words("Second:"), *second], prompt=prompt).lower()
        if said not in WORTH:
            raise NoAnswer(f"not a verdict: {said[:50]!r}")
        return WORTH[said]


@dataclass(frozen=True, slots=True)
class _Rating:
    judge: _Judge
    low: float
    high: float
    accepts: frozenset[str] = frozenset({"image", "text"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        return self.judge.endpoint.each(self._rate, samples)

    def _rate(self, sample: Sample) -> Outcome:
        try:
            said = self.judge.say(_parts(sample), prompt=sample.prompt, low=f"{self.low:g}", high=f"{self.high:g}")
            value = float(said)
        except NoAnswer as error:
            return Failure("remote", str(error))
        except ValueError:
            return Failure("remote", f"not a number: {said[:50]!r}")
        if not self.low <= value <= self.high:
            return Failure("remote", f"{value:g} is not between {self.low:g} and {self.high:g}")
        return Score((value - self.low) / (self.high - self.low), detail={"rating": value})


@dataclass(frozen=True, slots=True)
class _Pairwise:
    judge: _Judge
    together: bool = True
    accepts: frozenset[str] = frozenset({"image", "text"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        shown = [[_parts(sample)] for sample in samples]
        return _shares(self.judge, shown, samples[0].prompt, lambda wins: Score(wins[0]))


@dataclass(frozen=True, slots=True)
class _Segments:
    judge: _Judge
    seconds: float
    fps: float
    together: bool = True
    accepts: frozenset[str] = frozenset({"video"})

    def __call__(self, samples: Sequence[Sample]) -> list[Outcome]:
        shown = [_segments(sample.video, self.seconds, self.fps) for sample in samples if sample.video is not None]
        counts = sorted({len(clip) for clip in shown})
        if len(counts) > 1:
            return [Failure("input", f"clips of {counts} segments; they must be equally long")] * len(samples)
        return _shares(self.judge, shown, samples[0].prompt, lambda wins: Score(fmean(wins), tuple(wins)))


def _shares(
    judge: _Judge, shown: Sequence[Sequence[Sequence[Part]]], prompt: str, score: Callable[[list[float]], Score]
) -> list[Outcome]:
    """Everybody against everybody, part by part; a candidate with a comparison that failed has no score.

    Args:
        shown: candidate -> part -> what is shown of it.
        score: from the shares that a candidate won, one per part.
    """
    if len(shown) < 2:
        return [Failure("input", "nothing to compare with: the record has one candidate")] * len(shown)
    parts = range(len(shown[0]))
    duels = [(a, b, part) for a, b in combinations(range(len(shown)), 2) for part in parts]
    results = judge.endpoint.each(lambda d: judge.duel(shown[d[0]][d[2]], shown[d[1]][d[2]], prompt), duels)
    won = [[0.0] * len(parts) for _ in shown]
    lost: dict[int, Failure] = {}
    for (a, b, part), result in zip(duels, results, strict=True):
        if isinstance(result, Failure):
            lost |= {a: result, b: result}
        else:
            won[a][part] += result
            won[b][part] += 1 - result
    others = len(shown) - 1
    return [lost.get(n) or score([wins / others for wins in won[n]]) for n in range(len(shown))]


def _parts(sample: Sample) -> list[Part]:
    if sample.image is not None:
        return [picture(sample.image)]
    return [words(sample.text or "")]


def _segments(path: Path, seconds: float, fps: float) -> list[list[Part]]:
    """The frames of each part of a clip."""
    from diffalign import media

    found: list[list[Part]] = []
    for time, frame in media.frames_at(path.parent, path.name, fps):
        while len(found) <= int(time / seconds + 1e-6):
            found.append([])
        found[-1].append(picture(frame, "JPEG"))
    return found
