"""People say what the samples of a round are worth: its files are written, and training waits for their answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffalign import config as cfg
from diffalign import label, media
from diffalign import records as store
from diffalign.config.file import dump, load
from diffalign.errors import UserError
from diffalign.files import claim, replacing, sweep
from diffalign.label.plan import SKIP, TYPES, Plan, Task
from diffalign.prompts import bring_files
from diffalign.records import Candidate, Record

LABEL = "human"
POLL = 2.0
"""Seconds between two looks at the file of answers."""
SAME = 0.05
"""Root mean square, of the latents' own: below it samples that are made again show what they showed."""


def check(config: cfg.TrainConfig, settings: cfg.OnlineConfig, modality: media.Modality) -> None:
    """Refuse what does not go together with people, before anything is loaded.

    Raises:
        UserError: which setting, and why.
    """
    if settings.scorers:
        raise UserError("online.scorers: are not asked with online.source=human; remove them")
    if settings.samples < 2:
        raise UserError(f"online.samples: {settings.samples}: people compare two samples of a prompt or more")
    if settings.refill:
        raise UserError("online.refill: with online.source=human nothing is sampled again; leave it 0")
    if settings.stop:
        raise UserError("online.stop: compares held-out rewards with a scorer's, and online.source is human")
    if config.run.rollback:
        raise UserError("run.rollback: with online.source=human a round is not sampled again; leave it 0")
    unknown = sorted(settings.reward.keys() - {LABEL})
    if unknown:
        raise UserError(f"online.reward: {unknown[0]!r}: the label of people is {LABEL!r}")
    if media.SUFFIX[modality] not in TYPES:
        raise UserError(f"online.source: no browser shows samples of model.family={config.model.family}")


class Human:
    """Feedback of people, by `diffalign label`; the file of a round that is written last says that it is whole.

    ::

        FOLDER/000003/media/               the samples, and the condition pictures of their prompts
        FOLDER/000003/latents.safetensors  the samples as they are trained on
        FOLDER/000003/label.yaml           config of `diffalign label`
        FOLDER/000003/records.jsonl        a record per prompt, named by its place in the round
        FOLDER/000003/answers.jsonl        from the page
        FOLDER/000003/labelled.jsonl       the records with the label ``human``

    A whole round is kept with its answers when a run that was stopped samples it again.

    Args:
        family: decodes.
        folder: of all rounds.
        root: folder of the prompts' condition pictures.
        samples: per prompt. Two are compared as a pair, more are ranked.
    """

    labels: tuple[str, ...] = (LABEL,)

    def __init__(self, family: Any, folder: Path, root: Path, samples: int) -> None:
        self.seconds: dict[str, float] = {"wait": 0.0}
        self._family = family
        self._rounds = folder
        self._root = root
        self._samples = samples
        self._task: Task = "pair" if samples == 2 else "rank"
        self.begin(0)

    def begin(self, index: int) -> None:
        """Start the round ``index``."""
        self._index = index
        self._folder = self._rounds / f"{index:06d}"
        self._records: list[Record] = []
        self._latents: list[Tensor] = []

    def submit(self, records: Sequence[Record], latents: Tensor) -> None:
        """Write the media, unless the round is there."""
        first = len(self._records)
        self._records += records
        self._latents.append(latents.float().cpu())
        if (self._folder / "records.jsonl").is_file():
            return
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            decoded = self._family.decode(latents)
        if not decoded.isfinite().all():
            raise UserError(f"round {self._index + 1}: a sample is not finite; nobody can compare it")
        for row, sample in enumerate(decoded, first):
            media.write(self._family.modality, self._folder / self._file(row), sample)

    def _file(self, row: int) -> str:
        """The media file of a sample."""
        name = f"{row // self._samples:06d}-{row % self._samples}"
        return f"media/{name}{media.SUFFIX[self._family.modality]}"

    def collect(self) -> Tensor:
        """Complete the round's files, and wait until every question about it has an answer; Ctrl+C interrupts.

        Returns:
            (N, 1) labels; NaN for samples of a prompt that everybody skipped.

        Raises:
            UserError: the folder holds other samples, or answers that do not fit.
        """
        self._complete()
        config = self._config()
        self._wait(config)
        labelled = label.run(config.model_copy(update={"merge": str(self._folder / "labelled.jsonl")}))
        found = {record.id: record for record in store.read(labelled)}
        rows = [
            [float(candidate.labels.get(LABEL, torch.nan)) for candidate in found[name].candidates]  # type: ignore[arg-type]
            if name in found
            else [torch.nan] * self._samples
            for name in (f"{place:06d}" for place in range(len(self._records) // self._samples))
        ]
        return torch.tensor(rows).reshape(-1, 1)

    def _complete(self) -> None:
        """Write what belongs to the media, or check that the files are those of these samples."""
        latents, path = torch.cat(self._latents), self._folder / "records.jsonl"
        made = []
        for place, record in enumerate(self._records[:: self._samples]):
            rows = range(place * self._samples, (place + 1) * self._samples)
            shown = [Candidate(sample=self._file(row), origin={"round": self._index}) for row in rows]
            mine = bring_files(record.model_copy(update={"id": f"{place:06d}"}), self._root, self._folder)
            made.append(mine.model_copy(update={"candidates": shown}))
        if path.is_file():
            kept = load_file(self._folder / "latents.safetensors")["latents"]
            same = kept.shape == latents.shape and (kept - latents).norm() <= SAME * kept.norm()
            if not same or list(store.read(path)) != made:
                raise UserError(f"{self._folder}: holds samples of other weights or settings; delete it to ask anew")
            return
        for folder in (self._folder, self._folder / "media"):
            sweep(folder)
        with replacing(self._folder / "latents.safetensors") as handle:
            handle.write(save({"latents": latents.contiguous()}))
        asked = cfg.LabelConfig(records=str(path), out=str(self._folder / "answers.jsonl"), task=self._task)
        with replacing(self._folder / "label.yaml") as handle:
            handle.write(dump(asked).encode())
        store.write(path, made)

    def _config(self) -> cfg.LabelConfig:
        """The config as people may have changed it, but for its files, task and label."""
        config = load(cfg.LabelConfig, self._folder / "label.yaml")
        files = {"records": str(self._folder / "records.jsonl"), "out": str(self._folder / "answers.jsonl")}
        return config.model_copy(update={**files, "task": self._task, "label": LABEL})

    def _wait(self, config: cfg.LabelConfig) -> None:
        """Return once there is an answer to every question, and not to skip it to all of them."""
        begun, path, seen = time.perf_counter(), Path(config.out), None
        asked = label.questions(config)
        while (size := path.stat().st_size if path.is_file() else 0) == seen or not _answered(config, asked):
            if seen is None:
                count = f"{len(self._records) // self._samples} prompts x {self._samples} samples"
                command = f"diffalign label {self._folder / 'label.yaml'}"
                print(f"round {self._index + 1}: {count} wait for people: {command}", flush=True)
            seen = size
            time.sleep(POLL)
        self.seconds["wait"] += time.perf_counter() - begun


def _answered(config: cfg.LabelConfig, asked: Plan) -> bool:
    path = Path(config.out)
    if not path.is_file():
        return False
    claim(path, label.identity(config), write=False)
    given = label.read_answers(path, asked).by_item
    told = [line.answer for name in asked.items for line in given.get(name, {}).values()]
    return all(given.get(name) for name in asked.items) and any(answer != SKIP for answer in told)


class Nobody:
    """Feedback for a rehearsal: nothing is written, and the later of two samples of a prompt counts as the better."""

    labels: tuple[str, ...] = (LABEL,)

    def __init__(self, samples: int) -> None:
        self.seconds: dict[str, float] = {"wait": 0.0}
        self._samples = samples
        self._count = 0

    def begin(self, index: int) -> None:
        """Nothing to do."""

    def submit(self, records: Sequence[Record], latents: Tensor) -> None:
        """Counts."""
        self._count += len(records)

    def collect(self) -> Tensor:
        """(N, 1)."""
        count, self._count = self._count, 0
        return (torch.arange(count) % self._samples)[:, None] / self._samples
