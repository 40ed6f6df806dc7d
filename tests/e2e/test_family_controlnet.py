"""ControlNets of SD, SDXL and FLUX.1 against the stock pipelines, on tiny random checkpoints of stock classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.families import controlnet
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.networks import Loading, checkpoint
from diffalign.types import Sampling, joined
from diffalign.weights import add_lora

from . import test_family_sd, tiny_control
from .tiny_control import CLASSES, KINDS, SIZE, call, load, pictures, requests, stock_pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Read only."""
    return tiny_control.write(tmp_path_factory.mktemp("control"), KINDS)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


class Calls:
    """What a network was called with, and what it returned."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.inputs: list[Any] = []
        self.results: list[Any] = []
        net.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs, output) -> None:
        first, second = (*args, *(kwargs.get(name) for name in ("hidden_states", "timestep")))[:2]
        self.inputs.append((first, second))
        self.results.append(output)


# --- against the stock pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_both_networks_get_what_the_stock_pipeline_gives_them(folders, kind, guidance):
    pipe, family = stock_pipe(folders, kind), load(folders, kind)
    assert type(family) is CLASSES[kind]
    theirs = [Calls(net) for net in (pipe.controlnet, getattr(pipe, family.steers))]
    ours = [Calls(net) for net in family.networks]
    call(pipe, family, 3, guidance)
    cond = family.condition(requests(), SIZE)
    if guidance > 1:
        cond = joined([family.unconditional(cond), cond])
    wrong = {**cond, "control": cond["control"].flip(0 if guidance == 1 else -1)}
    is_flux = CLASSES[kind] is controlnet.Flux
    per_step = 2 if is_flux and guidance > 1 else 1  # stock FLUX runs its branches one after the other, prompt first
    assert len(theirs[0].results) == 3
    assert len(theirs[1].results) == 3 * per_step
    for step, added in enumerate(theirs[0].results):
        results = [output[0] for output in theirs[1].results[per_step * step :][:per_step]]
        x_t, native = theirs[1].inputs[per_step * step]
        if is_flux:
            x_t, results = (
                pipe._unpack_latents(torch.cat(v), *SIZE, pipe.vae_scale_factor)
                for v in ([x_t] * per_step, results[::-1])
            )
            t = native.repeat(per_step)
            added = [[torch.cat([value] * per_step) for value in part] for part in added]
        else:
            [results], t = results, family.schedule.unit(native).expand(len(x_t))
        with torch.no_grad():
            predicted = family.predict(family.net, x_t, t, cond)
            other = family.predict(family.net, x_t, t, wrong)
        assert (predicted - results).abs().max() <= 1e-5 * max(1.0, float(results.abs().max()))
        assert (other - results).abs().max() > 1e-3, "the image must matter, or this test shows nothing"
        for mine, stock in zip(ours[0].results[-2], added, strict=True):
            pairs = zip(mine, stock, strict=True) if isinstance(mine, list | tuple) else [(mine, stock)]
            # residuals are not of size 1, and several threads add up in another order
            assert all(float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_stock_pipeline_draws_our_images(folders, kind, guidance):
    pipe, family = stock_pipe(folders, kind), load(folders, kind)
    sampling = Sampling("euler" if CLASSES[kind] is controlnet.Flux else "ddim", 4, guidance, SIZE)
    ours = sample_media(family, requests(), sampling)
    assert (ours - call(pipe, family, 4, guidance)).abs().max() < 1e-3
    assert ours.std() > 0.01
    swapped = sample_media(family, requests(pictures()[::-1]), sampling)
    assert (swapped - ours).abs().max() > 5e-3, "the image must matter, or this test shows nothing"
    family.conditioning_scale = 0.5
    weaker = sample_media(family, requests(), sampling)
    assert (weaker - ours).abs().max() > 5e-3
    assert (weaker - call(pipe, family, 4, guidance)).abs().max() < 1e-3


def test_images_become_what_the_stock_pipeline_makes_of_them(folders, kind):
    pipe, family = stock_pipe(folders, kind), load(folders, kind)
    ramp = Image.linear_gradient("L")
    images = [*pictures(), ramp, Image.merge("RGBA", [ramp] * 4)] if kind in ("sd", "sdxl") else pictures()
    control = family.encode_condition(images, SIZE)["control"]
    size = {"width": SIZE[1], "height": SIZE[0], "batch_size": 1, "num_images_per_prompt": 1}
    theirs = [pipe.prepare_image(image, **size, device="cpu", dtype=torch.float32) for image in images]
    if kind == "flux":
        with torch.no_grad():
            theirs = [(pipe.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611 for pixels in theirs]
        assert (control - torch.cat(theirs)).abs().max() <= 1e-6
    else:
        ours = controlnet._signed(control) if kind == "pixels" else control / 255
        assert torch.equal(ours, torch.cat(theirs))
        assert control.dtype == torch.uint8
    blank = family.blank_condition()
    assert blank["control"].shape[2:] == family.encode_condition(images[:1], family.default_size)["control"].shape[2:]


def test_a_base_pipeline_takes_its_controlnet_from_elsewhere(folders, kind):
    parts = {"controlnet": str(folders[kind] / "controlnet")}
    path = str(folders[kind] / "base")
    given = load_family("controlnet", path, "cpu", loading=Loading(parts=parts))
    whole = load(folders, kind)
    assert type(given) is type(whole)
    assert given.fingerprint == whole.fingerprint
    x_t, t = (
        torch.randn(2, *whole.latent_shape(SIZE), generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.2, 0.7]),
    )
    with torch.no_grad():
        first, second = (f.predict(f.net, x_t, t, f.condition(requests(), SIZE)) for f in (given, whole))
    assert torch.equal(first, second)
    with pytest.raises(UserError, match=r"comes without controlnet, and controlnet needs it; model\.parts"):
        load_family("controlnet", path, "cpu")


def test_the_fingerprint_is_that_of_the_encoders(folders, tmp_path):
    """What conditions and latents are encoded with decides it, not the networks behind them."""
    folder = shutil.copytree(folders["sd"], tmp_path / "model")
    found = [load(folders, "sd").fingerprint]
    for part, changes in (("unet", False), ("controlnet", False), ("vae", True)):
        net = getattr(diffusers, json.loads((folder / part / "config.json").read_text())["_class_name"])
        changed = net.from_pretrained(folder / part)
        next(changed.parameters()).data += 1
        changed.save_pretrained(folder / part)
        found.append(load_family("controlnet", str(folder), "cpu").fingerprint)
        assert (found[-1] != found[-2]) == changes
    fluxes = [load(folders, kind) for kind in ("flux", "pixels")]
    assert [f.fingerprint.rpartition("-")[2] for f in fluxes] == ["latents", "pixels"]


def test_checkpointing_covers_both_networks(folders, kind):
    family = load(folders, kind)
    family.net.requires_grad_(True)
    x_t, t = torch.ones(1, *family.latent_shape(SIZE)), torch.tensor([0.5])
    cond = family.condition(requests()[:1], SIZE)
    is_flux = CLASSES[kind] is controlnet.Flux
    first, last = family.networks  # of the second the last block, as the first ones have no gradient
    found = (
        (first.transformer_blocks[0], last.single_transformer_blocks[-1])
        if is_flux
        else (first.down_blocks[0].resnets[0], last.up_blocks[-1].resnets[0])
    )
    calls: list[int] = []
    for number, block in enumerate(found):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    grads = []
    for times in (1, 2):
        family.net.zero_grad()
        family.predict(family.net, x_t, t, cond).square().sum().backward()
        grads.append([p.grad.clone() for p in family.net.parameters() if p.grad is not None])
        assert sorted(calls) == [0] * times + [1] * times
        calls.clear()
        for net in family.networks:
            checkpoint(net)
    assert grads[0]
    assert all(map(torch.equal, *grads))
    assert all(p.grad is None for p in family.networks[1].parameters())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_prompts_without_an_image_are_refused(refused, config, folders):
    path = config("generate", {"model": {"family": "controlnet", "path": str(folders["sd"])}})
    refused("generate", path, names=["controlnet needs a condition image"])
    changes = {"model": {"family": "controlnet", "path": str(folders["sd"])}, "data": {"size": [32, 32]}}
    refused("train", config("train", changes), names=["record '0000", "controlnet needs a condition image"])


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("sd", {"global_pool_conditions": True}, ["global_pool_conditions", "no ControlNets that pool"]),
        ("sd", {"conditioning_channels": 1}, ["conditioning_channels", "no other images than RGB"]),
        ("flux", {"num_mode": 10}, ["num_mode", "no union ControlNets"]),
        ("sd", {"cross_attention_dim": 6}, ["for another model: its cross_attention_dim is 6, and 8", "unet"]),
    ],
)
def test_other_controlnets_are_one_line(folders, tmp_path, kind, changes, names):
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    config = folder / "controlnet/config.json"
    _edit(config, **changes)
    loaded: Any = getattr(diffusers, CLASSES[kind].kind)
    loaded.from_config(loaded.load_config(folder / "controlnet")).save_pretrained(folder / "controlnet")
    with pytest.raises(UserError) as refusal:
        load_family("controlnet", str(folder), "cpu")
    assert all(name in str(refusal.value) for name in (*names, "model.path")), refusal.value


def test_other_pipelines_and_settings_are_one_line(refused, config, folders, tiny_sd3):
    path = config("generate", {"model": {"family": "controlnet", "path": str(tiny_sd3)}})
    refused("generate", path, names=["is a StableDiffusion3Pipeline", "FluxControlNetPipeline"])
    path = config("generate", {"model": {"family": "controlnet", "path": str(folders["sd"])}})
    refused("generate", path, "model.quant=nf4", names=["model.quant", "not quantised"])
    adapter = {"model": {"family": "controlnet", "path": str(folders["sd"]), "adapter": str(folders["sd"])}}
    refused("generate", config("generate", adapter), names=["model.adapter", "pytorch_lora_weights"])


# --- the published networks -----------------------------------------------------------------------------------------

INSTANTX_CANNY = {"num_layers": 5, "num_single_layers": 0, "guidance_embeds": True}
XLABS_CANNY = {"num_layers": 2, "num_single_layers": 0, "guidance_embeds": True, "patch_size": 2}
XLABS_CANNY |= {"conditioning_embedding_channels": 16}


@pytest.mark.parametrize(
    ("kind", "make_net", "parameters", "adapted"),
    [
        ("sd", lambda: diffusers.ControlNetModel(cross_attention_dim=768), 361_279_120, 7 * 2 * 4),
        (
            "sdxl",
            lambda: diffusers.ControlNetModel.from_unet(
                diffusers.UNet2DConditionModel(**test_family_sd.SDXL), load_weights_from_unet=False
            ),
            1_251_014_160,
            34 * 2 * 4,
        ),
        ("flux", lambda: diffusers.FluxControlNetModel(**INSTANTX_CANNY), 1_791_605_248, 5 * 12),
        ("pixels", lambda: diffusers.FluxControlNetModel(**XLABS_CANNY), 743_807_280, 2 * 12),
    ],
)
def test_published_sizes_and_what_a_lora_adapts(kind, make_net, parameters, adapted):
    with torch.device("meta"):
        net: Any = make_net()
        assert sum(p.numel() for p in net.parameters()) == parameters
        add_lora(net, 4, 4, CLASSES[kind].lora_targets)
    found = [name.partition(".lora_A")[0] for name, _ in net.named_parameters() if ".lora_A." in name]
    assert len(found) == adapted
    assert all(any(name.endswith(target) for name in found) for target in CLASSES[kind].lora_targets)
