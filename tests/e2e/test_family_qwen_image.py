"""Qwen-Image: a tiny random folder, and everything we do with it against the stock pipeline."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from diffalign.families import qwen_image
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.types import Request, Sampling
from diffalign.weights import add_lora

from . import tiny_chat
from .stock import Recorder, assert_resumes_exactly, losses

SCHEDULER: dict[str, Any] = {  # as published
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
SIZES = [(32, 32), (24, 40)]
PROMPTS = ["a red circle", "two green triangles and a small blue square to the left of them", "a small blue square"]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
FACTOR = 4  # pixels per latent of the tiny VAE


def _pipeline() -> QwenImagePipeline:
    """Stock classes with random weights: 4 latent channels in tokens of 16, two blocks."""
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 2, 2),
    )
    template = "system Describe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    tokenizer = tiny_chat.qwen_tokenizer([*PROMPTS, template, "relationships of the objects and background user"])
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return QwenImagePipeline(scheduler, vae, tiny_chat.qwen25_vl(tokenizer, 2), tokenizer, transformer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A diffusers folder written by stock classes. Read only; copy it to change it."""
    out = tmp_path_factory.mktemp("qwen_image") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _pipeline().save_pretrained(out, safe_serialization=True)
    return out


@pytest.fixture
def family(folder) -> qwen_image.Family:
    return load_family("qwen_image", str(folder), "cpu")


@pytest.fixture
def stock(folder) -> QwenImagePipeline:
    return load_stock(folder)


def load_stock(folder: Path) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(size: tuple[int, int]) -> torch.Tensor:
    shape = (4, size[0] // FACTOR, size[1] // FACTOR)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in REQUESTS])


def stock_call(pipe, size, steps=3, guidance=1.0, output="pt") -> torch.Tensor:
    """The stock pipeline from our initial latents."""
    height, width = size
    latents = pipe._pack_latents(noise(size), len(PROMPTS), 4, height // FACTOR, width // FACTOR)
    negative = {"negative_prompt": [""] * len(PROMPTS)} if guidance != 1.0 else {}
    return pipe(
        PROMPTS, height=height, width=width, latents=latents, num_inference_steps=steps, output_type=output,
        true_cfg_scale=guidance, **negative,
    ).images  # fmt: skip


def unpack(pipe, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return pipe._unpack_latents(tokens, *size, FACTOR)[:, :, 0]


# --- against the stock pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_network_is_called_as_stock_calls_it(family, stock, size, guidance):
    theirs, ours = Recorder(stock.transformer), Recorder(family.net)
    stock_call(stock, size, guidance=guidance)
    branches = 1 if guidance == 1.0 else 2
    assert len(theirs.calls) == 3 * branches
    conds = [family.encode_prompt(PROMPTS), family.encode_prompt([""] * len(PROMPTS))]
    for index, (call, result) in enumerate(zip(theirs.calls, theirs.results, strict=True)):
        x_t, t, cond = unpack(stock, call["hidden_states"], size), call["timestep"], conds[index % branches]
        assert 0 < t.min() <= t.max() <= 1
        with torch.no_grad():
            wrong, predicted = (
                family.predict(family.net, x_t, t, {name: value.roll(by, 0) for name, value in cond.items()})
                for by in (1, 0)
            )
        assert (predicted - unpack(stock, result, size)).abs().max() < 1e-5
        mine, mask = ours.calls[-1], call["encoder_hidden_states_mask"]
        assert (mask is None) == (index % branches == 1), "the empty prompts alone are of one length"
        if mask is None:
            assert mine["encoder_hidden_states_mask"] is None
        else:
            assert (wrong - predicted).abs().max() > 1e-4, "the prompt must matter, or this test shows nothing"
            assert torch.equal(mine["encoder_hidden_states_mask"], mask.bool())
        assert mine["img_shapes"] == call["img_shapes"]
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            torch.testing.assert_close(mine[name], call[name], rtol=0, atol=1e-5)


def test_padding_does_not_reach_the_prediction(family):
    """Not even that of a longer prompt of another batch, which the cache of a data set leaves behind."""
    x_t, t = noise((32, 32)), torch.tensor([0.9, 0.5, 0.2])
    cond = family.encode_prompt(PROMPTS)
    assert cond["mask"].dtype == torch.bool
    assert cond["mask"].sum(1).unique().numel() == 3
    assert (cond["states"][~cond["mask"]] == 0).all()
    more = {name: torch.cat([value, torch.ones_like(value)], 1) for name, value in cond.items()}
    more["mask"][:, cond["mask"].shape[1] :] = False
    with torch.no_grad():
        whole, wider = (family.predict(family.net, x_t, t, c) for c in (cond, more))
        alone = [
            family.predict(family.net, x_t[i : i + 1], t[i : i + 1], family.encode_prompt([prompt]))
            for i, prompt in enumerate(PROMPTS)
        ]
    assert torch.equal(whole, wider)
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_prompt_ends_where_the_stock_pipeline_cuts_it(family, stock):
    prompt = " ".join(["circle"] * 600)
    with torch.no_grad():
        states, mask = stock.encode_prompt(prompt, max_sequence_length=512)
    assert mask is None
    assert states.shape[1] == 512
    torch.testing.assert_close(family.encode_prompt([prompt])["states"], states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_stock_pipeline_draws_our_images(family, stock, size, guidance):
    ours = sample_media(family, REQUESTS, Sampling(steps=4, guidance=guidance, size=size))
    theirs = stock_call(stock, size, 4, guidance)
    assert ours.shape == (3, 3, *size)
    assert ours.std() > 0.01, "the images must differ from a constant, or this test shows nothing"
    assert (ours - theirs).abs().max() < 1e-4


def test_the_guided_prediction_has_the_norm_of_the_one_with_the_prompt(family, monkeypatch):
    guided, with_prompt = (torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    tokens = family.rescale(guided, with_prompt)[:, :, 2:4, 4:6]
    assert tokens.flatten(1).norm(dim=1).tolist() == pytest.approx(
        with_prompt[:, :, 2:4, 4:6].flatten(1).norm(dim=1).tolist()
    )
    ours = sample_media(family, REQUESTS, Sampling(steps=4, guidance=4.0, size=(32, 32)))
    monkeypatch.setattr(qwen_image.Family, "rescale", lambda self, guided, with_prompt: guided)
    plain = sample_media(family, REQUESTS, Sampling(steps=4, guidance=4.0, size=(32, 32)))
    assert (ours - plain).abs().max() > 1e-3, "the rule must matter, or the comparison of images shows nothing of it"


@pytest.mark.parametrize("size", [(256, 256), (768, 1344), (1024, 1024), (1328, 1328)])
def test_the_grid_is_that_of_the_stock_scheduler(family, stock, size):
    """With the number of tokens that the published model has at that size, whose VAE has factor 8, not 4."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    mu = calculate_shift(size[0] * size[1] // 256, 256, 8192, 0.5, 0.9)
    half = (size[0] // 2, size[1] // 2)
    for steps in (2, 8, 50):
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        stock.scheduler.set_timesteps(steps, sigmas=even, mu=mu)
        grid = family.schedule_for(half).grid(steps)
        assert (grid - stock.scheduler.sigmas).abs().max() < 1e-6
        assert grid[-2] == pytest.approx(0.02, abs=1e-6)
        assert grid[0] <= 1
    assert family.schedule_for(half).grid(1).tolist() == [1.0, 0.0]
    assert family.schedule_for(half).shift == pytest.approx(math.exp(mu))
    assert family.schedule == family.schedule_for(None)
    assert family.default_size == (512, 512), "the stock default of 128 latents, with this VAE of factor 4"


@pytest.mark.parametrize("size", SIZES)
def test_the_vae_is_used_as_stock_uses_it(family, stock, size):
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, logvar = family.encode_media(pixels)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    image_to_image = QwenImageImg2ImgPipeline(**stock.components)
    with torch.no_grad():
        theirs = image_to_image._encode_vae_image(pixels[:, :, None], torch.Generator().manual_seed(4))[:, :, 0]
    ours = family.latents(mean, logvar, eps)
    assert ours.shape == (2, *family.latent_shape(size))
    assert (ours - theirs).abs().max() < 1e-5
    pairs = family.latents(mean[:, None], logvar[:, None], eps[:, None])
    assert torch.equal(pairs[:, 0], ours)

    images, latents = (stock_call(stock, size, output=output) for output in ("pt", "latent"))
    assert (family.decode(unpack(stock, latents, size)) - images).abs().max() < 1e-5


# --- training -------------------------------------------------------------------------------------------------------


def test_a_lora_trains_resumes_and_loads_in_the_stock_pipeline(cli, config, folder, tmp_path):
    changes = {
        "model": {"family": "qwen_image", "path": str(folder)},
        "data": {"size": [32, 32]},
        "optim": {"lr": 0.1},
        "run": {"steps": 3, "batch": 2, "save_every": 1},
    }
    path, whole = config("train", changes), tmp_path / "run"
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    rows = losses(whole)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["gap"] > 0
    assert_resumes_exactly(cli, path, whole)

    stock = load_stock(folder)
    before = stock_call(stock, (32, 32))
    stock.load_lora_weights(whole / "lora")
    after = stock_call(stock, (32, 32))
    adapted = load_family("qwen_image", str(folder), "cpu", adapter=str(whole / "lora"))
    sampled = sample_media(adapted, REQUESTS, Sampling(steps=3, size=(32, 32)))
    assert (after - before).abs().max() > 0.01, "the adapter must matter, or this test shows nothing"
    assert (after - sampled).abs().max() < 1e-3


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line(refused, config, folder, tiny_sd3, tmp_path):
    model = {"family": "qwen_image", "path": str(folder)}
    refused("generate", config("generate", {"model": model, "sampling": {"size": [32, 36]}}), names=["multiples of 8"])
    other = {"family": "qwen_image", "path": str(tiny_sd3)}
    refused("generate", config("generate", {"model": other}), names=["model.path", tiny_sd3, "QwenImagePipeline"])
    editing = shutil.copytree(folder, tmp_path / "editing")
    settings = QwenImageTransformer2DModel.load_config(folder / "transformer")
    shutil.rmtree(editing / "transformer")
    QwenImageTransformer2DModel.from_config(settings, zero_cond_t=True).save_pretrained(editing / "transformer")
    model = {"family": "qwen_image", "path": str(editing)}
    refused("generate", config("generate", {"model": model}), names=["model.path", "zero_cond_t", "editing"])


# --- the published model --------------------------------------------------------------------------------------------


def test_lora_targets_resolve_in_the_published_network():
    with torch.device("meta"):
        net = QwenImageTransformer2DModel()
        assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(20.43, abs=0.005)
        add_lora(net, 2, None, qwen_image.Family.lora_targets)
    found = [name.partition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A." in name]
    assert len(found) == 60 * 12
    assert all(any(name.endswith(target) for name in found) for target in qwen_image.Family.lora_targets)
