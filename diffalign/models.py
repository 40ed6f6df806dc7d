"""The model that a config names: opened for sampling or training, and told apart from others."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffalign import config as cfg
from diffalign.errors import UserError
from diffalign.families.base import EMBEDDED, family_class, load_family
from diffalign.foreign import tensor_digest
from diffalign.networks import Loading, switch_attention

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


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
    """What decides the samples of a model: its config, and the content of weights and adapter, which may change."""
    settings = model.model_dump(mode="json", exclude={"compile", "checkpointing"})
    return {**settings, "revision": revision(model.path), "adapter_sha256": _adapter_digest(model)}


def origin(model: cfg.ModelConfig) -> dict[str, Any]:
    """What the origin of a sample says about its model."""
    found: dict[str, Any] = {"model": model.path, "revision": revision(model.path)}
    if model.adapter is not None:
        digest = _adapter_digest(model)
        found |= {"model": f"{model.path}+{model.adapter}", "adapter": digest and digest[:16]}
    return {name: value for name, value in found.items() if value is not None}


def revision(path: str) -> str | None:
    """Which weights a model path stands for: a Hub commit, or a digest of the weight files of a folder.

    None where there is nothing to read yet, such as a Hub id that was never downloaded.
    """
    world = path.removeprefix("embedded:")
    folder = EMBEDDED[world] if world != path and world in EMBEDDED else Path(path)
    if not folder.is_dir():
        return _hub_commit(path)
    if folder.parent.name == "snapshots":  # of the Hub's cache: the folder is named by its commit
        return folder.name
    digest = hashlib.sha256()
    for file in sorted({file for ending in WEIGHTS for file in folder.rglob(ending)}):
        state = file.stat()
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(_file_digest(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """SHA-256 of a weight file, read once per state: claims, origins and cards all ask, and it may be 20 GB."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def _hub_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("model_index.json", "config.json"):
        try:
            found = try_to_load_from_cache(name, file)
        except ValueError:  # not a Hub id
            return None
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def _adapter_digest(model: cfg.ModelConfig) -> str | None:
    weights = Path(model.adapter or "", family_class(model.family).lora_file)
    return _content_digest(weights) if model.adapter and weights.is_file() else None


def _content_digest(path: Path) -> str:
    """Of the tensors and metadata of a safetensors file; its bytes differ from one writing to the next."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = repr(sorted((file.metadata() or {}).items()))
            return tensor_digest(((name, file.get_tensor(name)) for name in sorted(file.keys())), metadata)
    except SafetensorError as error:
        raise UserError(f"model.adapter: {path} is not a readable safetensors file: {error}") from None
