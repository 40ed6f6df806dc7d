"""What the tests of a family against its stock pipeline share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class Recorder:
    """What a transformer was called with and what it returned, call by call."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        self.results: list[torch.Tensor] = []
        net.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs, output) -> None:
        assert not args
        self.calls.append(kwargs)
        self.results.append(output[0])


def losses(run: Path) -> list[dict[str, float]]:
    """The metrics of every step, without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "cpu", "memory")} for row in rows]


def assert_resumes_exactly(
    cli: Callable[..., Any],
    config: Path,
    whole: Path,
    step: int = 2,
    weights: str = "lora/pytorch_lora_weights.safetensors",
) -> None:
    """A finished run, continued from the checkpoint of an earlier step, ends bit for bit where it ended."""
    resumed = whole.with_name("resumed")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / Path(weights).parent)
    for folder in resumed.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    start = resumed / f"checkpoint-{step:06d}"
    assert cli("train", config, f"run.dir={resumed}", "--resume", start).code == 0
    assert losses(resumed) == losses(whole)
    ours, again = (load_file(run / weights) for run in (whole, resumed))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[key], again[key]) for key in ours)
