"""Precision, quantisation, parts, checkpointing, compilation and attention kernels, through the command line."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.families.base import load_family
from diffalign.generate import sample_media
from diffalign.networks import Loading, checkpoint, compile_blocks, find_optimizer, switch_attention
from diffalign.types import Request, Sampling
from diffalign.weights import Weights, add_lora, continue_lora

REQUESTS = [Request("a photo of a red circle", 1), Request("a photo of a blue square", 2)]
TARGETS = ("attn.to_q", "attn.to_v")


def train(cli, path, folder: Path, *words: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    outcome = cli("train", path, f"run.dir={folder}", *words)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], load_file(folder / "lora/pytorch_lora_weights.safetensors")


def test_checkpointing_changes_no_number(cli, config, tmp_path):
    path = config("train", {"run": {"steps": 3}})
    plain, less = train(cli, path, tmp_path / "a"), train(cli, path, tmp_path / "b", "model.checkpointing=true")
    assert plain[0] == less[0]
    assert all(torch.equal(value, less[1][name]) for name, value in plain[1].items())


def test_checkpointing_really_recomputes(tiny_sd3):
    net = load_family("sd3", str(tiny_sd3), "cpu").net
    add_lora(net, 2, None, TARGETS)
    calls = []
    net.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint(net)
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([500.0]),
    }  # fmt: skip
    net(**inputs).sample.sum().backward()
    assert len(calls) == 2
    with pytest.raises(UserError, match="Linear does not support it"):
        checkpoint(torch.nn.Linear(2, 2))


def test_checkpointing_of_a_language_model(cli, tmp_path):
    """Its library asks for training mode, which would switch dropout on."""
    family = load_family("causal_lm", "embedded:puzzles", "cpu")
    add_lora(family.net, 2, None, family.lora_targets)
    weights = Weights(family.net, lora=True)
    ids = torch.arange(12)[None]
    grads = []
    for _ in range(2):
        family.forward(family.net, ids, None, None, 6, False)[0].float().logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in weights.trainable() if p.grad is not None])
        family.net.zero_grad()
        checkpoint(family.net)
        assert not any(m.training for m in family.net.modules() if isinstance(m, torch.nn.Dropout))
    assert len(grads[0]) > 4
    assert all(map(torch.equal, *grads))


def test_frozen_weights_in_bf16(cli, config, tmp_path, tiny_sd3):
    """The base in bf16, the adapter and the VAE in float32, and at step 0 still the same network for both roles."""
    path = config("train", {"run": {"steps": 2, "precision": "bf16"}, "model": {"dtype": "bf16"}})
    losses, adapter = train(cli, path, tmp_path / "run")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    family = load_family("sd3", str(tiny_sd3), "cpu", loading=Loading("bf16"))
    assert {p.dtype for p in family.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in family.vae.parameters()} == {torch.float32}
    images = sample_media(family, REQUESTS, Sampling(steps=2))
    exact = sample_media(load_family("sd3", str(tiny_sd3), "cpu"), REQUESTS, Sampling(steps=2))
    assert 0 < float((images - exact).abs().max()) < 0.05


def test_full_weights_stay_in_float32(refused, config):
    path = config("train", {"model": {"lora": None}})
    refused("train", path, "model.dtype=bf16", names=["model.dtype", "float32"])
    refused("train", path, "model.quant=nf4", names=["model.quant", "float32"])
    refused("train", config("train"), "model.dtype=bf16", names=["model.dtype", "run.precision=bf16"])


@pytest.mark.parametrize(("quant", "kind"), [("nf4", "Params4bit"), ("int8", "Int8Params")])
def test_a_quantised_base_under_a_lora(tmp_path, quant, kind):
    """With a language model, which its library quantises on a CPU too; policy and reference are still one network."""
    path = wide_llama(tmp_path / "llama")
    family = load_family("causal_lm", path, "cpu", loading=Loading(quant=quant))
    exact = load_family("causal_lm", path, "cpu")
    assert kind in {type(p).__name__ for p in family.net.parameters()}
    add_lora(family.net, 2, None, family.lora_targets)
    weights = Weights(family.net, lora=True)
    ids = torch.arange(24).reshape(2, 12)
    logits = {}
    for role in ("reference", "policy"):
        with weights.use(role) as net, torch.no_grad():
            logits[role] = family.forward(net, ids, None, None, 6, False)[0]
    assert torch.equal(logits["policy"], logits["reference"])
    difference = (logits["policy"] - exact.forward(exact.net, ids, None, None, 6, False)[0]).abs().max()
    assert 1e-5 < float(difference) < 0.1
    assert {p.dtype for p in weights.trainable()} == {torch.float32}  # kernels for a CPU have no backward pass


def wide_llama(folder: Path) -> str:
    """The puzzles' tokenizer before a random Llama whose sides are multiples of a quantisation block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    puzzles = load_family("causal_lm", "embedded:puzzles", "cpu")
    puzzles.tokenizer.save_pretrained(folder)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(puzzles.tokenizer), **size)).save_pretrained(folder)
    return str(folder)


def test_without_a_gpu_diffusers_does_not_quantise(refused, config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("train", config("train"), "model.quant=nf4", names=["GPU", "quantization"])


def test_a_component_from_elsewhere(refused, config, tiny_sd3, tmp_path):
    family = load_family("sd3", str(tiny_sd3), "cpu")
    with torch.no_grad():
        family.vae.decoder.conv_out.bias.add_(0.5)
    family.vae.save_pretrained(tmp_path / "brighter")
    other = load_family("sd3", str(tiny_sd3), "cpu", loading=Loading(parts={"vae": str(tmp_path / "brighter")}))
    assert other.fingerprint != load_family("sd3", str(tiny_sd3), "cpu").fingerprint
    assert torch.equal(
        sample_media(other, REQUESTS, Sampling(steps=1)), sample_media(family, REQUESTS, Sampling(steps=1))
    )
    inside = load_family("sd3", str(tiny_sd3), "cpu", loading=Loading(parts={"vae": str(tiny_sd3)}))
    assert inside.fingerprint == load_family("sd3", str(tiny_sd3), "cpu").fingerprint
    refused("train", config("train"), "model.parts.vea=x", names=["model.parts", "vea", "vae"])
    refused("train", config("train"), f"model.parts.vae={tmp_path / 'gone'}", names=["model.path", "gone"])


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.fixture
def xformers(monkeypatch) -> list[tuple[int, ...]]:
    """A stand-in for the package that notes what it is asked to compute; the real one has no kernel for a CPU."""
    calls: list[tuple[int, ...]] = []

    def attention(query, key, value, attn_bias=None, op=None, scale=None, p=0.0):
        calls.append(tuple(query.shape))
        heads_first = query.ndim == 4
        parts = (part.transpose(1, 2) if heads_first else part for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=attn_bias, scale=scale)
        return out.transpose(1, 2) if heads_first else out

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = attention  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    for name, module in (("xformers", package), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)
    for place in ("attention_processor", "attention"):
        module = sys.modules[f"diffusers.models.{place}"]
        monkeypatch.setattr(module, "xformers", package, raising=False)
        monkeypatch.setattr(module, "is_xformers_available", lambda: True, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "randn", lambda *a, device=None, **k: real(*a, **k))
    return calls


real = torch.randn


def test_xformers_is_really_used(tiny_sd3, xformers):
    family = load_family("sd3", str(tiny_sd3), "cpu")
    expected = sample_media(family, REQUESTS, Sampling(steps=1))
    assert not xformers
    switch_attention(family.net, "xformers")
    found = sample_media(family, REQUESTS, Sampling(steps=1))
    assert [shape for shape in xformers if shape != (1, 2, 40)] == [
        (4, 32, 8)
    ] * 2  # a block each, and the library's probe
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["xformers", "flash", "nonsense"])
def test_a_kernel_that_is_not_there_is_one_line(refused, config, name):
    refused("train", config("train"), f"model.attention={name}", names=["model.attention", name])


# --- compilation, optimisers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "none"])
def test_compiled_blocks(tiny_sd3, family, monkeypatch):
    if family == "none":
        with pytest.raises(UserError, match="Linear has no repeated blocks"):
            compile_blocks(torch.nn.Linear(2, 2), ())
        return
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(type(self).__name__))
    loaded = load_family("sd3", str(tiny_sd3), "cpu")
    compile_blocks(loaded.net, loaded.blocks)
    assert compiled == ["JointTransformerBlock"] * 2


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(cli, config, tmp_path):
    path = config("train", {"run": {"steps": 3}})
    plain, fast = train(cli, path, tmp_path / "a"), train(cli, path, tmp_path / "b", "model.compile=true")
    assert fast[0] == pytest.approx(plain[0], abs=1e-4)


def test_optimisers_in_8_bits(cli, config, tmp_path, refused, monkeypatch):
    path = config("train", {"run": {"steps": 2}, "optim": {"name": "adamw8bit"}})
    losses, _ = train(cli, path, tmp_path / "run")
    assert losses[1] != losses[0]
    assert find_optimizer("PagedAdamW8bit").__name__ == "PagedAdamW8bit"
    assert find_optimizer("adamw") is torch.optim.AdamW
    with pytest.raises(UserError, match="unknown optimiser 'adamw9bit'"):
        find_optimizer("adamw9bit")
    with pytest.raises(UserError, match="unknown optimiser 'lbfgs'"):
        find_optimizer("lbfgs")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optim\.name: lion8bit needs bitsandbytes"):
        find_optimizer("lion8bit")
    with pytest.raises(UserError, match=r"model\.quant: nf4 needs bitsandbytes"):
        Loading(quant="nf4").quantisation("diffusers")


# --- training on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"model": {"dtype": "bf16"}, "run": {"precision": "bf16"}}])
def test_training_goes_on_from_an_adapter(cli, config, tmp_path, changes):
    """Policy and reference are the first round's adapter at step 0, and only the policy moves."""
    path = config("train", {"run": {"steps": 3}, "optim": {"lr": 0.01}})
    _, first = train(cli, path, tmp_path / "first")
    again = config("train", {"model": {"lora": {"start": str(tmp_path / "first/lora")}, **changes.get("model", {})},
                             "run": {"steps": 2, "save_every": 1, **changes.get("run", {})}})  # fmt: skip
    losses, second = train(cli, again, tmp_path / "second", "optim.lr=0.01")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[1] != losses[0]
    assert first.keys() == second.keys()
    assert any(not torch.equal(value, second[name]) for name, value in first.items())
    state = load_file(tmp_path / "second/checkpoint-000001/weights.safetensors")
    assert state
    assert not any(".reference." in name for name in state)


def test_the_second_adapter_is_the_reference(tiny_sd3, tmp_path):
    family = load_family("sd3", str(tiny_sd3), "cpu")
    add_lora(family.net, 2, None, TARGETS)
    with torch.no_grad():
        for parameter in family.net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    family.save_lora(tmp_path, family.net)
    loaded = load_family("sd3", str(tiny_sd3), "cpu", str(tmp_path))
    continue_lora(loaded.net)
    weights = Weights(loaded.net, lora=True)
    weights.prepare(["reference"])
    x_t, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9])
    cond = loaded.condition(REQUESTS, None)

    def outputs() -> dict[str, torch.Tensor]:
        found = {}
        for role in ("policy", "reference", "policy"):
            with weights.use(role) as net, torch.no_grad():
                found[role] = loaded.predict(net, x_t, t, cond)
        return found

    before = outputs()
    assert torch.equal(before["policy"], before["reference"])
    with torch.no_grad():
        for parameter in weights.trainable():
            parameter.add_(0.1)
    after = outputs()
    assert torch.equal(after["reference"], before["reference"])
    assert not torch.equal(after["policy"], before["policy"])
    assert len(weights.trainable()) == len(list(Weights(family.net, lora=True).trainable()))


def test_what_a_prediction_does_not_run_is_given_back(tiny_sd3):
    family = load_family("sd3", str(tiny_sd3), "cpu")
    x_t, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), family.condition(REQUESTS[:1], None)
    with torch.no_grad():
        before = family.predict(family.net, x_t, t, cond)
        family.release()
        assert torch.equal(family.predict(family.net, x_t, t, cond), before)
    assert all(p.is_meta for p in family.vae.parameters())
    assert all(p.is_meta for p in family.pipe.text_encoder.parameters())
