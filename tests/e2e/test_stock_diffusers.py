"""Real parts: stock diffusers samples the embedded checkpoint and our LoRA, and its images and scores are ours."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from diffalign.errors import UserError
from diffalign.families.base import EMBEDDED, load_family
from diffalign.generate import candidate_seed, sample_media
from diffalign.types import Request, Sampling
from diffalign.weights import add_lora
from diffalign.worlds.shapes.judge import judge
from diffalign.worlds.shapes.prompts import TASKS, prompts

METADATA = [m for task in TASKS for m in prompts("heldout", task)[:4]]
REQUESTS = [Request(m["prompt"], candidate_seed(0, str(i), 0)) for i, m in enumerate(METADATA)]


@pytest.fixture(scope="module")
def stock():
    pipe = StableDiffusion3Pipeline.from_pretrained(EMBEDDED["shapes"], text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(pipe, steps, guidance):
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(r.seed)) for r in REQUESTS]
    return pipe(
        [r.prompt for r in REQUESTS],
        latents=torch.stack(noise),
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=0,
        output_type="pt",
    ).images


@pytest.mark.parametrize(("steps", "guidance"), [(10, 1.0), (20, 3.0)])
def test_the_stock_pipeline_draws_our_images(stock, steps, guidance):
    ours = sample_media(load_family("sd3", "embedded:shapes"), REQUESTS, Sampling(steps=steps, guidance=guidance))
    theirs = stock_images(stock, steps, guidance)
    assert (ours - theirs).abs().max() < 1e-3
    verdicts = [[v.correct for v in judge(images, METADATA)] for images in (ours, theirs)]
    assert verdicts[0] == verdicts[1]


def test_an_image_does_not_depend_on_its_batch():
    family = load_family("sd3", "embedded:shapes")
    sampling = Sampling(steps=4, guidance=2.0)
    together, alone = sample_media(family, REQUESTS, sampling), sample_media(family, REQUESTS[5:6], sampling)
    assert (together[5:6] - alone).abs().max() < 1e-4


def test_the_stock_pipeline_loads_our_lora(stock, tmp_path):
    family = load_family("sd3", "embedded:shapes")
    add_lora(family.net, 4, 8, family.lora_targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in family.net.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained = sample_media(family, REQUESTS, Sampling(steps=8))
    family.save_lora(tmp_path, family.net)

    before = stock_images(stock, 8, 1.0)
    stock.load_lora_weights(tmp_path)
    try:
        after = stock_images(stock, 8, 1.0)
    finally:
        stock.unload_lora_weights()
    assert (after - before).abs().max() > 0.05, "the adapter must matter, or this test shows nothing"
    assert (after - trained).abs().max() < 1e-3
    reloaded = load_family("sd3", "embedded:shapes", adapter=str(tmp_path))
    assert (sample_media(reloaded, REQUESTS, Sampling(steps=8)) - trained).abs().max() < 1e-5


def test_a_hub_id_keeps_the_parts_its_index_lists(monkeypatch, tiny_sd3):
    """Only what a checkpoint lacks is left out: a published SD3 brings its T5."""
    index = {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    listed = {**StableDiffusion3Pipeline.load_config(tiny_sd3), **index}
    asked = {}

    def from_pretrained(path, **options):
        asked.update(options)
        raise OSError("no network here")

    monkeypatch.setattr(StableDiffusion3Pipeline, "load_config", lambda path: listed)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="no network here"):
        load_family("sd3", "organisation/model", "cpu")
    assert "text_encoder_3" not in asked
    listed["text_encoder_3"] = listed["tokenizer_3"] = [None, None]
    with pytest.raises(UserError, match="no network here"):
        load_family("sd3", "organisation/model", "cpu")
    assert asked["text_encoder_3"] is asked["tokenizer_3"] is None
    listed["transformer"] = ["their_code", "Net"]
    with pytest.raises(UserError, match="only diffusers' own parts are run"):
        load_family("sd3", "organisation/model", "cpu")
