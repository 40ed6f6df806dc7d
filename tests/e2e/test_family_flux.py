"""FLUX.1: tiny random dev and schnell folders, and everything we do with them against the stock pipeline."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from diffalign.families import flux
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.types import Request, Sampling
from diffalign.weights import add_lora
from diffalign.worlds.shapes.pretrain import _tokenizer

from . import tiny_parts, tiny_t5
from .stock import Recorder, assert_resumes_exactly, losses

KINDS = ("dev", "schnell")
TOKENS = {"dev": 512, "schnell": 256}
SCHEDULERS: dict[str, dict[str, Any]] = {  # as published
    "dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15},
}
SIZES = [(32, 32), (24, 40)]
PROMPTS = ["a red circle", "a blue square", "two green triangles"]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
FACTOR = 4  # pixels per latent of the tiny VAE


def _pipeline(kind: str) -> FluxPipeline:
    """Stock classes with random weights: 4 latent channels in tokens of 16, one double and two single blocks."""
    clip_tokenizer = _tokenizer()
    t5, t5_tokenizer = tiny_t5.make()
    vae = tiny_parts.vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=kind == "dev",
        axes_dims_rope=(4, 2, 2),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind])
    clip = tiny_parts.clip(CLIPTextModel, clip_tokenizer, num_hidden_layers=1)
    return FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A dev-like and a schnell-like diffusers folder, written by stock classes. Read only; copy one to change it."""
    root = tmp_path_factory.mktemp("flux")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind in KINDS:
            _pipeline(kind).save_pretrained(root / kind, safe_serialization=True)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def family(folders, kind) -> flux.Family:
    return load_family("flux", str(folders[kind]), "cpu")


@pytest.fixture
def stock(folders, kind) -> FluxPipeline:
    return load_stock(folders[kind])


def load_stock(folder: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(size: tuple[int, int]) -> torch.Tensor:
    shape = (4, size[0] // FACTOR, size[1] // FACTOR)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(r.seed)) for r in REQUESTS])


def stock_call(pipe, size, steps=3, guidance=1.0, output="pt", **options) -> torch.Tensor:
    """The stock pipeline from our initial latents; ``guidance`` is true classifier-free guidance."""
    height, width = size
    latents = pipe._pack_latents(noise(size), len(PROMPTS), 4, height // FACTOR, width // FACTOR)
    negative = {"negative_prompt": [""] * len(PROMPTS), "true_cfg_scale": guidance} if guidance != 1.0 else {}
    tokens = TOKENS["dev" if pipe.transformer.config.guidance_embeds else "schnell"]
    return pipe(
        PROMPTS, height=height, width=width, latents=latents, num_inference_steps=steps, output_type=output,
        max_sequence_length=tokens, **negative, **options,
    ).images  # fmt: skip


def unpack(pipe, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return pipe._unpack_latents(tokens, *size, FACTOR)


# --- against the stock pipeline -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_network_is_called_as_stock_calls_it(family, stock, kind, size):
    theirs, ours = Recorder(stock.transformer), Recorder(family.net)
    stock_call(stock, size)
    cond = family.encode_prompt(PROMPTS)
    assert len(theirs.calls) == 3
    for call, result in zip(theirs.calls, theirs.results, strict=True):
        x_t, t = unpack(stock, call["hidden_states"], size), call["timestep"]
        assert 0 < t.min() <= t.max() <= 1
        with torch.no_grad():
            predicted = family.predict(family.net, x_t, t, cond)
        assert (predicted - unpack(stock, result, size)).abs().max() < 1e-5
        mine = ours.calls[-1]
        assert (mine["guidance"] is None) == (call["guidance"] is None) == (kind == "schnell")
        for name in mine.keys() - {"return_dict"}:
            if mine[name] is not None:
                assert mine[name].shape == call[name].shape, name
                assert torch.allclose(mine[name], call[name], atol=1e-6), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_stock_pipeline_draws_our_images(family, stock, size, guidance):
    ours = sample_media(family, REQUESTS, Sampling(steps=4, guidance=guidance, size=size))
    theirs = stock_call(stock, size, 4, guidance)
    assert ours.shape == (3, 3, *size)
    assert ours.std() > 0.01, "the images must differ from a constant, or this test shows nothing"
    assert (ours - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(128, 160), (256, 256), (512, 512), (768, 1344), (1024, 1024)])
def test_the_grid_is_that_of_the_stock_scheduler(family, stock, kind, size):
    """With the number of tokens that the published model has at that size, whose VAE has factor 8, not 4."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = size[0] * size[1] // 256
    half = (size[0] // 2, size[1] // 2)
    for steps in (1, 4, 28):
        even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        stock.scheduler.set_timesteps(steps, sigmas=even, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
        grid = family.schedule_for(half).grid(steps)
        assert (grid - stock.scheduler.sigmas).abs().max() < 1e-6
        assert grid[0] <= 1
    assert family.schedule == family.schedule_for(None)
    if kind == "dev":
        assert family.schedule_for(half).shift == pytest.approx(math.exp(0.5 + 0.65 * (tokens - 256) / 3840))
    else:
        assert family.schedule_for(half).shift == 1.0


def test_training_times_follow_the_shift_of_the_default_size(family, kind):
    """sigmoid(mu + z): the median of the default size; what the docstring says about 512 x 512."""
    assert family.default_size == (512, 512), "the stock default of 128 latents, with this VAE of factor 4"
    mu = 1.15 if kind == "dev" else 0.0
    t = family.schedule.sample_t((20001,), torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() < 1
    assert torch.logit(t).median() == pytest.approx(mu, abs=0.03)
    assert torch.logit(t).std() == pytest.approx(1, abs=0.03)
    if kind == "dev":
        half = family.schedule_for((256, 256)).shift
        assert math.log(half / family.schedule.shift) == pytest.approx(-0.52)


@pytest.mark.parametrize("size", SIZES)
def test_the_vae_is_used_as_stock_uses_it(family, stock, size):
    from diffusers import FluxImg2ImgPipeline

    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, logvar = family.encode_media(pixels)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        image_to_image = FluxImg2ImgPipeline(**stock.components)
        theirs = image_to_image._encode_vae_image(pixels, torch.Generator().manual_seed(4))
    assert family.latents(mean, logvar, eps).shape == (2, *family.latent_shape(size))
    assert (family.latents(mean, logvar, eps) - theirs).abs().max() < 1e-5

    images, latents = (stock_call(stock, size, output=output) for output in ("pt", "latent"))
    assert (family.decode(unpack(stock, latents, size)) - images).abs().max() < 1e-5


def test_the_embedded_guidance_is_one_attribute(folders):
    family, stock = load_family("flux", str(folders["dev"]), "cpu"), load_stock(folders["dev"])
    assert family.guidance == 3.5
    before = sample_media(family, REQUESTS, Sampling(steps=2, size=(32, 32)))
    family.guidance = 1.0
    ours = sample_media(family, REQUESTS, Sampling(steps=2, size=(32, 32)))
    assert (ours - stock_call(stock, (32, 32), 2, guidance_scale=1.0)).abs().max() < 1e-3
    assert (ours - before).abs().max() > 1e-4


def test_dev_and_schnell_share_encoders_but_no_cache(folders, tmp_path):
    """They differ in the length of the T5 states alone, which the digest of the encoders does not see."""
    copy = shutil.copytree(folders["dev"], tmp_path / "copy")
    shutil.rmtree(copy / "transformer")
    shutil.copytree(folders["schnell"] / "transformer", copy / "transformer")
    dev, schnell = (load_family("flux", str(folder), "cpu") for folder in (folders["dev"], copy))
    assert [family.encode_prompt(PROMPTS)["states"].shape for family in (dev, schnell)] == [(3, 512, 16), (3, 256, 16)]
    assert dev.fingerprint != schnell.fingerprint


# --- training -------------------------------------------------------------------------------------------------------


def _train_config(config, folder: Path, **run: Any) -> Path:
    changes = {
        "model": {"family": "flux", "path": str(folder)},
        "data": {"size": [32, 32]},
        "optim": {"lr": 0.03},
        "run": {"steps": 3, "batch": 2, "save_every": 1, **run},
    }
    return config("train", changes)


def test_a_lora_trains_resumes_and_loads_in_the_stock_pipeline(cli, config, folders, kind, tmp_path):
    path = _train_config(config, folders[kind])
    outcome = cli("train", path)
    assert outcome.code == 0, outcome.err
    whole = tmp_path / "run"
    rows = losses(whole)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["gap"] > 0
    assert_resumes_exactly(cli, path, whole)

    stock = load_stock(folders[kind])
    before = stock_call(stock, (32, 32))
    stock.load_lora_weights(whole / "lora")
    after = stock_call(stock, (32, 32))
    adapted = load_family("flux", str(folders[kind]), "cpu", adapter=str(whole / "lora"))
    sampled = sample_media(adapted, REQUESTS, Sampling(steps=3, size=(32, 32)))
    assert (after - before).abs().max() > 0.01, "the adapter must matter, or this test shows nothing"
    assert (after - sampled).abs().max() < 1e-3


def test_full_weights_train_and_are_read_by_stock_classes(cli, config, folders, tmp_path):
    path = _train_config(config, folders["dev"])
    outcome = cli("train", path, "model.lora=null", "run.steps=1")
    assert outcome.code == 0, outcome.err
    trained = FluxTransformer2DModel.from_pretrained(tmp_path / "run" / "transformer")
    start = load_file(folders["dev"] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in trained.state_dict().items())


def test_generate_samples_other_sizes(cli, config, folders, tmp_path):
    from PIL import Image

    changes = {"model": {"family": "flux", "path": str(folders["schnell"])}, "sampling": {"size": [24, 40]}}
    outcome = cli("generate", config("generate", changes))
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "pool" / "media" / "000000-0.png") as image:
        assert image.size == (40, 24)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_sizes_that_are_not_whole_patches_are_refused(refused, config, folders):
    changes = {"model": {"family": "flux", "path": str(folders["dev"])}, "sampling": {"size": [32, 36]}}
    refused("generate", config("generate", changes), names=["32x36", "multiples of 8"])


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _no_t5(folder: Path) -> None:
    _edit(folder / "model_index.json", text_encoder_2=[None, None], tokenizer_2=[None, None])


def _fill(folder: Path) -> None:
    shutil.rmtree(folder / "transformer")
    FluxTransformer2DModel(
        in_channels=24, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 2, 2),
    ).save_pretrained(folder / "transformer")  # fmt: skip


def _other_scheduler(folder: Path) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    _edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"])
    FlowMatchHeunDiscreteScheduler().save_pretrained(folder / "scheduler")


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (_no_t5, ["model.path", "without text_encoder_2, tokenizer_2", "flux needs it"]),
        (_fill, ["model.path", "24 channels", "16", "Fill"]),
        (_other_scheduler, ["model.path", "scheduler", "FlowMatchEulerDiscreteScheduler"]),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), ["model.path", "text_encoder_2"]),
        (lambda folder: (folder / "model_index.json").unlink(), ["model.path", "model_index.json"]),
    ],
    ids=["no-t5", "fill", "scheduler", "no-folder", "no-index"],
)
def test_a_bad_folder_is_one_line(refused, config, folders, tmp_path, spoil, names):
    folder = shutil.copytree(folders["dev"], tmp_path / "model")
    spoil(folder)
    refused("generate", config("generate", {"model": {"family": "flux", "path": str(folder)}}), names=names)


def test_another_model_is_one_line(refused, config, tiny_sd3):
    names = ["model.path", "transformer", "SD3Transformer2DModel"]
    refused("generate", config("generate", {"model": {"family": "flux", "path": str(tiny_sd3)}}), names=names)


# --- the published model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "billions"), [("dev", 11.90), ("schnell", 11.89)])
def test_lora_targets_resolve_in_the_published_network(kind, billions):
    blocks = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24}
    text = {"joint_attention_dim": 4096, "pooled_projection_dim": 768}
    with torch.device("meta"):
        net = FluxTransformer2DModel(in_channels=64, guidance_embeds=kind == "dev", **blocks, **text)
        assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
        add_lora(net, 2, None, flux.Family.lora_targets)
    found = [name.partition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A." in name]
    assert len(found) == 19 * 12 + 38 * 3
    assert all(any(name.endswith(target) for name in found) for target in flux.Family.lora_targets)
