"""`diffalign generate`: prompts x seeds -> records.jsonl + media/. Resumable; a sample depends on its seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign import config as cfg
from diffalign import media
from diffalign import records as store
from diffalign.errors import UserError
from diffalign.families.base import LatentFamily, family_class, load_family
from diffalign.files import claim, replacing
from diffalign.foreign import tensor_digest
from diffalign.networks import Loading, switch_attention
from diffalign.records import Candidate, Record, plain
from diffalign.samplers import find_sampler, guided
from diffalign.types import Decoding, Request, Sampling
from diffalign.worlds import load_prompts

RECORDS = "records.jsonl"


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
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts.source: {path} is not UTF-8 text: {error}") from None
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


def sample_media(family: LatentFamily, requests: Sequence[Request], sampling: Sampling) -> Tensor:
    """Decoded samples, one per request, as :mod:`diffalign.media` writes them.

    The noise of each comes from its own seed, whatever the batch.
    """
    schedule = family.schedule_for(sampling.size)
    sampler = find_sampler(sampling.sampler, schedule)
    shape = family.latent_shape(sampling.size)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in requests])
    cond = family.condition(requests, sampling.size)
    predict = guided(family, family.net, cond, family.unconditional(cond), sampling.guidance, family.guidance_interval)
    with family.autocast():
        latents = sampler(predict, noise.to(family.device), schedule.grid(sampling.steps).to(family.device))
    return family.decode(latents)


def generate(
    family: Any,
    prompts: Sequence[Record],
    out: Path,
    *,
    candidates: int,
    sampling: Sampling | Decoding,
    batch: int,
    seed: int,
    model: str,
    title: str = "generate",
) -> Path:
    """Sample ``candidates`` images or texts for every prompt into ``out``; what is there is kept, not redone.

    An image file appears whole or not at all, and a record is written once all its samples are there, so a stage that
    was killed loses at most one batch.

    Args:
        prompts: records without candidates.
        batch: samples per forward.
        model: what to note as the origin.

    Returns:
        The records file.
    """
    path = out / RECORDS
    sample: Callable[..., list[Candidate]] = _texts if isinstance(sampling, Decoding) else _media
    with store.Appender(path) as appender, _progress() as progress:
        task = progress.add_task(title, total=len(prompts) * candidates)
        for group in _groups(prompts, max(1, batch // candidates)):
            wanted = [(r, k, candidate_seed(seed, r.id, k)) for r in group for k in range(candidates)]
            if any(r.id not in appender.done for r in group):
                chunks = (wanted[start : start + batch] for start in range(0, len(wanted), batch))
                made = [text for chunk in chunks for text in sample(family, chunk, out, sampling)]
                rows = zip(group, _groups(list(zip(wanted, made, strict=True)), candidates), strict=True)
                appender.append(_record(r, row, sampling, model) for r, row in rows if r.id not in appender.done)
            progress.advance(task, len(wanted))
    return path


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """The same groups whatever was done before: the last bits of a sample depend on the batch it is sampled in."""
    return (items[start : start + size] for start in range(0, len(items), size))


Wanted = tuple[Record, int, int]
"""Record, number of the candidate, seed."""


def _media(family: LatentFamily, chunk: Sequence[Wanted], out: Path, sampling: Sampling) -> list[Candidate]:
    """Sample one batch and write the files that are not there yet."""
    names = [f"media/{record.id}-{k}{media.SUFFIX[family.modality]}" for record, k, _ in chunk]
    missing = {name for name in names if not (out / name).is_file()}
    if missing:
        made = sample_media(family, [_request(record, seed, out) for record, _, seed in chunk], sampling)
        for (record, _, _), name, sample in zip(chunk, names, made, strict=True):
            if not sample.isfinite().all():
                raise UserError(
                    f"record {record.id!r}: the model samples {sample.mean().item()}; check model and adapter"
                )
            if name in missing:
                media.write(family.modality, out / name, sample)
    return [Candidate(sample=name) for name in names]


def _request(record: Record, seed: int, out: Path) -> Request:
    condition = None if record.condition is None else store.read_image(out, record.condition, keep_alpha=True)
    return Request(str(record.prompt), seed, condition)


def _texts(family: Any, chunk: Sequence[Wanted], out: Path, decoding: Decoding) -> list[Candidate]:
    """Sample one batch of completions; they live in the records, not in files."""
    requests = [Request(plain(record.prompt), seed) for record, _, seed in chunk]
    return [Candidate(text=text) for text in family.generate(family.net, requests, decoding)]


def _record(
    prompt: Record, row: Sequence[tuple[Wanted, Candidate]], sampling: Sampling | Decoding, model: str
) -> Record:
    settings = asdict(sampling)
    settings.pop("size", None)
    origin = {"model": model, **settings}
    made = [c.model_copy(update={"origin": {**origin, "seed": seed}}) for (_, _, seed), c in row]
    return prompt.model_copy(update={"candidates": made})


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def open_model(model: cfg.ModelConfig) -> Any:
    """A model as its config says it is held and run, with its adapter."""
    loading = Loading(model.dtype, model.quant, model.parts)
    family = load_family(model.family, model.path, model.device, model.adapter, loading)
    if model.attention is not None:
        for net in family.networks:
            switch_attention(net, model.attention)
    return family


def load_model(model: cfg.ModelConfig) -> Any:
    """The model to sample from."""
    if model.lora is not None:
        raise UserError(
            "model.lora: is for `diffalign train`; to sample from a trained LoRA give its folder as model.adapter"
        )
    return open_model(model)


def model_identity(model: cfg.ModelConfig) -> dict[str, Any]:
    """What decides the samples of a model: its config, and the content of an adapter that training may replace."""
    weights = Path(model.adapter or "", family_class(model.family).lora_file)
    digest = _content_digest(weights) if model.adapter and weights.is_file() else None
    settings = model.model_dump(mode="json", exclude={"compile", "checkpointing"})
    return {**settings, "adapter_sha256": digest}


def _content_digest(path: Path) -> str:
    """Of the tensors and metadata of a safetensors file; its bytes differ from one writing to the next."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = repr(sorted((file.metadata() or {}).items()))
            return tensor_digest(((name, file.get_tensor(name)) for name in sorted(file.keys())), metadata)
    except SafetensorError as error:
        raise UserError(f"model.adapter: {path} is not a readable safetensors file: {error}") from None


def model_name(model: cfg.ModelConfig) -> str:
    """What the origin of a sample says about its model."""
    return model.path if model.adapter is None else f"{model.path}+{model.adapter}"


def claim_samples(
    out: Path, model: cfg.ModelConfig, prompts: Sequence[Record], settings: Mapping[str, Any], *, write: bool = True
) -> None:
    """Tie a folder of samples to the model and the settings that decide them; see :func:`diffalign.files.claim`."""
    identity = {**settings, "model": model_identity(model), "count": len(prompts)}
    claim(out / RECORDS, identity, out / "media", write=write)


def generate_with(
    config: cfg.GenerateConfig | cfg.EvalConfig,
    model: cfg.ModelConfig,
    prompts: Sequence[Record],
    out: Path,
    title: str = "generate",
) -> Path:
    """Load a model and :func:`generate` with the candidates, sampling and seed of a config; the records file."""
    settings = sampling_config(config, model.family)
    return generate(
        load_model(model),
        [_with_condition(record, Path(config.prompts.source).parent, out) for record in prompts],
        out,
        candidates=config.candidates,
        sampling=make_sampling(settings),
        batch=settings.batch,
        seed=config.seed,
        model=model_name(model),
        title=title,
    )


def _with_condition(record: Record, root: Path, out: Path) -> Record:
    """A prompt whose condition image lies with the samples, since records name files of their own folder alone."""
    if record.condition is None:
        return record
    content = store.media_path(root, record.condition)
    if not content.is_file():
        raise UserError(f"record {record.id!r}: {content}: no such condition image")
    name = f"media/condition-{record.id}{content.suffix}"
    if not (out / name).is_file():
        with replacing(out / name, durable=False) as handle:
            handle.write(content.read_bytes())
    return record.model_copy(update={"condition": name})


def run(config: cfg.GenerateConfig, dry_run: bool = False) -> Path:
    """The verb: load, sample, write; returns the records file."""
    sampling_config(config, config.model.family)
    prompts = read_prompts(config.prompts, config.seed)
    out = Path(config.out)
    claim_samples(out, config.model, prompts, config.model_dump(mode="json", exclude={"out"}), write=not dry_run)
    if dry_run:
        print(f"would sample {len(prompts)} prompts x {config.candidates} candidates into {out}")
        return out / RECORDS
    path = generate_with(config, config.model, prompts, out)
    print(f"{len(prompts)} prompts x {config.candidates} candidates in {path}")
    return path
