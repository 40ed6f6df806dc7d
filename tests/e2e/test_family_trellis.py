"""TRELLIS's first stage from its published layout: networks, conditions, clock, adapters, and files that do not fit."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign import mesh
from diffalign.errors import UserError
from diffalign.families import trellis
from diffalign.families.base import load_family
from diffalign.methods import METHODS
from diffalign.networks import Loading
from diffalign.samplers import euler, guided
from diffalign.train.step import loss_step
from diffalign.types import Batch
from diffalign.weights import Weights, add_lora

from . import tiny_trellis as tiny
from . import trellis_reference as ref
from .tiny_trellis import DECODER, ENCODER, FLOW


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trellis") / "image"
    tiny.write(out)
    return out


@pytest.fixture
def family(folder) -> trellis.Family:
    return load_family("trellis", str(folder), "cpu")


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return {key: value.double() for key, value in load_file(folder / "ckpts" / f"{name}.safetensors").items()}


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest entry: float32 times near 1000 leave phases of sinusoids with some 3e-5."""
    torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0, size: tuple[int, int] = (28, 28), mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size, len(mode)), np.uint8)
    return Image.fromarray(values, mode)


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "args", "count"),
    [
        ("SparseStructureFlowModel", ref.IMAGE_LARGE, 555_543_560),
        ("SparseStructureFlowModel", ref.TEXT_BASE, 156_726_536),
        ("SparseStructureFlowModel", ref.TEXT_LARGE, 542_960_648),
        ("SparseStructureFlowModel", ref.TEXT_XLARGE, 975_440_648),
        ("SparseStructureFlowModel", ref.IMAGE_LARGE | {"share_mod": True}, None),
        ("SparseStructureEncoder", ref.ENCODER, 59_298_192),
        ("SparseStructureDecoder", ref.DECODER, 73_671_201),
    ],
)
def test_published_sizes_have_the_published_tensors(kind, args, count):
    from diffalign.families import _trellis_net

    with torch.device("meta"):
        net = getattr(_trellis_net, kind)(**args)
    table = ref.flow_table(args) if "num_heads" in args else ref.vae_table(args)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == table
    assert count is None or sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("options", [{}, {"share_mod": True}, {"qk_rms_norm_cross": True}, {"qk_rms_norm": False}])
def test_the_flow_transformer_is_its_formula(options, tmp_path):
    from diffalign.families._trellis_net import SparseStructureFlowModel

    args = FLOW | options
    ref.write(tmp_path / "net", "SparseStructureFlowModel", args, ref.flow_table(args), 11)
    state = load_file(tmp_path / "net.safetensors")
    net = SparseStructureFlowModel(**args)
    net.load_state_dict(state)
    x, t, tokens = normal(3, 3, 4, 4, 4), torch.tensor([0.0, 713.25, 1000.0]), normal(3, 5, 16, seed=1)
    expected = ref.flow({k: v.double() for k, v in state.items()}, args, x.double(), t.double(), tokens.double())
    assert expected.std() > 0.1
    close(net(x, t, tokens), expected)


def test_positions_are_made_as_published():
    from diffalign.families._trellis_net import positions

    for resolution, channels in ((4, 32), (3, 24)):
        found = positions(resolution, channels).double()
        torch.testing.assert_close(found, ref.positions(resolution, channels), rtol=0, atol=1e-6)


def test_a_loaded_family_computes_the_formulas(family, folder):
    x, cond = normal(2, *family.latent_shape(None)), {"tokens": normal(2, 9, 16, seed=1)}
    t = torch.tensor([0.2, 0.9])
    weights = tensors(folder, "ss_flow_img_dit_L_16l8_fp16")
    expected = ref.flow(weights, FLOW, x.double(), (1000 * t).double(), cond["tokens"].double())
    close(family.predict(family.net, x, t, cond), expected)

    voxels = (normal(2, 1, 8, 8, 8, seed=2) > 0.5).float()
    mean, logvar = ref.vae(tensors(folder, "ss_enc_conv3d_16l8_fp16"), ENCODER, voxels.double()).chunk(2, 1)
    found = family.encode_media(voxels)
    close(found[0], mean)
    close(found[1], logvar)
    assert torch.equal(family.latents(*found, noise=normal(*mean.shape)), found[0])

    logits = ref.vae(tensors(folder, "ss_dec_conv3d_16l8_fp16"), DECODER, x.double())
    close(family.decoder(x), logits)
    decoded = family.decode(x)
    assert decoded.shape == (2, 1, 8, 8, 8)
    assert torch.equal(decoded, (logits > 0).float())
    assert 0 < decoded.mean() < 1


def test_checkpointing_changes_nothing(family):
    family.net.requires_grad_(True)
    x, cond, t = normal(2, 3, 4, 4, 4), {"tokens": normal(2, 9, 16, seed=1)}, torch.tensor([0.2, 0.9])
    grads = []
    for switch in (family.net.disable_gradient_checkpointing, family.net.enable_gradient_checkpointing):
        switch()
        family.net.zero_grad()
        family.predict(family.net, x, t, cond).square().sum().backward()
        grads.append([p.grad.clone() for p in family.net.parameters()])
    assert family.net.is_gradient_checkpointing
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


# --- conditions -----------------------------------------------------------------------------------------------------


def test_image_tokens_are_those_of_dino_before_its_norm(family, folder):
    images = [picture(seed) for seed in range(2)]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).double().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in trellis_pixels())
    weights = {key: value.double() for key, value in load_file(folder / "dinov2" / "model.safetensors").items()}
    expected = ref.dino(weights, (pixels - mean) / std, heads=2, eps=1e-6)
    tokens = family.encode_condition(images)["tokens"]
    assert tokens.shape == (2, 1 + 4 + 4, 16)
    close(tokens, expected)
    assert family.reads_condition
    assert family.encode_prompt(["a chair", "a vase"]) == {}


def trellis_pixels() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_the_unconditional_branch_is_zeros(family):
    cond = family.encode_condition([picture()])
    empty = family.unconditional(cond)
    assert empty.keys() == cond.keys() == {"tokens"}
    assert torch.equal(empty["tokens"], torch.zeros_like(cond["tokens"]))


def test_opaque_images_are_squeezed_to_the_square(family):
    wide = picture(3, (40, 90))
    for image in (wide, wide.convert("RGBA"), wide.quantize(256).convert("RGB")):
        expected = np.asarray(image.convert("RGB").resize((28, 28), Image.Resampling.LANCZOS), np.float32) / 255
        assert np.array_equal(trellis._pixels(image, 28).permute(1, 2, 0).numpy(), expected)


def test_transparent_images_are_cropped_and_laid_over_black():
    values = np.zeros((100, 120, 4), np.uint8)
    values[..., :3] = 200
    values[40:61, 30:71, 3] = 255
    values[0, 0, 3] = 203  # not above 0.8 * 255: outside the crop
    image = Image.fromarray(values, "RGBA")
    # centre (50, 50); the longer side spans 40, times 1.2 is 48: from 26 to 74
    cropped = np.asarray(image.crop((26, 26, 74, 74)).resize((28, 28), Image.Resampling.LANCZOS), np.float32) / 255
    expected = (cropped[..., :3] * cropped[..., 3:] * 255).astype(np.uint8)
    found = trellis._pixels(image, 28).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected.astype(np.float32) / 255)
    assert found[0].max() == 0
    assert found[14, 14, 0] == pytest.approx(200 / 255, abs=0.01)
    with pytest.raises(UserError, match="transparent all over"):
        trellis._pixels(Image.new("RGBA", (20, 20)), 28)


# --- clock ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [12, 25])
def test_sampling_is_the_published_sampler(family, folder, steps):
    """Their loop in float64: rescaled times, velocities mixed as (1 + g) c - g u within the interval."""
    strength = 2.5
    cond = family.encode_condition([picture()])
    noise = normal(1, *family.latent_shape(None))
    weights, tokens = tensors(folder, "ss_flow_img_dit_L_16l8_fp16"), cond["tokens"].double()
    u = np.linspace(1, 0, steps + 1)
    times, x, asked = 3 * u / (1 + 2 * u), noise.double(), []
    for t, following in itertools.pairwise(times):
        now = torch.tensor([1000 * t], dtype=torch.float64)
        v = ref.flow(weights, FLOW, x, now, tokens)
        asked.append(1)
        if 0.5 <= t <= 1.0:
            v = (1 + strength) * v - strength * ref.flow(weights, FLOW, x, now, torch.zeros_like(tokens))
            asked[-1] = 2
        x = x - (t - following) * v
    calls: list[int] = []
    handle = family.net.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    grid = family.schedule_for(None).grid(steps)
    predict = guided(
        family, family.net, cond, family.unconditional(cond), 1 + strength, interval=family.guidance_interval
    )
    found = euler(predict, noise, grid)
    handle.remove()
    np.testing.assert_allclose(grid.numpy(), times, atol=1e-6)
    assert calls == asked
    assert 1 in calls
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)


def test_training_times_are_those_of_the_authors(family):
    """sigmoid(1 + N(0, 1)), whatever the shift of sampling; the rows of DSO ask for the same."""
    schedule = family.schedule
    z = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    t = schedule.sample_t((4000,), torch.Generator().manual_seed(1))
    torch.testing.assert_close(t, (1 + z).sigmoid())
    again = schedule.sample_t((4000,), torch.Generator().manual_seed(1), mean=1.0)
    assert torch.equal(t, again)
    assert schedule.native(torch.tensor([0.25])).item() == 250.0
    x0, noise, at = normal(5, 3), normal(5, 3, seed=1), torch.rand(5)
    full = (1 - at[:, None]) * x0 + (1e-5 + (1 - 1e-5) * at[:, None]) * noise
    assert (schedule.add_noise(x0, noise, at) - full).abs().max() < 1e-4


def test_samples_become_meshes(family):
    cond = family.encode_condition([picture()])
    grid = family.schedule_for(None).grid(3)
    predict = guided(family, family.net, cond, family.unconditional(cond), 1.0)
    voxels = family.decode(euler(predict, normal(1, *family.latent_shape(None)), grid))
    vertices, faces = mesh.triangulate(voxels[0, 0].numpy())
    assert len(faces) > 0
    assert np.abs(vertices).max() <= 0.5


def test_there_is_one_size(family):
    assert family.sample_size(None) == family.sample_size((8, 8)) == family.default_size == (8, 8)
    assert family.latent_shape((8, 8)) == (3, 4, 4, 4)
    with pytest.raises(UserError, match=r"16, 16\]: this trellis makes grids of 8\^3 only"):
        family.latent_shape((16, 16))


# --- training -------------------------------------------------------------------------------------------------------


def train(family: trellis.Family, method: str, steps: int) -> list[float]:
    """Steps of the real loss on two pairs; the losses."""
    weights = Weights(family.net, lora=True)
    row = METHODS[method]
    optimizer = torch.optim.AdamW(weights.trainable(), lr=1e-2)
    cond = family.encode_condition([picture(seed) for seed in range(2)])
    wanted = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    batch = Batch(
        normal(2, 2, 3, 4, 4, 4, seed=4),
        {name: value[:, None] for name, value in cond.items()},
        {"reward": wanted, "desirable": wanted},
    )
    losses = []
    for step in range(steps):
        result = loss_step(row, family, weights, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.metrics["loss"])
    return losses


@pytest.mark.parametrize("method", ["dso-dpo", "dso-dro"])
def test_a_lora_trains_and_comes_back(method, family, folder, tmp_path):
    from peft import PeftModel

    from diffalign.families._trellis_net import SparseStructureFlowModel

    x, cond, t = normal(2, 3, 4, 4, 4), {"tokens": normal(2, 9, 16, seed=1)}, torch.tensor([0.2, 0.9])
    before = family.predict(family.net, x, t, cond)
    torch.manual_seed(0)
    add_lora(family.net, 4, 8, family.lora_targets)
    names = {name.rsplit(".lora_", 1)[0] for name, p in family.net.named_parameters() if p.requires_grad}
    ends = {"self_attn.to_qkv", "self_attn.to_out", "cross_attn.to_q", "cross_attn.to_kv", "cross_attn.to_out"}
    assert names == {f"blocks.{i}.{end}" for i in range(2) for end in ends}

    losses = train(family, method, 3)
    assert all(math.isfinite(loss) for loss in losses)
    if method == "dso-dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    after = family.predict(family.net, x, t, cond).detach()
    assert (after - before).abs().max() > 1e-3
    with Weights(family.net, lora=True).use("reference") as net:
        assert torch.equal(family.predict(net, x, t, cond), before)

    family.save_lora(tmp_path / "lora", family.net)
    again = load_family("trellis", str(folder), "cpu", str(tmp_path / "lora"))
    assert torch.equal(again.predict(again.net, x, t, cond).detach(), after)
    plain = SparseStructureFlowModel(**FLOW)
    plain.load_state_dict(load_file(folder / "ckpts" / "ss_flow_img_dit_L_16l8_fp16.safetensors"))
    stock = PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(stock(x, 1000 * t, cond["tokens"]), after, rtol=0, atol=1e-6)


def test_full_weights_come_back_as_a_part(family, folder, tmp_path):
    with torch.no_grad():
        family.net.out_layer.bias += 1.0
    family.save_net(tmp_path / "net", family.net)
    saved = json.loads((tmp_path / "net" / "sparse_structure_flow_model.json").read_text())
    assert saved["name"] == "SparseStructureFlowModel"
    assert FLOW.items() <= saved["args"].items()
    part = {"sparse_structure_flow_model": str(tmp_path / "net" / "sparse_structure_flow_model")}
    again = trellis.Family.load(str(folder), torch.device("cpu"), Loading(parts=part))
    for name, value in family.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value)
    assert again.fingerprint == family.fingerprint


def test_the_fingerprint_is_that_of_what_encodes(family, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "other")
    for name in ("dinov2/model", "ckpts/ss_enc_conv3d_16l8_fp16"):
        file = copied / f"{name}.safetensors"
        state = load_file(file)
        key = sorted(state)[0]
        save_file(state | {key: state[key] + 1}, file, metadata={"format": "pt"})
        assert load_family("trellis", str(copied), "cpu").fingerprint != family.fingerprint
        shutil.copy(folder / f"{name}.safetensors", file)
    assert load_family("trellis", str(copied), "cpu").fingerprint == family.fingerprint
