"""`diffalign export`: every format of every family, read again by stock code, and refused when it should be."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from diffalign import kohya
from diffalign.export import probe
from diffalign.families.base import load_family
from diffalign.weights import LoraLayer, add_lora, lora_layers

from . import test_family_flux, test_family_sd

FAMILIES = ("sd", "sdxl", "sd3", "flux", "causal_lm")
DIFFUSION = FAMILIES[:-1]
UNET = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in", "conv1", "conv2", "conv_shortcut", "time_emb_proj")
TARGETS = {  # beyond the defaults: everything that has a name of its own in the kohya format and fits a tiny network
    "sd": UNET,
    "sdxl": UNET,
    # stock diffusers splits the fused layers of the single blocks at the published width alone
    "flux": (*(f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_v", "add_k_proj", "to_out.0")), "ff.net.2"),
}
RANK, ALPHA = 2, 3


@pytest.fixture(scope="module")
def paths(tiny_sd3, tmp_path_factory) -> dict[str, str]:
    """Family -> a model to load. Read only."""
    root = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {"sd": test_family_sd._pipeline("sd1"), "sdxl": test_family_sd._pipeline("sdxl")}
        for name, pipe in {**made, "flux": test_family_flux._pipeline("dev")}.items():
            pipe.save_pretrained(root / name, safe_serialization=True)
    return {name: str(root / name) for name in ("sd", "sdxl", "flux")} | {
        "sd3": str(tiny_sd3),
        "causal_lm": "embedded:puzzles",
    }


def randomise(net: nn.Module, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def trained(paths, tmp_path_factory) -> Callable[[str], tuple[Path, Tensor]]:
    """``trained("sd")``: a run directory with a LoRA of random weights, and what the network then says."""
    made: dict[str, tuple[Path, Tensor]] = {}

    def train(name: str) -> tuple[Path, Tensor]:
        if name not in made:
            family = load_family(name, paths[name], "cpu")
            before = probe(family)
            add_lora(family.net, RANK, ALPHA, TARGETS.get(name, family.lora_targets))
            randomise(family.net)
            run = tmp_path_factory.mktemp(name)
            (run / "lora").mkdir()
            family.save_lora(run / "lora", family.net)
            made[name] = run, probe(family)
            assert (made[name][1] - before).abs().max() > 1e-2 * before.abs().max(), "the LoRA must matter"
        return made[name]

    return train


@pytest.fixture
def export(cli, paths, tmp_path) -> Callable[..., Any]:
    """``export("sd", weights, "kohya")`` runs the verb into ``tmp_path / "out"``."""

    def run(name: str, weights: Path, form: str, *words: str) -> Any:
        path = tmp_path / "export.yaml"
        model = {"family": name, "path": paths[name], "device": "cpu"}
        content = {"model": model, "weights": str(weights), "format": form, "out": str(tmp_path / "out")}
        path.write_text(yaml.safe_dump(content))
        return cli("export", path, *words)

    return run


def stock(name: str, folder: str | Path) -> Any:
    """The stock pipeline of a diffusers folder."""
    unused = {"safety_checker": None, "requires_safety_checker": False} if name == "sd" else {}
    unused = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else unused
    return getattr(diffusers, load_kind(name).pipeline).from_pretrained(folder, **unused)


def load_kind(name: str) -> Any:
    from diffalign.families.base import family_class

    return family_class(name)


def said(name: str, path: str, net: nn.Module) -> Tensor:
    """What a network says on the input of :func:`probe`."""
    family = load_family(name, path, "cpu")
    family.net = net
    return probe(family)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_with_the_lora_in_its_weights(export, trained, paths, tmp_path, name):
    run, wanted = trained(name)
    outcome = export(name, run, "diffusers")
    assert outcome.code == 0, outcome.err
    net: Any
    if name == "causal_lm":
        net = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        net = getattr(stock(name, tmp_path / "out"), load_kind(name).net_name)
    assert not [key for key in net.state_dict() if "lora" in key]
    keys = len(net.state_dict())
    assert f"{keys} of {keys} keys matched" in outcome.out
    assert_same(said(name, paths[name], net), wanted)
    assert not list((tmp_path / "out").rglob("*.bin"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_peft_adapter_on_the_bare_network(export, trained, paths, tmp_path, name):
    run, wanted = trained(name)
    outcome = export(name, run / "lora", "peft")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    bare = load_family(name, paths[name], "cpu").net
    with warnings.catch_warnings(action="ignore"):  # peft uses names that transformers has replaced
        PeftModel.from_pretrained(bare, tmp_path / "out")
    keys = 2 * len(lora_layers(bare))
    assert f"{keys} of {keys} keys matched" in outcome.out
    assert_same(said(name, paths[name], bare), wanted)


@pytest.mark.parametrize("form", ["lora", "kohya"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_a_lora_file_for_the_stock_pipeline(export, trained, paths, tmp_path, name, form):
    run, wanted = trained(name)
    outcome = export(name, run, form)
    assert outcome.code == 0, outcome.err
    file = "out.safetensors" if form == "kohya" else "pytorch_lora_weights.safetensors"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file]
    pipe = stock(name, paths[name])
    pipe.load_lora_weights(tmp_path / "out", weight_name=file)
    net = getattr(pipe, load_kind(name).net_name)
    assert_same(said(name, paths[name], net), wanted)
    keys = 2 * len(lora_layers(load_family(name, paths[name], "cpu", str(run / "lora")).net))
    assert f"{keys} of {keys} keys matched" in outcome.out


def test_the_names_are_those_that_other_programs_look_for(export, trained, tmp_path):
    """SD as diffusers calls its modules, SDXL as the original UNet does, FLUX with fused queries, keys and values."""
    expected = {
        "sd": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha",
        "sdxl": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        "flux": "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight",
        "sd3": "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight",
    }
    for name, key in expected.items():
        assert export(name, trained(name)[0], "kohya", f"out={tmp_path / name}").code == 0
        tensors = load_file(tmp_path / name / f"{name}.safetensors")
        assert key in tensors
        alphas = {float(value) for at, value in tensors.items() if at.endswith("alpha")}
        assert alphas == {"sd": {3.0}, "sdxl": {3.0}, "sd3": set(), "flux": {3.0, 6.0}}[name]
    assert load_file(tmp_path / "flux/flux.safetensors")[expected["flux"]].shape == (48, 3 * RANK)


def test_flux_of_the_published_width_comes_back_tensor_for_tensor():
    with torch.device("meta"):
        net = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        own = ("proj_mlp", "single_transformer_blocks.0.proj_out", "norm.linear", "norm1_context.linear")
        add_lora(net, RANK, ALPHA, (*load_kind("flux").lora_targets, *own))
    for name, parameter in list(net.named_parameters()):
        if parameter.requires_grad:
            owner = net.get_submodule(name.rpartition(".")[0])
            owner.weight = nn.Parameter(torch.randn(parameter.shape))
    layers = lora_layers(net)
    back, *_ = diffusers.FluxPipeline.lora_state_dict(kohya.convert("flux", net), return_alphas=True)
    assert len(back) == 2 * len(layers)
    for name, layer in layers.items():
        down, up = (back[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        assert up.shape == layer.up.shape
        torch.testing.assert_close(up @ down, layer.scale * layer.up @ layer.down, rtol=1e-5, atol=1e-5)


def test_the_original_names_of_sdxl():
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(**test_family_sd.SDXL)
        add_lora(net, 1, 1, ("to_q", "conv1", "conv_shortcut", "conv", "time_emb_proj", "conv_in", "linear_1"))
    names = {key.partition(".")[0].removeprefix("lora_unet_") for key in kohya.convert("sdxl", net)}
    assert len(names) == len(lora_layers(net))
    attention = "transformer_blocks_1_attn2_to_q"
    assert names >= {
        *("input_blocks_0_0", "input_blocks_3_0_op", f"input_blocks_4_1_{attention}", "input_blocks_8_0_in_layers_2"),
        *(f"middle_block_1_{attention}", "middle_block_2_in_layers_2", "output_blocks_0_0_skip_connection"),
        *("output_blocks_2_2_conv", f"output_blocks_5_1_{attention}", "output_blocks_8_0_emb_layers_1"),
        *("time_embed_0", "label_emb_0_0"),
    }  # fmt: skip


def test_fusing_is_exact_with_a_part_missing_and_scales_that_differ():
    down, up = torch.randn(2, 2, 5), torch.randn(2, 4, 2)
    parts = [LoraLayer(down[0], up[0], 0.5), None, LoraLayer(down[1], up[1], 3.0)]
    fused = kohya.fuse(parts, [4, 6, 4])
    wanted = torch.cat([0.5 * up[0] @ down[0], torch.zeros(6, 5), 3.0 * up[1] @ down[1]])
    torch.testing.assert_close(fused.scale * fused.up @ fused.down, wanted)
    assert fused.up.shape == (14, 6)


@pytest.mark.parametrize("name", ["sd3", "causal_lm"])
def test_full_weights_take_the_place_of_the_base_s(export, paths, tmp_path, name):
    family = load_family(name, paths[name], "cpu")
    family.net.requires_grad_(True)
    randomise(family.net, 0.02)
    folder = tmp_path / "run" / family.net_name
    family.save_net(folder, family.net)
    outcome = export(name, tmp_path / "run", "diffusers")
    assert outcome.code == 0, outcome.err
    assert_same(probe(load_family(name, str(tmp_path / "out"), "cpu")), probe(family))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(export, tmp_path):
    """``refuse("sd", weights, "kohya", names)`` expects one clear line, and nothing left behind."""
    from .conftest import assert_one_line

    def run(name: str, weights: Path, form: str, *names: object) -> str:
        outcome = export(name, weights, form)
        line = assert_one_line(outcome.code, outcome.err, names)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
        return line

    return run


def test_what_has_no_such_format_is_refused(refuse, trained, paths, tmp_path):
    refuse("causal_lm", trained("causal_lm")[0], "kohya", "format", "causal_lm", "peft")
    refuse("causal_lm", trained("causal_lm")[0], "lora", "format")
    family = load_family("sd3", paths["sd3"], "cpu")
    family.save_net(tmp_path / "run/transformer", family.net)
    refuse("sd3", tmp_path / "run", "lora", "full weights", "diffusers")
    refuse("sd3", tmp_path / "nowhere", "lora", "weights", tmp_path / "nowhere")


def test_a_lora_that_stock_code_cannot_read_back_leaves_nothing(refuse, paths, tmp_path):
    family = load_family("flux", paths["flux"], "cpu")
    add_lora(family.net, RANK, ALPHA, ["single_transformer_blocks.0.attn.to_q"])
    (tmp_path / "run").mkdir()
    family.save_lora(tmp_path / "run", family.net)
    refuse("flux", tmp_path / "run", "kohya", "stock code does not read")


def test_a_module_without_a_name_there_is_refused(refuse, paths, tmp_path):
    family = load_family("flux", paths["flux"], "cpu")
    add_lora(family.net, RANK, ALPHA, ["x_embedder"])
    (tmp_path / "run").mkdir()
    family.save_lora(tmp_path / "run", family.net)
    refuse("flux", tmp_path / "run", "kohya", "x_embedder")


def test_a_reloaded_network_that_differs_leaves_nothing(refuse, trained, monkeypatch):
    monkeypatch.setitem(
        kohya.CONVERTERS, "sd", lambda net: {key: 2 * value for key, value in kohya._named(net, str).items()}
    )
    refuse("sd", trained("sd")[0], "kohya", "differs by")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_spoiled_lora_is_refused(refuse, trained, tmp_path, form):
    run, _ = trained("sd3")
    name = "pytorch_lora_weights.safetensors"
    spoiled = tmp_path / "run"
    spoiled.mkdir()
    (spoiled / name).write_bytes((run / "lora" / name).read_bytes()[:-100])
    refuse("sd3", spoiled, form, "model.adapter", spoiled)
    tensors = load_file(run / "lora" / name)
    save_file({key.replace("blocks.0", "blocks.9"): value for key, value in tensors.items()}, spoiled / name)
    refuse("sd3", spoiled, form, "model.adapter", spoiled)


def test_the_lora_of_another_family_is_refused(refuse, trained):
    refuse("sd", trained("sd3")[0], "kohya", "model.adapter", "unet")


def test_weights_of_another_network_are_refused(refuse, trained, paths, tmp_path):
    family = load_family("sd3", paths["sd3"], "cpu")
    family.save_net(tmp_path / "run/transformer", family.net)
    file = tmp_path / "run/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "proj_out" not in key}, file)
    refuse("sd3", tmp_path / "run", "diffusers", "weights")


def test_a_target_that_holds_something_is_refused(export, trained, tmp_path):
    (tmp_path / "out").mkdir()
    assert export("sd3", trained("sd3")[0], "lora", "--dry-run").code == 0
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out/note").write_text("mine")
    outcome = export("sd3", trained("sd3")[0], "lora")
    assert outcome.code == 2
    assert "out" in outcome.err
    assert (tmp_path / "out/note").read_text() == "mine"
    (tmp_path / "out/note").unlink()
    assert export("sd3", trained("sd3")[0], "lora").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
