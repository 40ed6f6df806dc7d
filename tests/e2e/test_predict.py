"""What `doctor` says a run will take: against networks that are really loaded, and for the published sizes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import nn

from diffalign.config import TrainConfig
from diffalign.families.base import load_family
from diffalign.methods import resolve
from diffalign.predict import counted, lines, predict, sketch
from diffalign.records import Candidate, Record
from diffalign.types import Request
from diffalign.weights import add_lora
from diffalign.worlds.shapes.pretrain import _tokenizer

from . import test_family_flux, test_family_sd, tiny_t5

ROWS = [
    Record(id="a", prompt="1 + 2 =", candidates=[Candidate(text=text, labels={"reward": 0.0}) for text in ("3", "44")])
]


def config(family: str, path: Path | str, **changes: Any) -> TrainConfig:
    method = "text-dpo" if family == "causal_lm" else "diffusion-dpo"
    given = {
        "model": {"family": family, "path": str(path), "device": "cpu", **changes.pop("model", {})},
        "data": {"records": "pairs.jsonl", **changes.pop("data", {})},
        "method": {"name": changes.pop("method", method)},
        "optim": changes.pop("optim", {}),
        "run": {"dir": "run", "steps": 3, "batch": 4, **changes},
    }
    return TrainConfig.model_validate(given)


def forecast(made: TrainConfig) -> Any:
    return predict(made, resolve(**made.method.model_dump()), ROWS)


@pytest.fixture(scope="module")
def paths(tiny_sd3, tmp_path_factory) -> dict[str, str]:
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


FAMILIES = ("sd", "sdxl", "sd3", "flux", "causal_lm")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [None, {"rank": 3}])
def test_parameters_are_those_of_the_loaded_model(paths, name, lora):
    found = forecast(config(name, paths[name], model={"lora": lora}))
    family = load_family(name, paths[name], "cpu")
    if lora:
        add_lora(family.net, 3, None, family.lora_targets)
    else:
        family.net.requires_grad_(True)
    assert found.total == sum(p.numel() for p in family.net.parameters())
    assert found.trained == sum(p.numel() for p in family.net.parameters() if p.requires_grad)
    frozen = [p for p in family.pipe.components.values() if isinstance(p, nn.Module)] if name != "causal_lm" else []
    others = sum(p.numel() for part in frozen if part is not family.net for p in part.parameters())
    assert found.memory["encoders and VAE, until all is encoded"] == 4 * others
    assert found.memory["gradients"] == 4 * found.trained
    assert found.memory["optimiser"] == 8 * found.trained
    assert found.memory["reference"] == (0 if lora else 4 * found.total)
    assert found.memory["activations"] > 0


def by_hand(net: nn.Module, run: Callable[[], object]) -> int:
    """FLOPs of linear layers and convolutions by hooks on the modules, and of attention by its two products."""
    found = [0]

    def linear(module: Any, args: Any, output: Any) -> None:
        found[0] += 2 * output.numel() * module.weight[0].numel()

    handles = [
        module.register_forward_hook(linear) for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    attend = nn.functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found[0] += 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return attend(query, key, value, *args, **kwargs)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        run()
    for handle in handles:
        handle.remove()
    return found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_and_flops_are_those_of_the_loaded_model(paths, name):
    made = config(name, paths[name])
    found = forecast(made).forward.flops
    family = load_family(name, paths[name], "cpu")
    if name == "causal_lm":
        longest = max(len(family.encode(ROWS[0].prompt, c.text).ids) for c in ROWS[0].candidates)
        ids = torch.zeros(1, longest, dtype=torch.long)
        exact = by_hand(family.net, lambda: family.forward(family.net, ids, ids + 1, None, longest, False))
    else:
        cond, blank = family.condition([Request("a", 0)], None), sketch(made.model).blank_condition()
        assert {key: value.shape for key, value in cond.items()} == {key: value.shape for key, value in blank.items()}
        x_t, t = torch.zeros(1, *family.latent_shape(None)), torch.zeros(1)
        exact = by_hand(family.net, lambda: family.predict(family.net, x_t, t, cond))
    assert found == pytest.approx(exact, rel=0.02)


def test_passes_by_roles_times_and_training(paths):
    """Two candidates of four records; a frozen role is one pass, a backward pass two, or one below a LoRA."""
    path = paths["sd3"]
    full, lora = forecast(config("sd3", path)), forecast(config("sd3", path, model={"lora": {"rank": 1}}, accumulate=3))
    assert (full.samples, full.passes, full.flops) == (8, 8 * 4, 32 * full.forward.flops)
    assert (lora.samples, lora.passes) == (8, 3 * 8 * 3)
    assert forecast(config("sd3", path, method="awm")).samples == 8 * 4
    smaller = forecast(config("sd3", path, data={"size": [16, 16]}))
    assert smaller.forward.flops < 0.7 * full.forward.flops


def test_memory_by_optimiser_average_and_precision(paths):
    plain = forecast(config("sd3", paths["sd3"]))
    other = forecast(config("sd3", paths["sd3"], optim={"name": "sgd"}, ema=0.9, precision="bf16"))
    assert other.memory["optimiser"] == 0
    assert other.memory["average"] == 4 * plain.total
    assert other.memory["activations"] == plain.memory["activations"] / 2


@pytest.mark.parametrize("bias", [False, True])
def test_what_autograd_keeps(bias):
    """Of ``relu(linear(x))`` under a trained layer: the input of each layer, the output of the relu; no weights."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10, 20, bias=bias), nn.ReLU(), nn.Linear(20, 5, bias=bias))
        x = torch.zeros(7, 10)
    found = counted(lambda: net(x), fused=True)
    assert found.flops == 2 * 7 * (10 * 20 + 20 * 5)
    assert found.saved == 4 * 7 * (10 + 20)


def test_fused_attention_keeps_no_probabilities():
    q = torch.zeros(1, 2, 64, 8, device="meta", requires_grad=True)

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q * 1, q * 2, q * 3)

    fused, plain = counted(attend, fused=True), counted(attend, fused=False)
    assert fused.saved == 4 * 4 * q.numel()
    assert plain.saved >= 4 * 2 * 64 * 64
    assert fused.flops == plain.flops == 2 * 2 * 2 * 64 * 64 * 8


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (config("sd3", "some-organisation/no-such-model"), "neither a folder nor in the Hub's cache"),
        (config("sd3", "embedded:puzzles"), "model_index.json"),
        (config("sd3", "embedded:shapes", model={"lora": {"targets": ["nothing"]}}), "lora.targets"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(made, reason, pairs):
    made = made.model_copy(update={"data": made.data.model_copy(update={"records": str(pairs)})})
    [(name, text)] = lines(made, resolve(**made.method.model_dump()))
    assert name == "prediction"
    assert text.startswith("not predicted: ")
    assert reason in text
    assert "\n" not in text


def test_a_run_on_own_samples_is_not_predicted(cli, online):
    outcome = cli("doctor", online("awm"))
    assert outcome.code == 0, outcome.err
    assert "not predicted: awm samples while it trains" in outcome.out


def test_the_doctor_prints_it(cli, config):
    outcome = cli("doctor", config("train"))
    assert outcome.code == 0, outcome.err
    for part in ("M trained of", "TFLOP per optimiser step", "GiB: weights", "fused attention", "at 40% of the fp32"):
        assert part in outcome.out


# --- the published sizes --------------------------------------------------------------------------------------------

CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768}
CLIP_L |= {"num_attention_heads": 12}
CLIP_G: dict[str, Any] = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_G |= {"num_attention_heads": 20, "projection_dim": 1280}
T5_XXL: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


def published(name: str) -> Any:
    """SD 1.5, SDXL, SD 3.5 medium or FLUX.1-dev: stock networks without memory, and tokenizers of few words."""
    tokenizer, (_, t5_tokenizer) = _tokenizer(), tiny_t5.make()
    tokenizer.model_max_length = 77
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(**VAE, latent_channels=4 if name in ("sd", "sdxl") else 16)
        clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_L))
        t5 = transformers.T5EncoderModel(transformers.T5Config(**T5_XXL, feed_forward_proj="gated-gelu"))
        clip_l, clip_g = (
            transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes)) for sizes in (CLIP_L, CLIP_G)
        )
        flow = diffusers.FlowMatchEulerDiscreteScheduler(**test_family_flux.SCHEDULERS["dev"])
        if name == "sd":
            unet = diffusers.UNet2DConditionModel(**test_family_sd.SD15)
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return diffusers.StableDiffusionPipeline(
                vae, clip, tokenizer, unet, test_family_sd.SCHEDULERS["sd1"], **none
            )
        if name == "sdxl":
            unet = diffusers.UNet2DConditionModel(**test_family_sd.SDXL)
            scheduler = test_family_sd.SCHEDULERS["sdxl"]
            return diffusers.StableDiffusionXLPipeline(vae, clip, clip_g, tokenizer, tokenizer, unet, scheduler)
        if name == "sd3":
            net = diffusers.SD3Transformer2DModel(**{**SD35_MEDIUM, "in_channels": 16, "out_channels": 16})
            flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
            return diffusers.StableDiffusion3Pipeline(
                net, flow, vae, clip_l, tokenizer, clip_g, tokenizer, t5, t5_tokenizer
            )
        net = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        return diffusers.FluxPipeline(flow, vae, clip, tokenizer, t5, t5_tokenizer, net)


def save_configs(pipe: Any, folder: Path) -> None:
    """The folder of a pipeline without its weights."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if isinstance(part, transformers.PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, nn.Module):
            part.save_config(folder / name)  # type: ignore[operator]
        elif part is not None:
            part.save_pretrained(folder / name)


@pytest.mark.parametrize(("name", "billions"), [("sd", 0.8595), ("sdxl", 2.5675), ("sd3", 2.2432), ("flux", 11.9014)])
def test_published_models_are_predicted_from_their_configs(tmp_path, name, billions):
    save_configs(published(name), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    made = config(name, tmp_path, model={"lora": {"rank": 16}}, precision="bf16")
    start = time.perf_counter()
    found = forecast(made)
    assert time.perf_counter() - start < 60, "seconds, even on a slow machine"
    assert (found.total - found.trained) / 1e9 == pytest.approx(billions, abs=1e-4)
    assert found.probabilities > 0
    family = sketch(made.model)
    add_lora(family.net, 16, None, family.lora_targets)
    x_t, t = (torch.zeros(1, *shape, device="meta") for shape in (family.latent_shape(None), ()))
    cond = family.blank_condition()
    exact = by_hand(family.net, lambda: family.predict(family.net, x_t, t, cond))
    assert found.forward.flops == pytest.approx(exact, rel=0.01)
