"""Stable Diffusion 1, 2 and XL against the stock pipelines, on tiny random checkpoints written by stock classes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import UserError
from diffalign.families.base import family_class, load_family
from diffalign.families.sd import discrete_schedule
from diffalign.generate import sample_media
from diffalign.types import Request, Sampling
from diffalign.weights import add_lora
from diffalign.worlds.shapes.pretrain import TOKENS, _tokenizer

from . import tiny_parts

PROMPTS = ["a photo of a red circle", "a photo of a blue square"]
LEVELS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
HUB = {**LEVELS, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}  # whatever the scheduler
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True}
SCHEDULERS = {
    "sd1": diffusers.PNDMScheduler.from_config(HUB),
    "sd2": diffusers.DDIMScheduler.from_config({**HUB, **ZERO_SNR}),
    "sdxl": diffusers.EulerDiscreteScheduler.from_config(HUB),
}
MODELS = list(SCHEDULERS)


def _encoder(kind: Any, tokenizer: Any, width: int) -> Any:
    sizes = {"hidden_size": width, "projection_dim": 6, "max_position_embeddings": TOKENS, "num_hidden_layers": 3}
    return tiny_parts.clip(kind, tokenizer, initializer_factor=8.0, **sizes)


def _pipeline(model: str) -> Any:
    """32x32 images and 4x8x8 latents."""
    tokenizer = _tokenizer()
    vae = tiny_parts.vae(scaling_factor=0.7)
    big = model == "sdxl"
    added: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 + 6 * 4,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        use_linear_projection=model != "sd1",
        cross_attention_dim=8 + 4 * big,
        **(added if big else {}),
    )
    shared = {"vae": vae, "unet": unet, "scheduler": SCHEDULERS[model], "tokenizer": tokenizer}
    first = _encoder(CLIPTextModel, tokenizer, 8)
    if not big:
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**shared, text_encoder=first, **unused)
    second = _encoder(CLIPTextModelWithProjection, tokenizer, 4)
    return diffusers.StableDiffusionXLPipeline(
        **shared, text_encoder=first, text_encoder_2=second, tokenizer_2=tokenizer
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder per model; SD1's lists a safety checker that was deleted, and no image encoder, which is younger."""
    root = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for model in MODELS:
            _pipeline(model).save_pretrained(root / model, safe_serialization=True)
    index = root / "sd1/model_index.json"
    listed = {**json.loads(index.read_text()), "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    del listed["image_encoder"]
    index.write_text(json.dumps(listed))
    return {model: root / model for model in MODELS}


def name_of(model: str) -> str:
    return "sdxl" if model == "sdxl" else "sd"


def load(folders: dict[str, Path], model: str, adapter: Path | None = None) -> Any:
    return load_family(name_of(model), str(folders[model]), "cpu", adapter and str(adapter))


def stock_pipe(folders: dict[str, Path], model: str) -> Any:
    """The stock pipeline with the DDIM scheduler that model cards tell users to switch to."""
    kind = family_class(name_of(model)).pipeline_class()
    unused = {} if model == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}
    pipe = kind.from_pretrained(folders[model], **unused)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def noise(size: tuple[int, int] = (32, 32)) -> Tensor:
    shape = (4, size[0] // 4, size[1] // 4)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])


def call(pipe: Any, steps: int, guidance: float, size: tuple[int, int] = (32, 32)) -> Tensor:
    return pipe(
        PROMPTS,
        latents=noise(size),
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
    ).images


@pytest.fixture(params=MODELS)
def model(request) -> str:
    return request.param


# --- against the stock pipeline -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "size"), [(1.0, (32, 32)), (4.0, (32, 48))])
def test_the_network_gets_what_the_stock_pipeline_gives_it(folders, model, guidance, size):
    pipe, family = stock_pipe(folders, model), load(folders, model)
    seen: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]] = []

    def note(module, words, named, output):
        seen.append((*words, output[0], named["added_cond_kwargs"]))

    pipe.unet.register_forward_hook(note, with_kwargs=True)
    call(pipe, 4, guidance, size)
    assert [int(t) for _, t, *_ in seen] == [999, 749, 499, 249]
    cond = family.condition([Request(prompt, 0) for prompt in PROMPTS], size)
    if guidance > 1:
        empty = family.unconditional(cond)
        cond = {name: torch.cat([empty[name], value]) for name, value in cond.items()}
        assert bool((empty["states"] == 0).all()) == (model == "sdxl")
    other = {name: value.flip(0) for name, value in cond.items()}
    for x_t, native, theirs, added in seen:
        t = family.schedule.unit(native).expand(len(x_t))
        with torch.no_grad():
            ours, wrong = (family.predict(family.net, x_t, t, c) for c in (cond, other))
        assert (ours - theirs).abs().max() <= 1e-5
        assert (wrong - theirs).abs().max() > 1e-3, "the prompt must matter, or this test shows nothing"
        if model == "sdxl":
            assert added is not None
            assert added["time_ids"].tolist() == [[*size, 0, 0, *size]] * len(x_t)


@pytest.mark.parametrize(("steps", "guidance"), [(10, 1.0), (8, 3.0)])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_stock_pipeline_draws_our_images(folders, model, steps, guidance, sampler):
    requests = [Request(prompt, seed) for prompt, seed in zip(PROMPTS, (5, 6), strict=True)]
    ours = sample_media(load(folders, model), requests, Sampling(sampler, steps, guidance))
    theirs = call(stock_pipe(folders, model), steps, guidance)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-5, "tight enough to tell the last levels 1 and abar_0 apart"


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_sdxl_is_what_its_checkpoint_says(folders, tmp_path, zeros):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    ours = load_family("sdxl", str(folder), "cpu").encode_prompt([PROMPTS[0], ""])
    with torch.no_grad():
        theirs = stock_pipe({"sdxl": folder}, "sdxl").encode_prompt(PROMPTS[0])
    for name, value in (("states", theirs[:2]), ("pooled", theirs[2:])):
        torch.testing.assert_close(ours[name], torch.cat(value), rtol=0, atol=1e-5)
    assert bool((ours["pooled"][1] == 0).all()) == zeros


def test_images_go_in_and_out_as_through_the_stock_vae(folders, model):
    pipe, family = stock_pipe(folders, model), load(folders, model)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = family.encode_media(pixels)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
        z = posterior.sample(torch.Generator().manual_seed(1)) * pipe.vae.config.scaling_factor
        drawn = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(family.latents(mean, logvar, drawn), z, rtol=0, atol=1e-6)
        theirs = pipe.image_processor.postprocess(pipe.vae.decode(z / 0.7).sample, output_type="pt")
    torch.testing.assert_close(family.decode(z), theirs, rtol=0, atol=1e-5)
    assert next(family.vae.parameters()).dtype == torch.float32


def test_the_statistics_of_a_vae_are_used_where_it_has_them(folders, tmp_path):
    """As the stock pipeline of SDXL uses them; published fine-tunes have such a VAE."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    listed = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [2.0, 0.5, 1.5, 3.0]}
    file = folder / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **listed}))
    requests = [Request(prompt, seed) for prompt, seed in zip(PROMPTS, (5, 6), strict=True)]
    family = load({"sdxl": folder}, "sdxl")
    images = [sample_media(f, requests, Sampling("ddim", 4)) for f in (family, load(folders, "sdxl"))]
    theirs = call(stock_pipe({"sdxl": folder}, "sdxl"), 4, 1.0)
    assert (images[0] - theirs).abs().max() < 1e-5
    assert (images[1] - theirs).abs().max() > 1e-3
    z = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(family.to_vae(family.to_network(z)), z)


# --- the schedule ---------------------------------------------------------------------------------------------------


def test_targets_are_those_of_the_stock_scheduler(folders, model):
    schedule, x0 = load(folders, model).schedule, torch.ones(3, 4, 2, 2) * 0.3
    drawn, index = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 400, 999])
    stock: Any = diffusers.DDIMScheduler.from_config(SCHEDULERS[model].config)
    t = schedule.unit(index)
    torch.testing.assert_close(schedule.add_noise(x0, drawn, t), stock.add_noise(x0, drawn, index), rtol=0, atol=1e-6)
    target = schedule.target(x0, drawn, t)
    if model == "sd2":
        torch.testing.assert_close(target, stock.get_velocity(x0, drawn, index), rtol=0, atol=1e-6)
        torch.testing.assert_close(target[2], -x0[2], rtol=0, atol=1e-6)  # zero terminal SNR: all noise, v = -x0
    else:
        assert torch.equal(target, drawn)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_the_last_level_is_the_configured_one(kind, to_one):
    made = getattr(diffusers, kind).from_config({**LEVELS, "set_alpha_to_one": to_one})
    schedule = discrete_schedule(made)
    assert schedule.final == (1.0 if to_one else schedule.alphas_cumprod[0])
    assert schedule.steps == 1000


def test_a_step_count_that_does_not_divide_the_schedule_stays_close(folders):
    """The stock step then ends between two levels that the network is asked at; ours ends at the next one."""
    requests = [Request(prompt, seed) for prompt, seed in zip(PROMPTS, (5, 6), strict=True)]
    ours = sample_media(load(folders, "sd2"), requests, Sampling("ddim", 30))
    assert (ours - call(stock_pipe(folders, "sd2"), 30, 1.0)).abs().max() < 0.01


def test_samplers_for_flows_are_refused(folders):
    with pytest.raises(UserError, match=r"'dpm2' is for flow models.* use ddim"):
        sample_media(load(folders, "sd1"), [Request("x", 0)], Sampling("dpm2"))


# --- training -------------------------------------------------------------------------------------------------------


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "cpu", "memory")} for row in rows]


def test_training_writes_a_lora_that_the_stock_pipeline_loads(cli, config, folders, tmp_path, model):
    changes = {"model": {"family": name_of(model), "path": str(folders[model])}, "optim": {"lr": 0.05}}
    outcome = cli("train", config("train", changes), "run.steps=3")
    assert outcome.code == 0, outcome.err
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    trained, plain = load(folders, model, tmp_path / "run/lora"), load(folders, model)
    pipe = stock_pipe(folders, model)
    pipe.load_lora_weights(tmp_path / "run/lora")
    x_t, t, cond = noise(), torch.tensor([0.9, 0.2]), plain.condition([Request(prompt, 0) for prompt in PROMPTS], None)
    with torch.no_grad():
        ours, theirs, before = (plain.predict(net, x_t, t, cond) for net in (trained.net, pipe.unet, plain.net))
    assert (theirs - before).abs().max() > 1e-3, "the adapter must matter, or this test shows nothing"
    assert (ours - theirs).abs().max() <= 1e-6


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_resumed_training_is_bit_exact(cli, config, folders, tmp_path, model):
    path = config("train", {"model": {"family": name_of(model), "path": str(folders[model])}})
    settings = ("run.steps=4", "run.save_every=2")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli("train", path, *settings, f"run.dir={whole}").code == 0
    shutil.copytree(whole, run)
    for gone in ("checkpoint-000004", "lora"):
        shutil.rmtree(run / gone)
    assert cli("train", path, *settings, "--resume", "latest").code == 0
    assert metrics(run) == metrics(whole)
    ours, theirs = (load_file(folder / "lora/pytorch_lora_weights.safetensors") for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_folder_without_its_network_is_one_line(refused, config, folders, tmp_path, model):
    folder = shutil.copytree(folders[model], tmp_path / "model")
    shutil.rmtree(folder / "unet")
    changes = {"model": {"family": name_of(model), "path": str(folder)}}
    refused("train", config("train", changes), names=["model.path", folder, "unet"])
    (folder / "model_index.json").unlink()
    refused("train", config("train", changes), names=["model.path", folder, "model_index.json"])


@pytest.mark.parametrize(("family", "model"), [("sd", "sdxl"), ("sdxl", "sd1")])
def test_the_other_family_is_one_line(refused, config, folders, family, model):
    changes = {"model": {"family": family, "path": str(folders[model])}}
    refused("train", config("train", changes), names=["model.path", folders[model]])


def test_a_refiner_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(
        json.dumps({**json.loads(index.read_text()), "text_encoder": [None, None], "tokenizer": [None, None]})
    )
    with pytest.raises(UserError, match="refiner"):
        load_family("sdxl", str(folder), "cpu")


def test_schedulers_and_networks_of_another_kind_are_one_line(folders, tmp_path):
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    clean = diffusers.DDIMScheduler(**LEVELS, prediction_type="sample")
    for scheduler, named in ((flow, "FlowMatchEuler"), (clean, "prediction 'sample'")):
        with pytest.raises(UserError, match=named):
            discrete_schedule(scheduler)
    folder = shutil.copytree(folders["sd1"], tmp_path / "model")
    inpainting = diffusers.UNet2DConditionModel.from_config(
        diffusers.UNet2DConditionModel.load_config(folder / "unet"), in_channels=9
    )
    inpainting.save_pretrained(folder / "unet")
    with pytest.raises(UserError, match="reads 9 channels, a latent has 4"):
        load_family("sd", str(folder), "cpu")


# --- the published sizes --------------------------------------------------------------------------------------------

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("name", "published", "parameters", "adapted"),
    [("sd", SD15, 859_520_964, 16 * 2 * 4), ("sdxl", SDXL, 2_567_463_684, 70 * 2 * 4)],
)
def test_published_sizes_and_what_a_lora_adapts(name, published, parameters, adapted):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**published)
        assert sum(p.numel() for p in unet.parameters()) == parameters
        add_lora(unet, 4, 4, family_class(name).lora_targets)
    found = [key.removesuffix(".lora_A.default.weight") for key, _ in unet.named_parameters() if "lora_A" in key]
    assert len(found) == adapted
    assert {key.rpartition("attn")[2].partition(".")[2] for key in found} == {"to_q", "to_k", "to_v", "to_out.0"}
