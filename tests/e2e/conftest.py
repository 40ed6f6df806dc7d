"""What the end-to-end tests run on: a tiny random SD3 folder and 16 preference pairs, both in the published layouts."""

import copy
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from . import tiny_parts

PAIRS = 16
TASK = "colors"


def _pipeline() -> Any:
    """Stock classes with random weights: 32x32 images, 4x8x8 latents, some ten thousand parameters, no T5."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    from diffalign.worlds.shapes.pretrain import _tokenizer

    tokenizer = _tokenizer()
    vae = tiny_parts.vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.05)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=tiny_parts.clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=tiny_parts.clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory) -> Path:
    """A random SD3 in a diffusers folder, written by stock classes. Read only; copy it to change it."""
    import torch

    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A random Stable Diffusion 1 in a diffusers folder, written by stock classes. Read only."""
    import torch

    folder = tmp_path_factory.mktemp("tiny") / "sd"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny_parts.sd_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """A records file ``pairs.jsonl`` of 16 pairs with rewards and its media, in a folder. Read only."""
    import numpy as np
    import torch

    from diffalign import records
    from diffalign.worlds.shapes.prompts import prompts
    from diffalign.worlds.shapes.render import render_prompts

    folder = tmp_path_factory.mktemp("data")
    metadata = prompts("train", TASK)[:PAIRS]
    images = render_prompts([m for m in metadata for _ in range(2)], torch.Generator().manual_seed(1))
    pixels = (images * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = []
    for i, row in enumerate(metadata):
        names = [f"media/{i:06d}-{k}.png" for k in range(2)]
        for k, name in enumerate(names):
            records.save_image(folder / name, pixels[2 * i + k] if k == 0 else np.roll(pixels[2 * i + k], 9, axis=0))
        made = [records.Candidate(sample=name, labels={"reward": 1.0 - k}) for k, name in enumerate(names)]
        rows.append(records.Record(id=f"{i:06d}", prompt=row["prompt"], candidates=made, meta=row))
    records.write(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


@pytest.fixture
def own_pairs(pairs, tmp_path) -> Path:
    """A copy of the pairs that a test may spoil."""
    return shutil.copytree(pairs.parent, tmp_path / "data", ignore=shutil.ignore_patterns("cache")) / pairs.name


@pytest.fixture
def own_sd3(tiny_sd3, tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_sd3, tmp_path / "model")


@pytest.fixture
def config(tmp_path, tiny_sd3, own_pairs) -> Callable[..., Path]:
    """``config("train", {"run": {"steps": 2}})`` writes a small valid config of that verb, with changes on top."""
    model = {"family": "sd3", "path": str(tiny_sd3), "device": "cpu"}
    valid: dict[str, Any] = {
        "train": {
            "model": {**model, "lora": {"rank": 2}},
            "data": {"records": str(own_pairs)},
            "method": {"name": "diffusion-dpo", "objective": {"beta": 200.0}},
            "optim": {"name": "adamw", "lr": 1e-3},
            "run": {"dir": str(tmp_path / "run"), "steps": 2, "batch": 4},
        },
        "generate": {
            "model": model,
            "prompts": {"source": "shapes:train", "limit": 4},
            "candidates": 2,
            "sampling": {"steps": 2, "batch": 4},
            "out": str(tmp_path / "pool"),
        },
        "score": {
            "records": str(own_pairs),
            "out": str(own_pairs.with_name("scored.jsonl")),
            "scorers": [{"name": "shapes", "label": "graded", "params": {"metric": "graded"}}],
        },
        "build": {
            "records": str(own_pairs),
            "out": str(own_pairs.with_name("built.jsonl")),
            "reward": {"reward": 1.0},
        },
    }

    def write(verb: str, changes: dict[str, Any] | None = None) -> Path:
        path = tmp_path / f"{verb}.yaml"
        path.write_text(yaml.safe_dump(_merge(valid[verb], changes or {})))
        return path

    return write


@pytest.fixture
def online(tmp_path, tiny_sd3, tiny_sd) -> Callable[..., Path]:
    """``online("awm", {"run": {"steps": 4}})`` writes a small config that trains on own samples, with changes on top.

    Two rounds of one update on 2 prompts x 4 samples of 4 steps. What trains on DDIM steps is Stable Diffusion 1,
    everything else SD3.
    """
    names = {"ddpo": ("sd", tiny_sd), "d3po": ("sd", tiny_sd)}

    def write(method: str, changes: dict[str, Any] | None = None) -> Path:
        family, folder = names.get(method, ("sd3", tiny_sd3))
        valid = {
            "model": {"family": family, "path": str(folder), "device": "cpu", "lora": {"rank": 2}},
            "online": {
                "prompts": {"source": "shapes:train", "limit": 6},
                "groups": 2,
                "samples": 4,
                "sampling": {"steps": 4, "batch": 8},
                "scorers": [{"name": "picture", "label": "contrast", "params": {"metric": "contrast"}}],
            },
            "method": {"name": method},
            "optim": {"name": "adamw", "lr": 1e-3},
            "run": {"dir": str(tmp_path / "run"), "steps": 2, "batch": 4},
        }
        path = tmp_path / "online.yaml"
        path.write_text(yaml.safe_dump(_merge(valid, changes or {})))
        return path

    return write


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = copy.deepcopy(base)
    for key, value in changes.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


@pytest.fixture
def refused(cli) -> Callable[..., str]:
    """``refused("train", path, names=["run.dir"])`` expects one clear line that names those things, and exit code 2."""

    def run(*words: object, names: Iterable[object]) -> str:
        outcome = cli(*words)
        return assert_one_line(outcome.code, outcome.err, names)

    return run


def assert_one_line(code: int | None, err: str, names: Iterable[object]) -> str:
    assert code == 2, f"exit code {code}: {err}"
    assert err.startswith("diffalign: error: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    missing = [name for name in map(str, names) if name not in err]
    assert not missing, f"{missing} not in: {err}"
    return err


class Warm:
    """Runs command lines in processes of their own: forks of one that has imported the slow libraries already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        pipeline = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
        self.context.set_forkserver_preload(["diffalign.quickstart", pipeline, "accelerate", "peft"])

    def _start(self, words: Iterable[object], first: str) -> Any:
        streams = "".join(
            f"os.dup2(os.open({str(self.folder / name)!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), {number})\n"
            for number, name in ((1, "out"), (2, "err"))
        )
        call = f"from diffalign.cli import main\nsys.exit(main({[str(word) for word in words]!r}))\n"
        process = self.context.Process(target=exec, args=(f"import os, sys\n{streams}{first}\n{call}", {}))
        process.start()
        return process

    def run(self, *words: object, first: str = "") -> tuple[int | None, str]:
        """The exit code and what went to stderr; ``first`` is Python that runs before the command line."""
        process = self._start(words, first)
        process.join(120)
        return process.exitcode, (self.folder / "err").read_text()

    def kill(self, ready: Callable[[], bool], delay: float, *words: object) -> None:
        """SIGKILL the command line ``delay`` seconds after it is ready; one that ends before then fails the test."""
        process = self._start(words, "")
        try:
            deadline = time.monotonic() + 120
            while process.is_alive() and not ready():
                assert time.monotonic() < deadline, "never ready"
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            process.kill()
            process.join(60)
        err = (self.folder / "err").read_text()
        assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode} before it was killed: {err}"


@pytest.fixture
def warm(tmp_path_factory) -> Warm:
    """See :class:`Warm`; the process that is forked from starts once per session."""
    return Warm(tmp_path_factory.mktemp("streams"))
