"""What a result was made on: hardware and versions; no names of machines, users or folders."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft")


def hardware() -> dict[str, Any]:
    """``cpu``, ``cores``, ``memory_gib``, ``gpu`` (None without one)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def described() -> str:
    """Hardware and versions in one line."""
    found = hardware()
    machine = f"{found['cores']} x {found['cpu']}, {found['memory_gib']:.0f} GiB, {found['gpu'] or 'no GPU'}"
    libraries = (f"{name} {known}" for name, known in versions().items() if name != "diffalign")
    return ", ".join([machine, *libraries])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
