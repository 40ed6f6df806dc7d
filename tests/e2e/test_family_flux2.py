"""FLUX.2: tiny random dev and klein folders, and everything we do with them against the stock pipelines."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from diffalign.families import flux2
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.types import Request, Sampling
from diffalign.weights import add_lora

from . import tiny_chat
from .stock import Recorder, assert_resumes_exactly, losses

KINDS = ("dev", "klein", "klein-base")
SIZES = [(32, 32), (24, 40)]
PROMPTS = ["a red circle", "a blue square", "two [IMG]green triangles"]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
PATCH = 8  # pixels per token with the tiny VAE


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()  # type: ignore[union-attr]
    vae.bn.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return vae


def _pipeline(kind: str) -> Any:
    """Stock classes with random weights: 16 channels per token, one double and two single blocks."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # as published
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        guidance_embeds=kind == "dev",
        axes_dims_rope=(2, 2, 2, 2),
    )
    if kind == "dev":
        processor = tiny_chat.pixtral_processor([*PROMPTS, SYSTEM_MESSAGE])
        return Flux2Pipeline(scheduler, _vae(), tiny_chat.mistral3(processor, 31), processor, transformer)
    tokenizer = tiny_chat.qwen_tokenizer([*PROMPTS, "user assistant"])
    encoder = tiny_chat.qwen3(tokenizer, 28)
    return Flux2KleinPipeline(scheduler, _vae(), encoder, tokenizer, transformer, is_distilled=kind == "klein")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders like dev's, the distilled klein's and klein base's, written by stock classes. Read only."""
    root = tmp_path_factory.mktemp("flux2")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in KINDS:
            _pipeline(kind).save_pretrained(root / kind, safe_serialization=True)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(folders, kind) -> flux2.Family:
    return load_family("flux2", str(folders[kind]), "cpu")


@pytest.fixture(scope="module")
def stock(folders, kind) -> Any:
    return load_stock(folders, kind)


def load_stock(folders: dict[str, Path], kind: str) -> Any:
    pipe = (Flux2Pipeline if kind == "dev" else Flux2KleinPipeline).from_pretrained(folders[kind])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(size: tuple[int, int]) -> torch.Tensor:
    shape = (16, size[0] // PATCH, size[1] // PATCH)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in REQUESTS])


def stock_call(pipe, size, steps=3, guidance=1.0, output="pt") -> torch.Tensor:
    """The stock pipeline from our initial latents; ``guidance`` is what it calls ``guidance_scale``."""
    return pipe(
        prompt=PROMPTS, height=size[0], width=size[1], latents=noise(size), num_inference_steps=steps,
        guidance_scale=guidance, output_type=output,
    ).images  # fmt: skip


def spread(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, (size[0] // PATCH, size[1] // PATCH))


# --- against the stock pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_network_is_called_as_stock_calls_it(family, stock, kind, size):
    theirs, ours = Recorder(stock.transformer), Recorder(family.net)
    family.guidance = 4.0
    stock_call(stock, size, guidance=4.0)
    branches = 2 if kind == "klein-base" else 1
    assert len(theirs.calls) == 3 * branches
    conds = [family.encode_prompt(PROMPTS), family.encode_prompt([""] * len(PROMPTS))]
    for index, (call, result) in enumerate(zip(theirs.calls, theirs.results, strict=True)):
        x_t, t, cond = spread(call["hidden_states"], size), call["timestep"], conds[index % branches]
        assert 0 < t.min() <= t.max() <= 1
        with torch.no_grad():
            predicted, wrong = (
                family.predict(family.net, x_t, t, {name: value.roll(by, 0) for name, value in cond.items()})
                for by in (0, 1)
            )
        assert (predicted - spread(result, size)).abs().max() < 1e-5
        if index % branches == 0:
            assert (wrong - predicted).abs().max() > 1e-4, "the prompt must matter, or this test shows nothing"
        mine = ours.calls[-2]
        assert (mine["guidance"] is None) == (call["guidance"] is None) == (kind != "dev")
        for name in mine.keys() - {"return_dict"}:
            if mine[name] is not None:
                assert torch.allclose(mine[name].float().expand_as(call[name]), call[name].float(), atol=1e-5), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_stock_pipeline_draws_our_images(family, stock, kind, size, guidance):
    family.guidance = guidance
    mixed = guidance if kind == "klein-base" else 1.0
    ours = sample_media(family, REQUESTS, Sampling(steps=4, guidance=mixed, size=size))
    theirs = stock_call(stock, size, 4, guidance)
    assert ours.shape == (3, 3, *size)
    assert ours.std() > 0.01, "the images must differ from a constant, or this test shows nothing"
    assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(256, 256), (512, 512), (768, 1344), (1024, 1024), (2048, 2048)])
def test_the_grid_is_that_of_the_stock_scheduler(family, stock, size):
    """With the number of tokens that the published model has at that size, whose VAE has factor 8, not 4."""
    tokens = size[0] * size[1] // 256
    half = (size[0] // 2, size[1] // 2)
    for steps in (1, 4, 28, 50, 250):
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        stock.scheduler.set_timesteps(steps, sigmas=even, mu=compute_empirical_mu(tokens, steps))
        grid = family.schedule_for(half).grid(steps)
        assert (grid - stock.scheduler.sigmas).abs().max() < 1e-6
        assert grid[0] <= 1


def test_training_times_follow_the_shift_of_fifty_steps(family):
    """sigmoid(mu + z), and what the docstring says of mu."""
    assert family.default_size == (512, 512), "the stock default of 128 latents, with this VAE of factor 4"
    mu = compute_empirical_mu(4096, 50)
    assert mu == pytest.approx(2.02, abs=0.005)
    t = family.schedule.sample_t((20001,), torch.Generator().manual_seed(0))
    assert torch.logit(t).median() == pytest.approx(mu, abs=0.03)
    assert torch.logit(t).std() == pytest.approx(1, abs=0.03)
    plain = family.schedule.sample_t((20001,), torch.Generator().manual_seed(0), mean=-2.02)
    assert plain.median() == pytest.approx(0.5, abs=0.01)
    assert family.schedule == family.schedule_for(None) != family.schedule_for((256, 256))


def test_a_static_shift_is_taken_from_the_scheduler(folders, tmp_path):
    folder = shutil.copytree(folders["klein"], tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    stock = load_stock({"klein": folder}, "klein")
    stock_call(stock, (32, 32), 5)
    grid = load_family("flux2", str(folder), "cpu").schedule_for((32, 32)).grid(5)
    torch.testing.assert_close(grid, stock.scheduler.sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_vae_is_used_as_stock_uses_it(family, stock, size):
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, logvar = family.encode_media(pixels)
    with torch.no_grad():
        theirs = stock._encode_vae_image(pixels, None)
    ours = family.latents(mean, logvar)
    assert ours.shape == (2, *family.latent_shape(size))
    assert (ours - theirs).abs().max() < 1e-5
    pairs = family.latents(mean[:, None], logvar[:, None], torch.zeros_like(mean)[:, None])
    assert torch.equal(pairs[:, 0], ours)
    torch.testing.assert_close(family.to_vae(ours), mean, rtol=0, atol=1e-5)

    images = stock_call(stock, size)
    latents = stock_call(stock, size, output="latent")  # of dev: tokens; of klein: of the VAE
    latents = spread(latents, size) if latents.ndim == 3 else family.to_network(latents)
    assert (family.decode(latents) - images).abs().max() < 1e-5


def test_dev_and_klein_are_told_apart_by_their_index(folders):
    found = {kind: type(load_family("flux2", str(folder), "cpu")) for kind, folder in folders.items()}
    assert found == {"dev": flux2.Family, "klein": flux2.Klein, "klein-base": flux2.Klein}


# --- training -------------------------------------------------------------------------------------------------------


def _train_config(config, folder: Path, **run: Any) -> Path:
    changes = {
        "model": {"family": "flux2", "path": str(folder)},
        "data": {"size": [32, 32]},
        "optim": {"lr": 0.1},
        "run": {"steps": 3, "batch": 2, "save_every": 1, **run},
    }
    return config("train", changes)


@pytest.mark.parametrize("kind", ["dev", "klein-base"])
def test_a_lora_trains_resumes_and_loads_in_the_stock_pipeline(cli, config, folders, kind, tmp_path):
    path, whole = _train_config(config, folders[kind]), tmp_path / "run"
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    rows = losses(whole)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["gap"] > 0
    assert_resumes_exactly(cli, path, whole)

    stock = load_stock(folders, kind)
    guidance = 4.0 if kind == "dev" else 1.0
    before = stock_call(stock, (32, 32), guidance=guidance)
    stock.load_lora_weights(whole / "lora")
    after = stock_call(stock, (32, 32), guidance=guidance)
    adapted = load_family("flux2", str(folders[kind]), "cpu", adapter=str(whole / "lora"))
    sampled = sample_media(adapted, REQUESTS, Sampling(steps=3, size=(32, 32)))
    assert (after - before).abs().max() > 0.01, "the adapter must matter, or this test shows nothing"
    assert (after - sampled).abs().max() < 1e-3


def test_generate_samples_other_sizes(cli, config, folders, tmp_path):
    from PIL import Image

    changes = {"model": {"family": "flux2", "path": str(folders["klein"])}, "sampling": {"size": [24, 40]}}
    outcome = cli("generate", config("generate", changes))
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "pool" / "media" / "000000-0.png") as image:
        assert image.size == (40, 24)


# --- refusals -------------------------------------------------------------------------------------------------------


def _other_channels(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, guidance_embeds=False, axes_dims_rope=(2, 2, 2, 2),
    ).save_pretrained(folder / "transformer")  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (_other_channels, ["model.path", "32 channels", "16", "FLUX.2 dev and klein"]),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), ["model.path", "text_encoder"]),
        (lambda folder: (folder / "model_index.json").write_text("[]"), ["model.path", "model_index.json"]),
    ],
    ids=["channels", "no-folder", "no-index"],
)
def test_a_bad_folder_is_one_line(refused, config, folders, tmp_path, spoil, names):
    folder = shutil.copytree(folders["klein"], tmp_path / "model")
    spoil(folder)
    refused("generate", config("generate", {"model": {"family": "flux2", "path": str(folder)}}), names=names)


def test_sizes_and_models_that_do_not_fit_are_one_line(refused, config, folders, tiny_sd3):
    changes = {"model": {"family": "flux2", "path": str(folders["dev"])}, "sampling": {"size": [32, 36]}}
    refused("generate", config("generate", changes), names=["32x36", "multiples of 8"])
    names = ["model.path", "transformer", "SD3Transformer2DModel"]
    refused("generate", config("generate", {"model": {"family": "flux2", "path": str(tiny_sd3)}}), names=names)


# --- the published models -------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "dev": {},
    "klein-9B": {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    "klein-4B": {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    },
}  # fmt: skip


@pytest.mark.parametrize(("model", "billions"), [("dev", 32.22), ("klein-9B", 9.08), ("klein-4B", 3.88)])
def test_lora_targets_resolve_in_the_published_networks(model, billions):
    with torch.device("meta"):
        net = Flux2Transformer2DModel(guidance_embeds=model == "dev", **PUBLISHED[model])
        count = sum(p.numel() for p in net.parameters()) / 1e9
        assert count == pytest.approx(billions, abs=0.01)
        add_lora(net, 2, None, flux2.Family.lora_targets)
    found = [name.partition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A." in name]
    config: Any = net.config
    assert len(found) == 12 * config.num_layers + 2 * config.num_single_layers
    assert config.num_single_layers <= 48
