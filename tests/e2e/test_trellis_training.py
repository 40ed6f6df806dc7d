"""Shapes from images through the command line: sample, train on pairs, resume, sample again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign import mesh
from diffalign import records as store

from . import tiny_trellis
from .stock import assert_resumes_exactly


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trellis") / "image"
    tiny_trellis.write(out)
    return out


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Two images to make shapes from, one with transparency."""
    rng = np.random.default_rng(0)
    rows = []
    for name, mode, channels in (("a", "RGB", 3), ("b", "RGBA", 4)):
        Image.fromarray(rng.integers(0, 255, (20, 24, channels), dtype=np.uint8), mode).save(tmp_path / f"{name}.png")
        rows.append(store.Record(id=name, prompt="", condition=f"{name}.png"))
    store.write(tmp_path / "prompts.jsonl", rows)
    return tmp_path / "prompts.jsonl"


def model(folder: Path) -> dict:
    return {"family": "trellis", "path": str(folder), "device": "cpu"}


def test_from_images_to_a_tuned_model(cli, config, folder, prompts, tmp_path):
    sampling = {"steps": 2, "guidance": 3.0, "batch": 3}
    path = config("generate", {"model": model(folder), "prompts": {"source": str(prompts)}, "sampling": sampling})
    outcome = cli("generate", path)
    assert outcome.code == 0, outcome.err
    made = list(store.read(tmp_path / "pool/records.jsonl"))
    assert [len(record.candidates) for record in made] == [2, 2]
    pairs = []
    for record in made:
        assert (tmp_path / "pool" / str(record.condition)).is_file()
        grids = [mesh.read_occupancy(tmp_path / "pool" / str(c.sample)) for c in record.candidates]
        assert not np.array_equal(*grids)
        for candidate, grid in zip(record.candidates, grids, strict=True):
            vertices, faces = mesh.read_mesh((tmp_path / "pool" / str(candidate.sample)).with_suffix(".ply"))
            assert grid.shape == (8, 8, 8)
            assert len(faces) == len(mesh.triangulate(grid)[1])
            assert np.abs(vertices).max() <= 0.5
        rewarded = [c.model_copy(update={"labels": {"reward": float(k)}}) for k, c in enumerate(record.candidates)]
        pairs.append(record.model_copy(update={"candidates": rewarded}))
    store.write(tmp_path / "pool/pairs.jsonl", pairs)

    trained = config(
        "train",
        {
            "model": {**model(folder), "lora": {"rank": 2}},
            "data": {"records": str(tmp_path / "pool/pairs.jsonl")},
            "method": {"name": "dso-dpo", "objective": {"beta": 500.0}},
            "run": {"batch": 2, "steps": 4, "save_every": 2, "keep": 9},
        },
    )
    assert cli("train", trained).code == 0
    assert_resumes_exactly(cli, trained, tmp_path / "run", weights="lora/adapter_model.safetensors")
    again = cli("generate", path, f"model.adapter={tmp_path / 'run/lora'}", f"out={tmp_path / 'tuned'}")
    assert again.code == 0, again.err
    assert len(list((tmp_path / "tuned/media").glob("*.npz"))) == 4


def test_without_an_image_it_is_one_line(refused, config, folder):
    refused("generate", config("generate", {"model": model(folder)}), names=["trellis", "condition image"])
