"""`diffalign generate`: prompts x seeds -> records.jsonl + media/. Resumable; an image depends on its seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffalign import config as cfg
from diffalign import records as store
from diffalign.errors import UserError, nearest
from diffalign.families.base import DiffusersFamily, load_family
from diffalign.files import claim
from diffalign.records import Candidate, Record
from diffalign.samplers import SAMPLERS, guided
from diffalign.types import Request, Sampling
from diffalign.worlds import load_prompts

RECORDS = "records.jsonl"


def make_sampling(config: cfg.SamplingConfig) -> Sampling:
    """The flat value the samplers take."""
    return Sampling(config.sampler, config.steps, config.guidance, config.size)


def read_prompts(config: cfg.PromptsConfig, seed: int) -> list[Record]:
    """Records without candidates: from a world (`shapes:train`), a text file or a records file.

    ``per_task`` draws that many of every task in a seeded order, cycling through short tasks; ids stay unique.
    """
    found = _prompt_source(config.source)
    if config.per_task is not None:
        found = list(_per_task(found, config.per_task, seed))
    found = found[: config.limit]
    if not found:
        raise UserError(f"prompts.source: {config.source} holds no prompts")
    return [r.model_copy(update={"id": f"{i:06d}"}) for i, r in enumerate(found)]


def _prompt_source(source: str) -> list[Record]:
    world, colon, split = source.partition(":")
    if colon and not Path(source).exists():
        return [Record(id=m["prompt"], prompt=m["prompt"], meta=m) for m in load_prompts(world, split)]
    path = Path(source)
    if path.suffix == ".jsonl":
        return [r.model_copy(update={"candidates": []}) for r in store.read(path)]
    if not path.is_file():
        raise UserError(f"prompts.source: no file {source} (and no world of that name)")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Record(id=str(i), prompt=line) for i, line in enumerate(lines) if line]


def _per_task(found: Sequence[Record], n: int, seed: int) -> Iterator[Record]:
    tasks = list(dict.fromkeys(str(r.meta.get("tag", "")) for r in found))
    for index, task in enumerate(tasks):
        pool = [r for r in found if str(r.meta.get("tag", "")) == task]
        rng = np.random.default_rng([seed, index])
        rounds = [rng.permutation(len(pool)) for _ in range(-(-n // len(pool)))]
        for position in np.concatenate(rounds)[:n]:
            yield pool[int(position)]


def candidate_seed(seed: int, record: str, k: int) -> int:
    """A stable 63-bit seed for candidate ``k`` of a record."""
    digest = hashlib.sha256(f"{seed}|{record}|{k}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_images(family: DiffusersFamily, requests: Sequence[Request], sampling: Sampling) -> Tensor:
    """(N, 3, H, W) in [0, 1], one per request. The noise of each comes from its own seed, whatever the batch."""
    if sampling.sampler not in SAMPLERS:
        raise UserError(f"sampling.sampler: unknown {sampling.sampler!r}{nearest(sampling.sampler, SAMPLERS)}")
    shape = family.latent_shape(sampling.size)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in requests])
    prompts = [r.prompt for r in requests]
    cond, empty = family.encode_prompt(prompts), family.encode_prompt([""] * len(prompts))
    predict = guided(family, family.net, cond, empty, sampling.guidance)
    grid = family.schedule.grid(sampling.steps).to(family.device)
    return family.decode(SAMPLERS[sampling.sampler](predict, noise.to(family.device), grid))


def _to_bytes(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8, rounded as the stock pipelines do."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def generate(
    family: DiffusersFamily,
    prompts: Sequence[Record],
    out: Path,
    *,
    candidates: int,
    sampling: Sampling,
    batch: int,
    seed: int,
    model: str,
    title: str = "generate",
) -> Path:
    """Sample ``candidates`` images for every prompt into ``out``; what is already there is kept, not redone.

    An image file appears whole or not at all, and a record is written once all its images are there, so a stage that
    was killed loses at most one batch.

    Args:
        prompts: records without candidates.
        batch: images per forward.
        model: what to note as the origin.

    Returns:
        The records file.
    """
    path = out / RECORDS
    with store.Appender(path) as appender, _progress() as progress:
        todo = [r for r in prompts if r.id not in appender.done]
        task = progress.add_task(title, total=len(prompts) * candidates, completed=len(appender.done) * candidates)
        pending = iter(todo)
        while group := list(islice(pending, max(1, batch // candidates))):
            wanted = [(r, k, f"media/{r.id}-{k}.png") for r in group for k in range(candidates)]
            missing = [item for item in wanted if not (out / item[2]).is_file()]
            for start in range(0, len(missing), batch):
                chunk = missing[start : start + batch]
                requests = [Request(str(r.prompt), candidate_seed(seed, r.id, k)) for r, k, _ in chunk]
                pixels = _to_bytes(sample_images(family, requests, sampling))
                for (_, _, name), image in zip(chunk, pixels, strict=True):
                    store.save_image(out / name, image)
                progress.advance(task, len(chunk))
            progress.advance(task, len(wanted) - len(missing))
            appender.append(_record(r, candidates, sampling, seed, model) for r in group)
    return path


def _record(prompt: Record, candidates: int, sampling: Sampling, seed: int, model: str) -> Record:
    origin = {"model": model, "sampler": sampling.sampler, "steps": sampling.steps, "guidance": sampling.guidance}
    made = [
        Candidate(sample=f"media/{prompt.id}-{k}.png", origin={**origin, "seed": candidate_seed(seed, prompt.id, k)})
        for k in range(candidates)
    ]
    return prompt.model_copy(update={"candidates": made})


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def model_name(model: cfg.ModelConfig) -> str:
    """What the origin of a sample says about its model."""
    return model.path if model.adapter is None else f"{model.path}+{model.adapter}"


def run(config: cfg.GenerateConfig, dry_run: bool = False) -> Path:
    """The verb: load, sample, write; returns the records file."""
    prompts = read_prompts(config.prompts, config.seed)
    out = Path(config.out)
    identity = config.model_dump(mode="json", exclude={"out"})
    claim(out / RECORDS, out / "generate.json", identity, write=not dry_run)
    if dry_run:
        print(f"would sample {len(prompts)} prompts x {config.candidates} candidates into {out}")
        return out / RECORDS
    family = load_family(config.model.family, config.model.path, config.model.device, config.model.adapter)
    path = generate(
        family, prompts, out, candidates=config.candidates, sampling=make_sampling(config.sampling),
        batch=config.sampling.batch, seed=config.seed, model=model_name(config.model),
    )  # fmt: skip
    print(f"{len(prompts)} prompts x {config.candidates} candidates in {path}")
    return path
