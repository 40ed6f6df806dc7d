"""Every shipped training config trains on a tiny model of its family; only sizes, places and scorers are changed.

Those on records take three steps, those on samples of the policy two rounds.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffalign import config as cfg
from diffalign import media
from diffalign import records as store
from diffalign.config.file import load
from diffalign.methods import needs, resolve
from diffalign.train import human, offline, online

from . import (
    people,
    test_family_flux,
    test_family_flux2,
    test_family_qwen_image,
    test_family_sd,
    tiny_control,
    tiny_trellis,
    tiny_wan,
)

ROOT = Path(__file__).parents[2] / "configs"
PLACED = {"shapes", "text", "eval", "data"}
"""Folders whose configs run on the embedded models, which other tests do."""
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.yaml")
    if path.parent.name not in PLACED and path.read_text().startswith("# diffalign train")
)
ONLINE = [path for path in CONFIGS if "online" in yaml.safe_load((ROOT / path).read_text())]
SIZES: dict[str, Any] = {"trellis": None, "wan": [5, 16, 16]}


@pytest.fixture(scope="session")
def models(tiny_sd3, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    pipelines = {
        "sd": lambda: test_family_sd._pipeline("sd1"),
        "sdxl": lambda: test_family_sd._pipeline("sdxl"),
        "flux": lambda: test_family_flux._pipeline("dev"),
        "flux2": lambda: test_family_flux2._pipeline("klein"),
        "qwen_image": test_family_qwen_image._pipeline,
        "wan": lambda: tiny_wan._pipeline("2.1"),
    }
    with torch.random.fork_rng():
        for name, make in pipelines.items():
            torch.manual_seed(0)
            make().save_pretrained(root / name, safe_serialization=True)
    tiny_trellis.write(root / "trellis")
    control = tiny_control.write(root / "control", ["sd"])["sd"]
    made = {path.name: path for path in root.iterdir() if path.name != "control"}
    return {**made, "sd3": tiny_sd3, "controlnet": control}


def write_records(folder: Path, config: cfg.TrainConfig) -> Path:
    """Four records with as many candidates and such labels as the method reads."""
    needed = needs(*resolve(**config.method.model_dump()).terms)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        made = []
        for k in range(needed.k or (3 if needed.listwise else 1)):
            labels = {label: float((i + k) % 2) if label == "desirable" else float(k) for label in needed.labels}
            name = sample(folder, config.model.family, f"{i}-{k}", rng)
            image = f"condition-{i}-{k}.png" if config.model.family == "controlnet" else None
            made.append(store.Candidate(sample=name, labels=labels, condition=image))
            picture = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
            picture.save(folder / (image or "condition.png"))
        rows.append(
            store.Record(id=str(i), prompt="a photo of a red circle", candidates=made, condition="condition.png")
        )
    store.write(folder / "records.jsonl", rows)
    return folder / "records.jsonl"


def sample(folder: Path, family: str, name: str, rng: np.random.Generator) -> str:
    """A random media file of a family's kind."""
    if family == "wan":
        media.write("video", folder / f"{name}.mp4", torch.from_numpy(rng.random((3, 5, 16, 16), dtype=np.float32)))
        return f"{name}.mp4"
    if family == "trellis":
        from diffalign import mesh

        mesh.write_occupancy(folder / f"{name}.npz", rng.random((8, 8, 8)) > 0.5)
        return f"{name}.npz"
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return f"{name}.png"


def small(path: Path, models: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A shipped config with a tiny model, and places in a folder."""
    content = yaml.safe_load((ROOT / path).read_text())
    family = content["model"]["family"]
    if content["model"].get("lora"):
        content["model"]["lora"]["rank"] = 2
    content["model"].pop("parts", None)
    content["model"] |= {"path": str(models[family]), "device": "cpu", "dtype": "fp32", "quant": None}
    content["run"] |= {"dir": str(folder / "run"), "steps": 3, "batch": 2, "accumulate": 1, "precision": "fp32"}
    if "data" in content:
        content["data"] |= {"records": str(folder / "records.jsonl"), "size": SIZES.get(family, [32, 32])}
    return content


def loaded(content: dict[str, Any], folder: Path) -> cfg.TrainConfig:
    changed = folder / "config.yaml"
    changed.write_text(yaml.safe_dump(content))
    return load(cfg.TrainConfig, str(changed))


def check(folder: Path, steps: int) -> None:
    """Finite losses, gradients, and final weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert all(row["grad_live"] > 0 for row in rows)
    assert any(folder.glob("*/*.safetensors"))
    shutil.rmtree(folder)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in ONLINE], ids=str)
def test_three_steps(models, tmp_path, path):
    config = loaded(small(path, models, tmp_path), tmp_path)
    write_records(tmp_path, config)
    offline.run(config)
    check(tmp_path / "run", 3)


@pytest.mark.parametrize("path", ONLINE, ids=str)
def test_two_rounds(models, tmp_path, path, monkeypatch):
    content = small(path, models, tmp_path)
    settings = content["online"]
    if "prompts" in settings:
        settings["prompts"] = {"source": str(tmp_path / "prompts.txt")}
        (tmp_path / "prompts.txt").write_text("a photo of a red circle\na photo of a blue square\n")
    settings |= {"groups": 2, "samples": min(settings["samples"], 3), "updates": min(settings.get("updates", 1), 2)}
    settings["sampling"] |= {"size": [32, 32], "batch": 4}
    if "window" not in settings:
        settings["sampling"]["steps"] = min(settings["sampling"]["steps"], 6)
    for scorer in settings.get("scorers", []):
        scorer |= {"label": scorer["name"], "name": "jpeg", "params": {}}
    content["run"]["steps"] = 2 * settings["updates"]
    content["optim"]["lr"] *= 1e-3  # a random network of this size would leave the hinge of Diffusion-DRO at once
    config = loaded(content, tmp_path)
    if config.data:
        write_records(tmp_path, config)
    if settings.get("source") == "human":
        monkeypatch.setattr(human, "POLL", 0.02)
        people.answering(tmp_path / "run" / "rounds", 2)
    online.run(config)
    check(tmp_path / "run", 2 * settings["updates"])


def test_no_family_is_without_a_config(models):
    from diffalign.families.base import family_names

    trained = {yaml.safe_load((ROOT / path).read_text())["model"]["family"] for path in CONFIGS}
    assert trained == set(family_names()) - {"causal_lm"}
    assert trained == set(models)
