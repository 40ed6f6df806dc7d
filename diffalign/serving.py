"""The inside of the reward server, without HTTP: a bounded queue, batches across clients, one outcome per item.

All state belongs to the event loop. Scorers run in one thread of their own, because a GPU does one thing at a time.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.outcomes import Outcomes, Stored, Unit
from diffalign.scoring import Failure, Outcome, Sample, Scorer, score_batch
from diffalign.wire import Parcel, to_json, unpacked


class Full(Exception):
    """The queue takes no more for now."""


@dataclass(eq=False)
class Job:
    """A unit on its way to its scorer."""

    unit: Unit
    parcels: Sequence[Parcel]
    digest: str
    done: asyncio.Future[list[dict[str, Any]]]
    arrived: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return sum(parcel.size for parcel in self.parcels)


class Engine:
    """Takes items, batches them, scores each once and remembers what came of it.

    A unit that is known, or that is waiting, is not scored again: it gets the outcome of the first one. What a batch
    came to is on disk before anybody hears of it.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        outcomes: Outcomes,
        *,
        max_batch: int,
        max_wait: float,
        max_queued: int,
        max_bytes: int,
        max_pixels: int,
    ) -> None:
        self.scorers, self.outcomes = scorers, outcomes
        self.max_batch, self.max_wait = max_batch, max_wait
        self.max_queued, self.max_bytes, self.max_pixels = max_queued, max_bytes, max_pixels
        self.counts: Counter[str] = Counter()
        self.queued = self.held = 0
        self._jobs: dict[Unit, Job] = {}
        self._queues: dict[str, deque[Job]] = {label: deque() for label in scorers}
        self._thread = ThreadPoolExecutor(1, "scorer")
        self._news = asyncio.Event()
        self._closing = False
        self._folder = _folder(outcomes.path)

    # --- asking ---------------------------------------------------------------------------------------------------

    def ask(self, label: str, parcels: Sequence[Parcel]) -> list[Job | Stored | Failure]:
        """What there is for each unit of a request: on its way, known, or not to be had.

        Raises:
            Full: nothing of the request was taken.
        """
        together = getattr(self.scorers[label], "together", False)
        groups = [list(parcels)] if together else [[parcel] for parcel in parcels]
        asked = [(self._unit(label, group), group) for group in groups]
        new = [group for unit, group in asked if unit not in self._jobs and self.outcomes.get(unit) is None]
        items = sum(map(len, new))
        size = sum(parcel.size for group in new for parcel in group)
        if self.queued + items > self.max_queued or self.held + size > self.max_bytes:
            raise Full
        return [self._place(unit, group) for unit, group in asked]

    def _unit(self, label: str, group: Sequence[Parcel]) -> Unit:
        return label, tuple(parcel.item.key for parcel in group)

    def _place(self, unit: Unit, group: Sequence[Parcel]) -> Job | Stored | Failure:
        digest = " ".join(parcel.digest for parcel in group)
        known = self.outcomes.get(unit) or self._jobs.get(unit)
        if known is None:
            job = Job(unit, group, digest, asyncio.get_running_loop().create_future())
            self._jobs[unit] = job
            self._queues[unit[0]].append(job)
            self.queued += len(group)
            self.held += job.size
            self._news.set()
            return job
        if known.digest != digest:
            return Failure("input", "this key names another item; choose a new key for every item")
        self.counts["repeated"] += len(group)
        return known

    # --- scoring --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Score until :meth:`close` is called and nothing is left."""
        loop = asyncio.get_running_loop()
        while label := await self._next():
            jobs = self._take(label)
            try:
                stored = await loop.run_in_executor(self._thread, self._score, label, jobs)
            except Exception as error:  # of the disk: an outcome that is not kept is not told
                self._settle(jobs, error)
            else:
                self.outcomes.remember(stored)
                self._settle(jobs, stored)

    async def close(self) -> None:
        """Let :meth:`run` finish what is queued; nothing new may come."""
        self._closing = True
        self._news.set()

    def release(self) -> None:
        """Give back the thread and the files, after :meth:`run` has returned."""
        self._thread.shutdown()
        self.outcomes.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _next(self) -> str | None:
        """The scorer whose oldest job has waited longest, once its batch is full or the wait is over."""
        while True:
            self._news.clear()
            waiting = [queue for queue in self._queues.values() if queue]
            if waiting:
                queue = min(waiting, key=lambda queue: queue[0].arrived)
                left = queue[0].arrived + self.max_wait - time.monotonic()
                if left <= 0 or self._closing or sum(len(job.parcels) for job in queue) >= self.max_batch:
                    return queue[0].unit[0]
            elif self._closing:
                return None
            else:
                left = math.inf
            try:
                await asyncio.wait_for(self._news.wait(), None if left == math.inf else left)
            except TimeoutError:
                continue

    def _take(self, label: str) -> list[Job]:
        """The next jobs that fit into a batch, one at least."""
        queue, jobs, items = self._queues[label], [], 0
        while queue and (not jobs or items + len(queue[0].parcels) <= self.max_batch):
            jobs.append(queue.popleft())
            items += len(jobs[-1].parcels)
        return jobs

    def _settle(self, jobs: Sequence[Job], result: Sequence[Stored] | Exception) -> None:
        for index, job in enumerate(jobs):
            del self._jobs[job.unit]
            self.queued -= len(job.parcels)
            self.held -= job.size
            if isinstance(result, Exception):
                self.counts["lost"] += len(job.parcels)
                job.done.set_exception(result)
                job.done.exception()  # nobody may be waiting any more
            else:
                self.counts.update(answer["status"] for answer in result[index].answers)
                job.done.set_result(result[index].answers)

    def _score(self, label: str, jobs: Sequence[Job]) -> list[Stored]:
        """In the scorers' thread: samples, scores, and the disk."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            samples = [self._samples(job, folder / str(index)) for index, job in enumerate(jobs)]
            outcomes = self._outcomes(label, jobs, samples)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        now = self.outcomes.clock()
        stored = [
            Stored(job.unit, job.digest, now, [to_json(outcome) for outcome in found])
            for job, found in zip(jobs, outcomes, strict=True)
        ]
        self.outcomes.write(stored)
        return stored

    def _samples(self, job: Job, folder: Path) -> list[Sample | Failure]:
        found: list[Sample | Failure] = []
        for index, parcel in enumerate(job.parcels):
            place = folder / str(index)
            if parcel.contents:
                place.mkdir(parents=True)
            try:
                found.append(unpacked(parcel, place, self.max_pixels))
            except UserError as error:
                found.append(Failure("input", str(error).replace(f"{place}/", "")))
        return found

    def _outcomes(
        self, label: str, jobs: Sequence[Job], samples: Sequence[Sequence[Sample | Failure]]
    ) -> list[list[Outcome]]:
        """One outcome per sample; those that a comparing scorer sees together are one call."""
        found: list[list[Any]] = [list(group) for group in samples]
        places = [(j, i) for j, group in enumerate(samples) for i, one in enumerate(group) if isinstance(one, Sample)]
        calls = [places]
        if getattr(self.scorers[label], "together", False):
            calls = [[place for place in places if place[0] == j] for j in range(len(jobs))]
        for one in filter(None, calls):
            names = [f"item {jobs[j].parcels[i].item.key!r}" for j, i in one]
            try:
                outcomes = score_batch(label, self.scorers[label], [found[j][i] for j, i in one], names)
            except Exception as error:  # out of memory, or a scorer that breaks its contract
                outcomes = [Failure(type(error).__name__, str(error))] * len(one)
            for (j, i), outcome in zip(one, outcomes, strict=True):
                found[j][i] = outcome
        return found


def _folder(journal: Path | None) -> Path:
    """Where files of items lie while they are scored; what a killed server left there is removed."""
    if journal is None:
        return Path(tempfile.mkdtemp(prefix="diffalign-serve-"))
    folder = journal.with_name(f"{journal.name}.files")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
