"""Training on clips: Wan from mp4 files with a label per segment to a LoRA that the stock pipeline loads."""

import math
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from diffalign import media, records
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.records import Candidate, Record
from diffalign.types import Sampling

from . import tiny_wan
from .stock import assert_resumes_exactly, losses
from .tiny_wan import KINDS, PROMPTS, REQUESTS, load_stock, noise, stock_call


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Read only; copy them to change them."""
    return tiny_wan.save(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def folder(folders) -> Path:
    return folders["2.1"]


@pytest.fixture
def clips(tmp_path) -> Path:
    """Pairs of clips of 9 frames, a square that moves to the right or to the left, with a label per half."""
    root, rows = tmp_path / "clips", []
    for i in range(4):
        names = [f"media/{i}-{k}.mp4" for k in range(2)]
        for k, name in enumerate(names):
            clip = torch.full((3, 9, 16, 16), 0.1 * i)
            for frame in range(9):
                left = frame if k == 0 else 8 - frame
                clip[i % 3, frame, 4:10, left : left + 6] = 1.0
            media.write("video", root / name, clip)
        better = [[1.0, 0.0], [0.0, 0.0 if i else 1.0]]  # a second half that ties, but in the first record
        made = [Candidate(sample=name, labels={"reward": better[k]}) for k, name in enumerate(names)]
        rows.append(Record(id=str(i), prompt=PROMPTS[i % 3], candidates=made))
    records.write(root / "pairs.jsonl", rows)
    return root / "pairs.jsonl"


def training(folder: Path, pairs: Path, **run: Any) -> dict[str, Any]:
    return {
        "model": {"family": "wan", "path": str(folder)},
        "data": {"records": str(pairs), "size": [9, 16, 16]},
        "method": {"name": "dense-dpo"},
        "optim": {"lr": 0.05},
        "run": {"steps": 3, "batch": 2, "save_every": 1, **run},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_dense_dpo_trains_on_clips_resumes_and_loads_in_the_stock_pipeline(cli, config, folders, clips, tmp_path, kind):
    path, whole = config("train", training(folders[kind], clips)), tmp_path / "run"
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    rows = losses(whole)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["gap"] > 0
    assert_resumes_exactly(cli, path, whole)

    sampling = {"steps": 3, "batch": 4, "size": [5, 16, 16]}
    model = {"family": "wan", "path": str(folders[kind]), "adapter": str(whole / "lora")}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    changes = {"model": model, "prompts": {"source": str(prompts)}, "sampling": sampling}
    outcome = cli("generate", config("generate", changes))
    assert outcome.code == 0, outcome.err
    made = [c.sample for r in records.read(tmp_path / "pool/records.jsonl") for c in r.candidates]
    assert len(made) == 6
    for name in made:
        with av.open(str(tmp_path / "pool" / str(name))) as container:
            shapes = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
        assert shapes == [(16, 16, 3)] * 5

    size = (5, 16, 16)
    adapted = load_family("wan", str(folders[kind]), "cpu", adapter=str(whole / "lora"))
    stock = load_stock(folders[kind])
    before = stock_call(stock, noise(adapted, size), size, 3)
    stock.load_lora_weights(whole / "lora")
    after = stock_call(stock, noise(adapted, size), size, 3)
    sampled = sample_media(adapted, REQUESTS, Sampling(steps=3, size=size)).transpose(1, 2)
    assert (after - before).abs().max() > 1e-3, "the adapter must matter, or this test shows nothing"
    assert (after - sampled).abs().max() < 1e-4


def test_labels_per_segment_decide_what_is_learned(cli, config, folder, clips, tmp_path):
    """Turning the label of one half around gives other weights; the same labels per latent frame give the same."""

    def final(name: str, change) -> torch.Tensor:
        rows = [r.model_copy(update={"candidates": [change(c) for c in r.candidates]}) for r in records.read(clips)]
        own = clips.with_name(f"{name}.jsonl")
        records.write(own, rows)
        assert cli("train", config("train", training(folder, own, dir=str(tmp_path / name)))).code == 0
        return torch.tensor([row["loss"] for row in losses(tmp_path / name)])

    def labelled(candidate: Candidate, reward: list[float]) -> Candidate:
        return candidate.model_copy(update={"labels": {"reward": reward}})

    def reward(candidate: Candidate) -> list[float]:
        value = candidate.labels["reward"]
        assert isinstance(value, list)
        return value

    plain = final("plain", lambda c: c)
    spelled = final("spelled", lambda c: labelled(c, [reward(c)[0], reward(c)[0], reward(c)[1]]))
    turned = final("turned", lambda c: labelled(c, [reward(c)[0], -reward(c)[1]]))
    assert torch.equal(plain, spelled), "9 frames are 3 latent ones: the first two of the first half"
    assert not torch.equal(plain, turned)


def test_segments_that_do_not_divide_the_clip_are_refused(refused, config, folder, clips):
    rows = list(records.read(clips))
    for count, size, words in ((3, [5, 16, 16], ["3 segments", "latent"]), (2, [5, 16, 16], ["9 frames", "cut"])):
        made = [
            r.model_copy(
                update={
                    "candidates": [c.model_copy(update={"labels": {"reward": [float(k)] * count}})
                                   for k, c in enumerate(r.candidates)]
                }
            )
            for r in rows
        ]  # fmt: skip
        own = clips.with_name("own.jsonl")
        records.write(own, made)
        changes = training(folder, own)
        changes["data"]["size"] = size
        refused("train", config("train", changes), names=["record '0'", *words])
