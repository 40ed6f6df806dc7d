"""How networks are held and run: precision, quantisation, attention kernels, checkpointing, compilation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from diffalign.errors import UserError, nearest

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loading:
    """How the parts of a model are loaded."""

    dtype: Precision = "fp32"
    """Of all that does not train, but for a VAE, which stays in float32."""
    quant: Literal["nf4", "int8"] | None = None
    """Of the network alone: 4-bit NormalFloat (QLoRA, arXiv:2305.14314) or LLM.int8 (arXiv:2208.07339)."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Component of a pipeline -> a folder or Hub id to take it from instead."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.dtype]

    def quantisation(self, library: Literal["diffusers", "transformers"]) -> Any:
        """What ``from_pretrained`` of a network takes as ``quantization_config``; None for none.

        Raises:
            UserError: what it needs is not installed.
        """
        if self.quant is None:
            return None
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UserError(f"model.quant: {self.quant} needs bitsandbytes: pip install 'diffalign[quant]'") from None
        configs: Any = __import__(library)
        if self.quant == "int8":
            return configs.BitsAndBytesConfig(load_in_8bit=True)
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": self.torch_dtype}
        return configs.BitsAndBytesConfig(load_in_4bit=True, **options)


def switch_attention(net: nn.Module, name: str) -> None:
    """Compute attention with another kernel: any that diffusers dispatches to (``xformers``, ``flash``, ``sage`` ...).

    Raises:
        UserError: unknown, not installed, not for this network, or not for the device it is on.
    """
    switched = [module for module in net.modules() if hasattr(getattr(module, "processor", None), "_attention_backend")]
    try:
        if switched:
            net.set_attention_backend(name)  # type: ignore[operator]
        elif name == "xformers" and hasattr(net, "enable_xformers_memory_efficient_attention"):
            net.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        else:
            raise UserError(f"model.attention: {type(net).__name__} cannot be switched to {name!r}; leave it out")
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(f"model.attention: {name!r} cannot be used here: {' '.join(str(error).split())}") from None


def checkpoint(net: nn.Module) -> None:
    """Keep only the inputs of blocks for the backward pass and compute the rest again: less memory, a third more time.

    Raises:
        UserError: the network cannot.
    """
    if hasattr(net, "enable_gradient_checkpointing"):
        net.enable_gradient_checkpointing()  # type: ignore[operator]
    elif hasattr(net, "activation_checkpointing_enable"):
        net.activation_checkpointing_enable()  # type: ignore[operator]
        for module in net.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # transformers asks for it; what is below stays as it is, without dropout
    else:
        raise UserError(f"model.checkpointing: {type(net).__name__} does not support it")


def repeated_blocks(net: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """The blocks a network is a stack of.

    Args:
        blocks: class names, for networks that do not name them themselves.
    """
    names = getattr(net, "_repeated_blocks", None) or getattr(net, "_no_split_modules", None) or blocks
    return [module for module in net.modules() if type(module).__name__ in names]


def compile_blocks(net: nn.Module, blocks: Sequence[str]) -> None:
    """``torch.compile`` of the repeated blocks: one compilation serves them all.

    Raises:
        UserError: the network has no such blocks.
    """
    found = repeated_blocks(net, blocks)
    if not found:
        raise UserError(f"model.compile: {type(net).__name__} has no repeated blocks to compile")
    for module in found:
        module.compile()


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """An optimiser class of torch or, in 8 bits, of bitsandbytes, by name in any case.

    Raises:
        UserError: unknown, or bitsandbytes is not installed.
    """
    unfit = ("lbfgs", "sparseadam")  # these need a closure, or sparse gradients
    known = {key: value for key, value in _optimizers(torch.optim).items() if key not in unfit}
    if "8bit" in name.lower():
        try:
            import bitsandbytes
        except ImportError:
            raise UserError(f"optim.name: {name} needs bitsandbytes: pip install 'diffalign[quant]'") from None
        known = {key: value for key, value in _optimizers(bitsandbytes.optim).items() if "8bit" in key}
    if name.lower() not in known:
        raise UserError(f"optim.name: unknown optimiser {name!r}{nearest(name.lower(), known)}")
    return known[name.lower()]


def _optimizers(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    base = torch.optim.Optimizer
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base) and c is not base]
    return {c.__name__.lower(): c for c in classes}
