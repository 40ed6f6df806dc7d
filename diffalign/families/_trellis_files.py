"""The files of a TRELLIS pipeline: where its parts are, in a folder or on the Hub, and how they become networks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffalign.errors import UserError, nearest
from diffalign.foreign import foreign_files, quiet

INDEX = "pipeline.json"
FLOW, DECODER, ENCODER = "sparse_structure_flow_model", "sparse_structure_decoder", "sparse_structure_encoder"
CLASSES = {
    FLOW: "SparseStructureFlowModel",
    DECODER: "SparseStructureDecoder",
    ENCODER: "SparseStructureEncoder",
}
IMAGE, TEXT = "image_cond_model", "text_cond_model"
DINO = {"dinov2_vitl14_reg": "facebook/dinov2-with-registers-large"}
"""The published name of the image encoder, a torch.hub entry, and the same weights as transformers reads them."""


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/"))


def _fetch(path: str, *names: str) -> Path:
    """A folder that holds the files of these names, if its source has them: a folder, or a Hub id."""
    if _is_local(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    with foreign_files(f"model.path: cannot load {path} from the Hub"):
        return Path(snapshot_download(path, allow_patterns=list(names)))


class Sampler(NamedTuple):
    """How the authors sample, as far as it is not for the caller to choose."""

    interval: tuple[float, float]
    """Times at which guidance acts."""
    shift: float
    """``rescale_t``: shift of the time grid."""


def read_pipeline(path: str) -> tuple[dict[str, Any], Sampler]:
    """The arguments in ``pipeline.json`` of a folder or Hub id, and what they say about sampling.

    Raises:
        UserError: it is missing or broken, or lacks what this stage needs.
    """
    index = _fetch(path, INDEX) / INDEX
    if not index.is_file():
        raise UserError(f"model.path: {path} holds no {INDEX}; give a TRELLIS folder or its Hub id")
    try:
        args = json.loads(index.read_bytes())["args"]
        names = [args["models"][FLOW], args["models"][DECODER], args[IMAGE] if IMAGE in args else args[TEXT]]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("names that are no text")
        params = args["sparse_structure_sampler"]["params"]
        low, high = params.get("cfg_interval", (0.0, 1.0))
        sampler = Sampler((float(low), float(high)), float(params.get("rescale_t", 1.0)))
        if not 0 < sampler.shift < math.inf:
            raise ValueError(f"rescale_t {sampler.shift}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"model.path: {index} is not TRELLIS's: {type(error).__name__}: {error}") from None
    return args, sampler


def load_parts(source: str, args: Mapping[str, Any], others: Mapping[str, str]) -> tuple[dict[str, nn.Module], Any]:
    """The networks of the first stage by component, and the tokenizer of a text pipeline (else None).

    Args:
        source: a folder or Hub id.
        args: of its ``pipeline.json``.
        others: component -> where else to take it from.

    Raises:
        UserError: a part is missing, broken, or does not fit the others.
    """
    condition = IMAGE if IMAGE in args else TEXT
    names = {name: args["models"][name] for name in (FLOW, DECODER)}
    # the published pipelines do not list the encoder of their VAE, which lies beside the decoder
    beside = names[DECODER].replace("ss_dec", "ss_enc")
    names |= {ENCODER: args["models"].get(ENCODER, beside), condition: args[condition]}
    unknown = next((name for name in others if name not in names), None)
    if unknown is not None:
        raise UserError(f"model.parts: {source} has no {unknown!r}{nearest(unknown, names)}")
    names |= others
    parts: dict[str, nn.Module] = {name: _load_net(source, names[name], CLASSES[name]) for name in CLASSES}
    parts[condition], tokenizer = (_load_dino if condition == IMAGE else _load_clip)(source, names[condition])
    given, read = parts[condition].config.hidden_size, parts[FLOW].config.cond_channels  # type: ignore[union-attr]
    if given != read:
        raise UserError(f"model.path: {source}: its {FLOW} reads tokens of size {read}, its {condition} gives {given}")
    return parts, tokenizer


def _checkpoint(source: str, name: str) -> Path:
    """Where ``<name>.json`` and ``<name>.safetensors`` are: in the source, a folder, or ``owner/repository/name``.

    Raises:
        UserError: nowhere.
    """
    places = [(source, name), (".", name)]
    if name.count("/") >= 2:
        owner, repository, inner = name.split("/", 2)
        places.append((f"{owner}/{repository}", inner))
    for place, inner in places:
        files = [f"{inner}.json", f"{inner}.safetensors"]
        folder = _fetch(place, *files)
        if all((folder / file).is_file() for file in files):
            return folder / inner
    raise UserError(f"model.path: {source} holds no {name}.json with {name}.safetensors, which its pipeline.json needs")


def _load_net(source: str, name: str, kind: str) -> nn.Module:
    """A network of its configuration and all of its weights, in float32.

    Raises:
        UserError: missing, broken, of another class, or the weights are not those of the configuration.
    """
    from safetensors.torch import load_file

    from diffalign.families import _trellis_net

    stem = _checkpoint(source, name)
    with foreign_files(f"model.path: cannot load {stem}"):
        config = json.loads(stem.with_name(f"{stem.name}.json").read_bytes())
        if config["name"] != kind:
            raise UserError(f"model.path: {stem}.json is a {config['name']}; {kind} is needed")
        with torch.device("meta"):
            net = getattr(_trellis_net, kind)(**config["args"])
        net.load_state_dict(load_file(stem.with_name(f"{stem.name}.safetensors")), assign=True)
    return net.float()


def _place(source: str, name: str) -> str:
    """A name as a folder within the source, if there is one."""
    inner = Path(source) / name
    return str(inner) if _is_local(source) and inner.is_dir() else name


def _load_dino(source: str, name: str) -> tuple[nn.Module, None]:
    """DINOv2 with registers from transformers."""
    from transformers import Dinov2WithRegistersModel

    place = _place(source, DINO.get(name, name))
    return _load_transformer(Dinov2WithRegistersModel, place, "dinov2_with_registers"), None


def _load_clip(source: str, name: str) -> tuple[nn.Module, Any]:
    """CLIP's text encoder and its tokenizer from transformers."""
    from transformers import AutoTokenizer, CLIPTextModel

    place = _place(source, name)
    model = _load_transformer(CLIPTextModel, place, "clip", "clip_text_model")
    with foreign_files(f"model.path: cannot load the tokenizer of {place}"), quiet():
        return model, AutoTokenizer.from_pretrained(place)


def _load_transformer(kind: Any, place: str, *types: str) -> nn.Module:
    """A transformers model of one of some types from a folder or Hub id.

    Raises:
        UserError: missing, broken, of another type, or without some of its weights.
    """
    from transformers import AutoConfig

    with foreign_files(f"model.path: cannot load {place} as {kind.__name__}"), quiet():
        found = AutoConfig.from_pretrained(place).model_type
        if found not in types:
            raise UserError(f"model.path: {place} is a {found} model; {types[0]} is needed")
        model, report = kind.from_pretrained(place, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise UserError(f"model.path: {place} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
    return model
