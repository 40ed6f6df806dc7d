"""Files from elsewhere, read without trust: what libraries raise about them becomes one line of bad input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars, which would interleave with ours."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    bars = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in bars:
            log.enable_progress_bar()


@contextmanager
def foreign_files(failure: str) -> Iterator[None]:
    """Turns whatever a library raises about files it cannot use into one line of bad input."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{failure}: {type(error).__name__}: {' '.join(str(error).split())}") from error


@contextmanager
def reading_lora(folder: Path, file: str, name: str, net: nn.Module) -> Iterator[list[str]]:
    """Around what puts a LoRA file on the network of family ``name``; it lists the tensors that must find a place.

    Raises:
        UserError: no such file, unreadable, or some of those tensors are not on the network afterwards.
    """
    if not (folder / file).is_file():
        raise UserError(f"model.adapter: {folder} holds no {file}")
    wanted: list[str] = []
    with foreign_files(f"model.adapter: {folder} does not fit this {name}"):
        yield wanted
    loaded = sum("lora_" in key for key, _ in net.named_parameters())
    if loaded < len(wanted):
        raise UserError(f"model.adapter: {folder}: only {loaded} of {len(wanted)} tensors fit this {name}")


def adapter_settings(net: nn.Module) -> dict[str, Any]:
    """The PEFT settings of a network's LoRA; sets become sorted lists, because files should have an order."""
    settings = net.peft_config["default"].to_dict()  # type: ignore[index]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def write_peft(folder: Path, net: nn.Module) -> None:
    """Write the LoRA of a network as a PEFT adapter folder, which ``PeftModel.from_pretrained`` reads."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(net, adapter_name="default")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(adapter_settings(net), indent=2, sort_keys=True), encoding="utf-8")
    named = {f"{PEFT_PREFIX}{key}": value.contiguous() for key, value in state.items()}
    save_file(named, folder / PEFT_FILE, metadata={"format": "pt"})


def tensor_digest(named: Iterable[tuple[str, Tensor]], note: str = "") -> str:
    """SHA-256 of a note and of tensors with their names, in the order given."""
    digest = hashlib.sha256(note.encode())
    for name, value in named:
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
