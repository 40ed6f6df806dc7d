"""SD3 with its T5: the stock pipeline's conditions, denoiser calls and images are ours."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.types import Request, Sampling

from . import tiny_t5

PROMPTS = ["a red circle", "a blue square", ""]
REQUESTS = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tiny_sd3, tmp_path_factory) -> Path:
    """The tiny SD3 with a T5 beside its two CLIPs."""
    out = tmp_path_factory.mktemp("sd3") / "with_t5"
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder, tokenizer = tiny_t5.make()
    pipe.register_modules(text_encoder_3=encoder, tokenizer_3=tokenizer)
    pipe.save_pretrained(out, safe_serialization=True)
    return out


@pytest.fixture(scope="module")
def stock(folder) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_and_denoiser_calls_are_the_stock_pipeline_s(folder, stock, guidance):
    family = load_family("sd3", str(folder), "cpu")
    assert family.t5_tokens == 256
    calls = []
    handle = stock.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(r.seed)) for r in REQUESTS])
    options = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "pt"}
    try:
        theirs = stock(PROMPTS, latents=noise, **options).images
    finally:
        handle.remove()
    ours = sample_media(family, REQUESTS, Sampling(steps=4, guidance=guidance))
    assert (ours - theirs).abs().max() < 1e-4
    cond = family.encode_prompt(PROMPTS)
    assert len(calls) == 4
    for kwargs, output in calls:
        states, t = kwargs["encoder_hidden_states"][-3:], kwargs["timestep"][-3:]
        torch.testing.assert_close(cond["states"], states, rtol=0, atol=1e-6)
        found = family.predict(family.net, kwargs["hidden_states"][-3:], family.schedule.unit(t), cond)
        torch.testing.assert_close(found, output[-3:], rtol=0, atol=1e-5)


def test_t5_matters_and_is_part_of_the_cache_key(folder, tiny_sd3):
    with_t5, without = (load_family("sd3", str(path), "cpu") for path in (folder, tiny_sd3))
    assert with_t5.fingerprint != without.fingerprint
    assert with_t5.encode_prompt(["a"])["states"].shape[1] == without.encode_prompt(["a"])["states"].shape[1] + 256
    images = [sample_media(family, REQUESTS, Sampling(steps=2)) for family in (with_t5, without)]
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_it_trains_and_resumes(folder, config, tmp_path):
    from diffalign.cli import main

    path = str(config("train", {"model": {"path": str(folder)}, "run": {"steps": 2, "save_every": 1}}))
    assert main(["train", path]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert main(["train", path, "run.steps=3", "--resume", "latest"]) == 0
