"""Wan: tiny random folders of every published kind, and what we do with them against the stock pipeline."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from diffalign.config import TrainConfig
from diffalign.families import wan
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.methods import resolve
from diffalign.predict import predict, sketch
from diffalign.records import Candidate, Record
from diffalign.types import Sampling
from diffalign.weights import add_lora

from . import tiny_wan
from .stock import Recorder
from .tiny_wan import BOUNDARY, KINDS, MEANS, PROMPTS, REQUESTS, SHIFT, STDS, noise, pair, stock_call

SIZES = [(5, 16, 16), (9, 32, 16)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Read only; copy them to change them."""
    return tiny_wan.save(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def folder(folders) -> Path:
    return folders["2.1"]


# --- against the stock pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_networks_are_called_as_stock_calls_them(folders, kind, guidance):
    family, stock = pair(folders[kind])
    theirs = [Recorder(net) for net in (stock.transformer, stock.transformer_2) if net is not None]
    size, branches = (9, 32, 16), 1 if guidance == 1.0 else 2
    stock_call(stock, noise(family, size), size, guidance=guidance)
    assert all(recorder.calls for recorder in theirs)
    assert sum(len(recorder.calls) for recorder in theirs) == 4 * branches
    conds = [family.encode_prompt(PROMPTS), family.encode_prompt([""] * len(PROMPTS))]
    for recorder in theirs:
        for index, (call, result) in enumerate(zip(recorder.calls, recorder.results, strict=True)):
            x_t, cond = call["hidden_states"], conds[index % branches]
            assert call["timestep"].ndim == (2 if kind == "ti2v" else 1)
            t = call["timestep"].reshape(len(x_t), -1)[:, 0] / 1000
            with torch.no_grad():
                predicted, wrong = (
                    family.predict(family.net, x_t, t, {"states": cond["states"].roll(by, 0)}) for by in (0, 1)
                )
            assert (predicted - result).abs().max() < 1e-5
            torch.testing.assert_close(cond["states"], call["encoder_hidden_states"], rtol=0, atol=1e-5)
            if index % branches == 0:
                assert (wrong - predicted).abs().max() > 1e-4, "the prompt must matter, or this test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_stock_pipeline_draws_our_clips(folders, kind, size, guidance):
    family, stock = pair(folders[kind])
    ours = sample_media(family, REQUESTS, Sampling(steps=4, guidance=guidance, size=size))
    theirs = stock_call(stock, noise(family, size), size, 4, guidance).transpose(1, 2)
    assert ours.shape == (3, 3, *size)
    assert ours.std() > 0.01, "the clips must differ from a constant, or this test shows nothing"
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["2.1", "ti2v"])
@pytest.mark.parametrize("size", SIZES)
def test_the_vae_is_used_as_stock_uses_it(folders, kind, size):
    family, stock = pair(folders[kind])
    clips = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, logvar = family.encode_media(clips)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    shift, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (MEANS, STDS))
    with torch.no_grad():
        theirs = (stock.vae.encode(clips).latent_dist.sample(torch.Generator().manual_seed(4)) - shift) / std
    ours = family.latents(mean, logvar, eps)
    assert ours.shape == (2, *family.latent_shape(size))
    assert (ours - theirs).abs().max() < 1e-5
    pairs = family.latents(mean[:, None], logvar[:, None], eps[:, None])
    assert torch.equal(pairs[:, 0], ours)

    clip, latents = (stock_call(stock, noise(family, size), size, output=output) for output in ("pt", "latent"))
    assert (family.decode(latents) - clip.transpose(1, 2)).abs().max() < 1e-5


def test_states_end_in_zeros_after_the_prompt(folder):
    family = load_family("wan", str(folder), "cpu")
    states = family.encode_prompt(["ab", "ab ab"])["states"]
    assert states.shape == (2, 512, 16)
    lengths = (states != 0).any(-1).sum(1).tolist()
    assert 1 < lengths[0] < lengths[1] < 10
    assert torch.equal(family.encode_prompt(["ab"])["states"], states[:1])


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
def test_the_grid_is_that_of_the_stock_euler_scheduler(folder, steps):
    family, stock = pair(folder)
    stock.scheduler.set_timesteps(steps)
    assert (family.schedule.grid(steps) - stock.scheduler.sigmas).abs().max() < 1e-6
    euler = WanPipeline.from_pretrained(folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT))
    assert wan.Family(euler, "here", torch.device("cpu")).schedule == family.schedule


def test_of_two_experts_the_one_for_high_noise_trains(folders):
    family = load_family("wan", str(folders["a14b"]), "cpu")
    generator = torch.Generator().manual_seed(0)
    t = family.schedule.sample_t((4000,), generator)
    free = load_family("wan", str(folders["2.1"]), "cpu").schedule.sample_t((40000,), generator)
    kept = free[free >= BOUNDARY]
    assert t.min() >= BOUNDARY
    assert t.mean().item() == pytest.approx(kept.mean().item(), abs=2e-3)
    assert t.std().item() == pytest.approx(kept.std().item(), abs=2e-3)

    x_t, cond = noise(family, (5, 16, 16)), family.encode_prompt(PROMPTS)
    mixed = torch.tensor([0.9, 0.2, BOUNDARY])
    with torch.no_grad():
        found = family.predict(family.net, x_t, mixed, cond)
        stock = [net(x_t, mixed * 1000, cond["states"]).sample for net in (family.net, family.low_noise)]
    torch.testing.assert_close(found, torch.stack([stock[0][0], stock[1][1], stock[0][2]]), rtol=0, atol=1e-5)
    assert family.fingerprint == load_family("wan", str(folders["a14b"]), "cpu").fingerprint
    assert not any(p.requires_grad for p in family.low_noise.parameters())


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ([16, 16], ["frames, height and width"]),
        ([6, 16, 16], ["6x16x16", "multiple of 4 and one more"]),
        ([0, 16, 16], ["multiple of 4 and one more"]),
        ([5, 16, 20], ["16x20", "multiples of 8"]),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(refused, config, folder, size, words):
    model = {"family": "wan", "path": str(folder)}
    refused("generate", config("generate", {"model": model, "sampling": {"size": size}}), names=words)


@pytest.mark.parametrize(
    ("part", "made", "words"),
    [
        ("scheduler", partial(UniPCMultistepScheduler), ["scheduler", "flow sigmas"]),
        ("scheduler", partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True), ["static shift"]),
        ("transformer", partial(WanTransformer3DModel.from_config, in_channels=9), ["9 channels", "text-to-video"]),
        ("model_index", None, ["boundary_ratio", "transformer_2"]),
    ],
)
def test_models_of_another_task_are_one_line(refused, config, folder, tmp_path, part, made, words):
    own = shutil.copytree(folder, tmp_path / "model")
    if part == "transformer":
        settings = WanTransformer3DModel.load_config(own / part)
        shutil.rmtree(own / part)
        made(settings).save_pretrained(own / part)
    elif made is not None:
        made().save_pretrained(own / part)
    else:
        index = (own / "model_index.json").read_text()
        (own / "model_index.json").write_text(index.replace('"boundary_ratio": null', '"boundary_ratio": 0.875'))
    model = {"family": "wan", "path": str(own)}
    refused("generate", config("generate", {"model": model}), names=["model.path", own, *words])


# --- the published models -------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "2.1 1.3B": ({"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}, 1_418_996_800),
    "14B, and each expert of 2.2 A14B": ({}, 14_288_491_584),
    "2.2 TI2V-5B": (
        {"in_channels": 48, "out_channels": 48, "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336},
        4_999_787_712,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_lora_targets_resolve_in_the_published_networks(name):
    changes, count = PUBLISHED[name]
    with torch.device("meta"):
        net = WanTransformer3DModel(**changes)
        assert sum(p.numel() for p in net.parameters()) == count
        add_lora(net, 2, None, wan.Family.lora_targets)
    found = [name.partition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A." in name]
    assert len(found) == net.config.num_layers * 10
    assert all(any(name.endswith(target) for name in found) for target in wan.Family.lora_targets)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_predicted_from_the_configs(folders, kind):
    made = TrainConfig.model_validate(
        {
            "model": {"family": "wan", "path": str(folders[kind]), "device": "cpu", "lora": {"rank": 2}},
            "data": {"records": "pairs.jsonl", "size": [9, 16, 16]},
            "method": {"name": "dense-dpo"},
            "run": {"dir": "run", "steps": 3, "batch": 4},
        }
    )
    rows = [Record(id="a", prompt="a", candidates=[Candidate(sample=f"{k}.mp4") for k in range(2)])]
    found = predict(made, resolve("dense-dpo"), rows)
    family = load_family("wan", str(folders[kind]), "cpu")
    add_lora(family.net, 2, None, family.lora_targets)
    assert found.total == sum(p.numel() for p in family.net.parameters())
    assert found.trained == sum(p.numel() for p in family.net.parameters() if p.requires_grad)
    assert found.forward.flops > 0
    blank = sketch(made.model).blank_condition()
    assert {n: v.shape for n, v in blank.items()} == {n: v.shape for n, v in family.encode_prompt(["a"]).items()}
