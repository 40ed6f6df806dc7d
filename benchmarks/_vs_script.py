"""Run a training script of diffusers as it is, and write down when its steps end and, if asked, what one computes.

    python _vs_script.py OUT RECORD SCRIPT [ARGUMENTS ...]

OUT/steps.json gets the seconds (of one clock) at the end of every optimiser step. With float32 or float64 as RECORD
instead of ``-``, OUT/step.safetensors gets latents, noise, times, conditions, LoRA weights and LoRA gradients of the
first step. Both come from torch's global hooks and from a recording ``add_noise``; data, loss and loop are the
script's. Patched are:

- where the package is absent, ``wandb``: the script imports it at its top, whatever its ``--report_to``, so an empty
  module takes its place;
- with float64, the UNet and its input are cast to that precision before the first forward, so that formulas can be
  compared below the rounding of float32. The loss stays in float32, as the script has it.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def stand_in(name: str) -> None:
    """An empty module for a package that is imported and not used."""
    if importlib.util.find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module


class Recorder:
    """What the UNet was given, and the gradients the optimiser got, at the first step."""

    def __init__(self, dtype: torch.dtype) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel

        self.dtype, self.kind = dtype, UNet2DConditionModel
        self.tensors: dict[str, Tensor] = {}
        self.unet: Any = None
        stock, keep = DDPMScheduler.add_noise, self.keep

        def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            keep(latents=latents, noise=noise, timesteps=timesteps)
            return stock(scheduler, latents, noise, timesteps)

        DDPMScheduler.add_noise = add_noise
        register_module_forward_pre_hook(self.cast)
        register_module_forward_hook(self.after, with_kwargs=True)
        register_optimizer_step_pre_hook(self.before_update)

    def keep(self, **tensors: Tensor) -> None:
        """The first value of each name."""
        for name, value in tensors.items():
            self.tensors.setdefault(name, value.detach().clone().contiguous())

    def cast(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        if not isinstance(module, self.kind):
            return None
        self.unet = module.to(self.dtype)
        sample, times, states = args
        return sample.to(self.dtype), times, states.to(self.dtype)

    def after(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if module is self.unet:
            self.keep(x_t=args[0], states=args[2])
            added = kwargs.get("added_cond_kwargs") or {}
            self.keep(**{{"text_embeds": "pooled", "time_ids": "sizes"}[name]: v for name, v in added.items()})

    def before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        trained = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        self.keep(**{f"lora.{name}": p for name, p in trained.items()})
        self.keep(**{f"grad.{name}": p.grad for name, p in trained.items()})


def main() -> None:
    out, record, script = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    sys.argv = sys.argv[3:]
    stand_in("wandb")
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    recorder = None if record == "-" else Recorder(getattr(torch, record))
    runpy.run_path(script, run_name="__main__")
    out.mkdir(parents=True, exist_ok=True)
    (out / "steps.json").write_text(json.dumps(ends))
    if recorder is not None:
        save_file(recorder.tensors, out / "step.safetensors")


if __name__ == "__main__":
    main()
