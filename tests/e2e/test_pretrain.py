"""The recipe of the shipped weights runs from nothing, resumes, and leaves what the family loads."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_pretraining_from_nothing(tmp_path):
    from diffalign.families.base import load_family
    from diffalign.generate import sample_media
    from diffalign.types import Request, Sampling

    short = ["--vae-steps", "3", "--images", "500"]
    for steps in ("2", "3"):  # the second call continues the first
        command = ["-m", "diffalign.worlds.shapes.pretrain", "--out", str(tmp_path), *short, "--steps", steps]
        subprocess.run([sys.executable, *command], check=True, timeout=600)
    logged = [json.loads(line) for line in (tmp_path / "transformer.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "heldout" in line] == [2, 3]
    family = load_family("sd3", str(tmp_path / "weights"))
    images = sample_media(family, [Request("a photo of a red circle", 0)], Sampling(steps=2))
    assert images.shape == (1, 3, 32, 32)
    assert images.isfinite().all()
    assert "/" not in json.loads((tmp_path / "weights/vae/config.json").read_text())["_name_or_path"]
