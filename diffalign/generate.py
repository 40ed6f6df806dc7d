"""`diffalign generate`: prompts x models x seeds -> records.jsonl + media/. Resumable; seeds decide samples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffalign import config as cfg
from diffalign import media, models
from diffalign import records as store
from diffalign.engines import stream
from diffalign.errors import UserError
from diffalign.families.base import LatentFamily, family_class
from diffalign.files import claim, replacing
from diffalign.prompts import bring_files, read_prompts
from diffalign.records import Candidate, Record, plain
from diffalign.samplers import find_sampler, guided
from diffalign.types import Decoding, Request, Sampling

RECORDS = "records.jsonl"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def sampling_config(
    config: cfg.GenerateConfig | cfg.EvalConfig, family: str
) -> cfg.SamplingConfig | cfg.DecodingConfig:
    """The section that says how a family samples: ``sampling``, or ``decoding`` for text.

    Raises:
        UserError: the other one was given.
    """
    text = family_class(family).modality == "text"
    mine, other = ("decoding", "sampling") if text else ("sampling", "decoding")
    given = getattr(config, other)
    if given != type(given)():
        raise UserError(f"{other}: {family} is sampled as `{mine}` says; remove `{other}`")
    return getattr(config, mine)


def make_sampling(config: cfg.SamplingConfig | cfg.DecodingConfig) -> Sampling | Decoding:
    """The flat value the samplers take."""
    if isinstance(config, cfg.DecodingConfig):
        return Decoding(config.temperature, config.top_p, config.max_tokens)
    return Sampling(config.sampler, config.steps, config.guidance, config.size)


def candidate_seed(seed: int, record: str, k: int) -> int:
    """A stable 63-bit seed for candidate ``k`` of a record."""
    return _hashed(f"{seed}|{record}|{k}") >> 1


def start_strength(seed: int, record: str, low: float, high: float) -> float:
    """How far a record's source is noised: one level for all its candidates, since another one teaches a shortcut."""
    return low + (high - low) * _hashed(f"strength|{seed}|{record}") / 2**64


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- samples ------------------------------------------------------------------------------------------------------


def sample_media(family: LatentFamily, requests: Sequence[Request], sampling: Sampling) -> Tensor:
    """Decoded samples, one per request, as :mod:`diffalign.media` writes them.

    The noise of each comes from its own seed, whatever the batch. Requests that start at another level of the grid
    are sampled apart.
    """
    grid = family.schedule_for(sampling.size).grid(sampling.steps)
    levels = [start_level(grid, request.strength) for request in requests]
    made: dict[int, Tensor] = {}
    for level in sorted(set(levels)):
        rows = [row for row, own in enumerate(levels) if own == level]
        samples = _sample_from(family, [requests[row] for row in rows], sampling, grid[level:])
        made.update(zip(rows, samples, strict=True))
    return torch.stack([made[row] for row in range(len(requests))])


def start_level(grid: Tensor, strength: float) -> int:
    """Index of the first time of a decreasing grid that is not above ``strength``; the last step is always taken."""
    return min(int((grid > strength + 1e-6).sum()), len(grid) - 2)


def _sample_from(family: LatentFamily, requests: Sequence[Request], sampling: Sampling, grid: Tensor) -> Tensor:
    schedule = family.schedule_for(sampling.size)
    sampler = find_sampler(sampling.sampler, schedule)
    shape = family.latent_shape(sampling.size)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in requests])
    noise, grid = noise.to(family.device), grid.to(family.device)
    cond = family.condition(requests, sampling.size)
    predict = guided(family, family.net, cond, family.unconditional(cond), sampling.guidance, family.guidance_interval)
    given = [request.start for request in requests if request.start is not None]
    with family.autocast():
        if given:
            with torch.no_grad():
                clean = family.latents(*family.encode_media(torch.stack(given).to(family.device)))
            noise = schedule.add_noise(clean, noise, grid[0].expand(len(noise)))
        latents = sampler(predict, noise, grid)
    return family.decode(latents)


@dataclass(frozen=True)
class Maker:
    """Makes the candidates of prompts with one model: a call takes records without candidates and returns them with.

    An image file appears whole or not at all, and what is there is kept, not redone.
    """

    family: Any
    out: Path
    """Folder of the records; media go to ``media/`` in it."""
    candidates: int
    sampling: Sampling | Decoding
    batch: int
    """Samples per forward."""
    seed: int
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What to note about the model."""
    name: str = ""
    """Of the model among several."""
    strength: tuple[float, float] | None = None
    """Range of levels that a record's source is noised to; None starts from noise alone."""
    extract: Callable[[Sequence[Image.Image]], list[Image.Image]] | None = None
    """Reads the condition that a sample shows."""

    def __call__(self, group: Sequence[Record]) -> list[Record]:
        wanted = [Wanted(r, k, candidate_seed(self.seed, r.id, k)) for r in group for k in range(self.candidates)]
        make = self._texts if isinstance(self.sampling, Decoding) else self._media
        made = [candidate for chunk in chunks(wanted, self.batch) for candidate in make(chunk)]
        rows = zip(group, chunks(made, self.candidates), strict=True)
        return [record.model_copy(update={"candidates": list(row)}) for record, row in rows]

    def _texts(self, chunk: Sequence[Wanted]) -> list[Candidate]:
        """One batch of completions; they live in the records, not in files."""
        requests = [Request(plain(want.record.prompt), want.seed) for want in chunk]
        texts = self.family.generate(self.family.net, requests, self.sampling)
        return [Candidate(text=text, origin=self._origin(want)) for want, text in zip(chunk, texts, strict=True)]

    def _media(self, chunk: Sequence[Wanted]) -> list[Candidate]:
        """One batch of samples; those whose files are not there yet are written."""
        names = [f"media/{want.record.id}-{self.name and f'{self.name}-'}{want.k}" for want in chunk]
        suffix = media.SUFFIX[self.family.modality]
        if not all((self.out / f"{name}{suffix}").is_file() for name in names):
            samples = sample_media(self.family, self._requests(chunk), self.sampling)  # type: ignore[arg-type]
            for want, name, sample in zip(chunk, names, samples, strict=True):
                _check_finite(want.record, sample)
                if not (self.out / f"{name}{suffix}").is_file():
                    media.write(self.family.modality, self.out / f"{name}{suffix}", sample)
        shown = self._extracted(names, suffix) if self.extract else [{}] * len(names)
        return [
            Candidate(sample=f"{name}{suffix}", origin={**self._origin(want), **more})
            for want, name, more in zip(chunk, names, shown, strict=True)
        ]

    def _requests(self, chunk: Sequence[Wanted]) -> list[Request]:
        starts = {want.record.id: self._start(want.record) for want in chunk} if self.strength else {}
        return [
            Request(
                str(want.record.prompt),
                want.seed,
                None if want.record.condition is None else self._condition(want.record.condition),
                starts.get(want.record.id),
                self._strength(want.record),
            )
            for want in chunk
        ]

    def _condition(self, name: str) -> Image.Image:
        return store.read_image(self.out, name, keep_alpha=True)

    def _start(self, record: Record) -> Tensor:
        if record.source is None:
            raise UserError(f"record {record.id!r}: `strength` starts from a record's `source`, and it has none")
        size = self.family.sample_size(self.sampling.size)  # type: ignore[union-attr]
        return media.read(self.family.modality, self.out, record.source, size, (0.5, 0.5))

    def _strength(self, record: Record) -> float:
        return start_strength(self.seed, record.id, *self.strength) if self.strength else 1.0

    def _extracted(self, names: Sequence[str], suffix: str) -> list[dict[str, str]]:
        """The conditions that samples show, as files beside them."""
        assert self.extract is not None
        shown = [f"{name}-condition.png" for name in names]
        pictures = self.extract([store.read_image(self.out, f"{name}{suffix}") for name in names])
        for name, picture in zip(shown, pictures, strict=True):
            with replacing(self.out / name, durable=False) as handle:
                picture.save(handle, format="PNG")
        return [{"condition": name} for name in shown]

    def _origin(self, want: Wanted) -> dict[str, Any]:
        settings = asdict(self.sampling)
        settings.pop("size", None)
        more = {"strength": self._strength(want.record)} if self.strength else {}
        return {**self.origin, **settings, **more, "seed": want.seed}


class Wanted(NamedTuple):
    """A candidate to make."""

    record: Record
    k: int
    seed: int


def _check_finite(record: Record, sample: Tensor) -> None:
    if not sample.isfinite().all():
        raise UserError(f"record {record.id!r}: the model samples {sample.mean().item()}; check model and adapter")


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The same chunks whatever was done before: the last bits of a sample depend on the batch it is sampled in."""
    return (items[start : start + size] for start in range(0, len(items), size))


# --- the verb -----------------------------------------------------------------------------------------------------


def run(config: cfg.GenerateConfig, dry_run: bool = False, title: str = "generate") -> Path:
    """Sample what is not there yet; returns the records file.

    Several sources are sampled one after the other, each into ``records-<name>.jsonl``, and put together at the end.
    """
    parts = expand(config)
    for part in parts.values():
        _check(part)
    prompts = read_prompts(config.prompts, config.seed)
    out, path = Path(config.out), Path(config.out, RECORDS)
    _claim(path, config, parts, prompts, write=not dry_run)
    each = sum(part.candidates for part in parts.values())
    if dry_run:
        print(f"would sample {len(prompts)} prompts x {each} candidates into {out}")
        return path
    prompts = [bring_files(record, Path(config.prompts.source).parent, out) for record in prompts]
    for name, part in parts.items():
        _fill(out / records_name(name), part, name, prompts, f"{title} {name}".strip())
    if config.sources:
        store.write(path, _merged(out, parts))
    print(f"{len(prompts)} prompts x {each} candidates in {path}")
    return path


def records_name(source: str) -> str:
    """The file that one of several sources writes."""
    return f"records-{source}.jsonl" if source else RECORDS


def expand(config: cfg.GenerateConfig) -> dict[str, cfg.GenerateConfig]:
    """Every source with its own complete config; a config without sources is its own only one, named ``""``.

    Raises:
        UserError: a name that cannot be part of a file name.
    """
    if not config.sources:
        return {"": config}
    found = {}
    for name, source in config.sources.items():
        if not NAME.fullmatch(name):
            raise UserError(f"sources: {name!r} becomes part of file names; use letters, digits, '_', '-' and '.'")
        update: dict[str, Any] = {"sources": {}}
        for key in source.model_fields_set:
            value = getattr(source, key)
            if isinstance(value, cfg.SamplingConfig | cfg.DecodingConfig):
                value = getattr(config, key).model_copy(update={k: getattr(value, k) for k in value.model_fields_set})
            if value is not None:
                update[key] = value
        found[name] = config.model_copy(update=update)
    return found


def _check(config: cfg.GenerateConfig) -> None:
    """Refuse what the family cannot do before anything is loaded."""
    settings = sampling_config(config, config.model.family)
    for key in ("strength", "extract"):
        if getattr(config, key) is not None and isinstance(settings, cfg.DecodingConfig):
            raise UserError(f"{key}: is for pictures and clips; {config.model.family} writes text")
    if config.strength is not None and not 0 < config.strength[0] <= config.strength[1] <= 1:
        raise UserError(f"strength: {list(config.strength)} must be two rising numbers above 0 and up to 1")


def _claim(
    path: Path,
    config: cfg.GenerateConfig,
    parts: Mapping[str, cfg.GenerateConfig],
    prompts: Sequence[Record],
    *,
    write: bool,
) -> None:
    """Tie the folder to everything that decides the samples; see :func:`diffalign.files.claim`."""
    settings = config.model_dump(mode="json", exclude={"out", "engine", "workers"})
    identity = {name: models.model_identity(part.model) for name, part in parts.items()}
    claim(path, {**settings, "model": identity, "count": len(prompts)}, path.parent / "media", write=write)


def load_maker(config: cfg.GenerateConfig, name: str = "") -> Maker:
    """The maker of one source, its model loaded."""
    settings = sampling_config(config, config.model.family)
    extract = None
    if config.extract is not None:
        from diffalign.extractors import load_extractor

        extract = load_extractor(config.extract.name, **config.extract.params)
    return Maker(
        models.load_model(config.model),
        Path(config.out),
        config.candidates,
        make_sampling(settings),
        settings.batch,
        config.seed,
        {**({"source": name} if name else {}), **models.origin(config.model)},
        name,
        config.strength,
        extract,
    )


def _fill(path: Path, config: cfg.GenerateConfig, name: str, prompts: Sequence[Record], title: str) -> None:
    """Bring the records file of one source to its full length."""
    per_call = max(1, sampling_config(config, config.model.family).batch // config.candidates)
    with store.Appender(path) as appender, _progress() as progress:
        groups = [g for g in chunks(prompts, per_call) if any(r.id not in appender.done for r in g)]
        done = len(prompts) - sum(map(len, groups))
        task = progress.add_task(title, total=len(prompts) * config.candidates, completed=done * config.candidates)
        for made in stream(partial(load_maker, config, name), groups, config.engine, config.workers):
            appender.append(record for record in made if record.id not in appender.done)
            progress.advance(task, len(made) * config.candidates)


def _merged(out: Path, names: Iterable[str]) -> Iterator[Record]:
    """The candidates of every source in one record, in the order of the sources."""
    for rows in zip(*(store.read(out / records_name(name)) for name in names), strict=True):
        yield rows[0].model_copy(update={"candidates": [c for row in rows for c in row.candidates]})


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
