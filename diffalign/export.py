"""`diffalign export`: what a run trained -> files that other programs read, reloaded and compared before they count.

Records are exported too, as parquet; :mod:`diffalign.parquet` writes those.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign import kohya, parquet
from diffalign.config import ExportConfig, ModelConfig
from diffalign.errors import UserError
from diffalign.families.base import family_class, load_family
from diffalign.files import replacing_folder
from diffalign.foreign import foreign_files, quiet, write_peft
from diffalign.networks import Loading
from diffalign.types import Request
from diffalign.weights import lora_layers, merge_lora, remove_lora

TOLERANCE = 1e-4  # of the largest output; float32 in another order of operations stays far below
PROBE = 16  # the comparison's image is so many steps of the size rule wide: small, and whole at every level of a UNet
TEXT_FORMATS = ("diffusers", "peft")


class Source(NamedTuple):
    """A folder of final weights."""

    folder: Path
    is_lora: bool


def run(config: ExportConfig, dry_run: bool = False) -> Path:
    """Write the export, reload it with stock code, compare; returns its folder.

    Raises:
        UserError: the folder is taken, weights, model and format do not fit, or what stock code reads is not what was
            trained; nothing is left behind then.
    """
    out = Path(config.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out: {out} is there already; choose another")
    _check_keys(config)
    if config.records is not None:
        return _export_records(Path(config.records), out, config.shard_size, dry_run)
    model, weights = config.model, config.weights
    assert model is not None
    assert weights is not None
    return _export_weights(model, Path(weights), config.format, out, dry_run)


def _check_keys(config: ExportConfig) -> None:
    """What is exported, and nothing else, must be given."""
    wanted = {"records"} if config.format == "parquet" else {"model", "weights"}
    given = {key for key in ("model", "weights", "records") if getattr(config, key) is not None}
    if given != wanted:
        names = " and ".join(f"`{key}`" for key in sorted(wanted))
        raise UserError(f"format: {config.format} takes {names}; given: {', '.join(sorted(given)) or 'none'}")


def _export_records(source: Path, out: Path, shard_size: int, dry_run: bool) -> Path:
    contents = parquet.survey(source)
    what = f"{contents.count} records with {', '.join(contents.labels) or 'no labels'}"
    if dry_run:
        print(f"would write {what} as parquet into {out}")
        return out
    with replacing_folder(out) as folder:
        files = parquet.write(source, folder, contents, shard_size * 10**6)
    print(f"wrote {what} to {files} parquet files in {out}")
    return out


def _export_weights(model: ModelConfig, weights: Path, form: str, out: Path, dry_run: bool) -> Path:
    kind = family_class(model.family)
    if model.adapter is not None:
        raise UserError("model.adapter: give the base model alone, and its LoRA as `weights`")
    source = find_weights(weights, kind)
    _check_format(form, kind, source)
    if dry_run:
        print(f"would export {source.folder} as {form} into {out}")
        return out
    family = load_family(model.family, model.path, model.device, loading=Loading(parts=model.parts))
    if source.is_lora:
        family.load_lora(source.folder)
    else:
        load_net(family.net, source.folder)
    trained = probe(family)
    with replacing_folder(out) as folder:
        matched, wanted, again = FORMATS[form](family, folder, out.name)
        if matched < wanted:
            raise UserError(f"format: {form}: stock code reads only {matched} of {wanted} keys")
        difference = (probe(again) - trained).abs().max().item()
        relative = difference / max(trained.abs().max().item(), 1e-30)
        if not relative <= TOLERANCE:
            raise UserError(f"format: {form}: the reloaded network differs by {relative:.1e} of its output")
    print(f"wrote {source.folder} as {form} to {out}")
    print(f"{matched} of {wanted} keys matched, largest difference of an output {difference:.1e} ({relative:.1e})")
    return out


# --- what was trained ---------------------------------------------------------------------------------------------


def find_weights(path: Path, kind: Any) -> Source:
    """The final weights in a run directory, or in the folder itself.

    Raises:
        UserError: there are none of this family.
    """
    for folder in (path / "lora", path):
        if (folder / kind.lora_file).is_file():
            return Source(folder, is_lora=True)
    for folder in (path / kind.net_name, path):
        if (folder / "config.json").is_file():
            return Source(folder, is_lora=False)
    raise UserError(f"weights: {path} holds neither a LoRA ({kind.lora_file}) nor a {kind.net_name} of a {kind.name}")


def _check_format(name: str, kind: Any, source: Source) -> None:
    if not source.is_lora and name != "diffusers":
        raise UserError(f"format: {source.folder} holds full weights, which only `diffusers` can hold, not {name}")
    if kind.modality == "text" and name not in TEXT_FORMATS:
        raise UserError(f"format: {name} is for diffusion models; {kind.name} has {' and '.join(TEXT_FORMATS)}")
    if name == "kohya":
        kohya.check(kind.name)


def load_net(net: nn.Module, folder: Path) -> None:
    """Put full weights that ``save_net`` wrote in place of a network's.

    Raises:
        UserError: unreadable, or of another network.
    """
    with foreign_files(f"weights: {folder} does not fit this model"), quiet():
        found, info = type(net).from_pretrained(folder, use_safetensors=True, output_loading_info=True)  # type: ignore[attr-defined]
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys")):
            raise UserError(f"weights: {folder} lacks tensors, or has others than a {type(net).__name__}")
        net.load_state_dict(found.state_dict())


@torch.no_grad()
def probe(family: Any) -> Tensor:
    """The network's output on fixed random input."""
    generator = torch.Generator().manual_seed(0)
    if family.modality == "text":
        vocabulary: int = family.net.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (2, 8), generator=generator).to(family.device)
        return family.forward(family.net, ids, None, None, ids.shape[1], False)[0]
    size = family.default_size
    if family.modality != "mesh":
        step, _ = family.size_rule
        size = (*size[:-2], *(min(side, PROBE * step) for side in size[-2:]))
    x_t = torch.randn(2, *family.latent_shape(size), generator=generator).to(family.device)
    t = torch.tensor([0.3, 0.95], device=family.device)  # of two experts the second time is the trained one's
    image = Image.linear_gradient("L").convert("RGB") if family.reads_condition else None
    cond = family.condition([Request(prompt, 0, image) for prompt in ("a photo", "")], size)
    return family.predict(family.net, x_t, t, cond)


# --- formats: write, reload with stock code, count ------------------------------------------------------------------


class Reloaded(NamedTuple):
    """What stock code made of an export."""

    matched: int
    """Tensors that it read and put where they belong."""
    wanted: int
    family: Any


def _diffusers(family: Any, folder: Path, name: str) -> Reloaded:
    """The whole model; a LoRA becomes part of the weights."""
    if hasattr(family.net, "peft_config"):
        merge_lora(family.net)
    if family.modality == "text":
        family.save_net(folder, family.net)
    else:
        family.pipe.save_pretrained(folder, safe_serialization=True)
    again = type(family).load(str(folder), family.device)
    mine, theirs = family.net.state_dict(), again.net.state_dict()
    return Reloaded(sum(key in theirs and torch.equal(mine[key], theirs[key]) for key in mine), len(mine), again)


def _peft(family: Any, folder: Path, name: str) -> Reloaded:
    from peft import PeftModel

    if family.modality == "text":
        family.save_lora(folder, family.net)
    else:
        write_peft(folder, family.net)
    return _reloaded(family, lambda net: PeftModel.from_pretrained(net, str(folder)))


def _lora(family: Any, folder: Path, name: str) -> Reloaded:
    family.save_lora(folder, family.net)
    return _reloaded(family, lambda net: family.stock_lora(folder, family.lora_file))


def _kohya(family: Any, folder: Path, name: str) -> Reloaded:
    file = f"{name}.safetensors"
    tensors = kohya.convert(family.name, family.net)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / file, metadata={"format": "pt"})
    return _reloaded(family, lambda net: family.pipe.load_lora_weights(folder, weight_name=file))


def _reloaded(family: Any, load: Callable[[nn.Module], object]) -> Reloaded:
    """Swap the LoRA for what ``load`` puts on the bare network."""
    wanted = lora_layers(family.net)
    remove_lora(family.net)
    with (
        foreign_files("format: stock code does not read the export"),
        quiet(),
        warnings.catch_warnings(action="ignore"),
    ):
        load(family.net)  # peft warns of names that transformers has replaced
    found = lora_layers(family.net)
    return Reloaded(2 * len(wanted.keys() & found.keys()), 2 * len(wanted), family)


FORMATS = {"diffusers": _diffusers, "peft": _peft, "lora": _lora, "kohya": _kohya}
