"""What samples are worth: decoded and scored in a thread, while the next ones are made."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign import media
from diffalign.errors import UserError
from diffalign.records import Record, media_path, plain_text, read_image
from diffalign.scoring import Failure, Outcome, Sample, Scorer, score_batch
from diffalign.types import Request

DEPTH = 2  # batches that may wait for their scores; more would only hold memory


class Feedback(Protocol):
    """Who says what samples are worth."""

    labels: tuple[str, ...]
    seconds: dict[str, float]
    """Since the last call of ``collect``: at work, and how long the samples had to wait for it."""

    def begin(self, index: int) -> None:
        """What is submitted from here on is of the round ``index``."""
        ...

    def submit(self, records: Sequence[Record], latents: Tensor) -> None:
        """Samples (n, ...) and the record of each."""
        ...

    def collect(self) -> Tensor:
        """(N, M) labels of all that was submitted since the last call, in order; NaN where there is none."""
        ...


class Scorers:
    """Feedback of scorers.

    Args:
        family: decodes.
        scorers: label -> scorer.
        root: folder of the prompts' condition pictures.
        failures: share of a round that may fail.
    """

    def __init__(self, family: Any, scorers: Mapping[str, Scorer], root: Path, failures: float) -> None:
        refuse_together(scorers)
        self.labels = tuple(scorers)
        self.scorers = dict(scorers)
        self.seconds: dict[str, float] = {"score": 0.0, "wait": 0.0}
        self._family = family
        self._root = root
        self._failures = failures
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._pending: deque[Future[list[list[Outcome]]]] = deque()
        self._found: list[list[Outcome]] = []

    def begin(self, index: int) -> None:
        """Nothing to do: scores are the same in every round."""

    def submit(self, records: Sequence[Record], latents: Tensor) -> None:
        """Returns at once unless too many batches wait."""
        while len(self._pending) >= DEPTH:
            self._take()
        self._pending.append(self._pool.submit(self._score, list(records), latents))

    def _take(self) -> None:
        begun = time.perf_counter()
        self._found += self._pending.popleft().result()
        self.seconds["wait"] += time.perf_counter() - begun

    def _score(self, records: Sequence[Record], latents: Tensor) -> list[list[Outcome]]:
        """One outcome per sample and label."""
        begun = time.perf_counter()
        with torch.no_grad(), as_samples(self._family, records, self._family.decode(latents), self._root) as samples:
            names = [f"a sample of {record.prompt!r}" for record in records]
            columns = [score_batch(label, scorer, samples, names) for label, scorer in self.scorers.items()]
        self.seconds["score"] += time.perf_counter() - begun
        return [list(row) for row in zip(*columns, strict=True)]

    def collect(self) -> Tensor:
        """Waits for what is under way.

        Raises:
            UserError: too much could not be scored.
        """
        while self._pending:
            self._take()
        found, self._found = self._found, []
        lost = [failure for row in found for failure in row if isinstance(failure, Failure)]
        scores = len(found) * len(self.labels)
        if len(lost) > self._failures * max(scores, 20 * len(self.labels)):
            raise UserError(
                f"scorers failed on {len(lost)} of {scores} scores (`failures: {self._failures}`): {lost[0]}"
            )
        return torch.tensor([[_number(outcome) for outcome in row] for row in found]).reshape(-1, len(self.labels))


def _number(outcome: Outcome) -> float:
    return float("nan") if isinstance(outcome, Failure) else outcome.value


@contextmanager
def as_samples(family: Any, records: Sequence[Record], decoded: Tensor, root: Path) -> Iterator[list[Sample]]:
    """Decoded samples as scorers see them; clips and meshes as files that go away afterwards.

    Args:
        root: folder of the records' condition pictures.
    """
    more = [_given(record, root) for record in records]
    prompts = [plain_text(record.prompt) for record in records]
    if family.modality == "image":
        pictures = [Image.fromarray(pixels) for pixels in media.to_pixels(decoded)]
        yield [Sample(p, image=image, **own) for p, image, own in zip(prompts, pictures, more, strict=True)]
        return
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        files = [Path(folder, f"{n}{media.SUFFIX[family.modality]}") for n in range(len(records))]
        for file, sample in zip(files, decoded, strict=True):
            media.write(family.modality, file, sample)
        kind = family.modality
        yield [Sample(p, **{kind: file}, **own) for p, file, own in zip(prompts, files, more, strict=True)]


def refuse_together(scorers: Mapping[str, Scorer]) -> None:
    """Samples are scored as they come.

    Raises:
        UserError: a scorer compares all samples of a prompt.
    """
    for label, scorer in scorers.items():
        if getattr(scorer, "together", False):
            raise UserError(f"online: scorer {label!r} compares all samples of a prompt, which come in parts here")


def requests(family: Any, records: Sequence[Record], root: Path, seeds: Iterable[int]) -> list[Request]:
    """What prompts ask for, their condition pictures read.

    Each is encoded alone, and kept by the family: the last bits of an encoding depend on what is encoded beside it,
    which is something else in a run that continues, or on several processes.

    Args:
        root: folder of the prompts' files.
    """
    for record in records:
        family.encode_prompt([str(record.prompt)])
    names = [record.condition for record in records]
    pictures = [None if name is None else read_image(root, name, keep_alpha=True) for name in names]
    return [Request(str(r.prompt), seed, picture) for r, seed, picture in zip(records, seeds, pictures, strict=True)]


def _given(record: Record, root: Path) -> dict[str, Any]:
    given: dict[str, Any] = {"meta": record.meta}
    if record.condition is not None:
        given["condition"] = media_path(root, record.condition)
    return given
