"""TRELLIS pipelines as they are spread over folders and Hub repositories, text models, and what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.families import trellis
from diffalign.families.base import load_family
from diffalign.networks import Loading
from diffalign.weights import add_lora

from . import tiny_parts
from . import tiny_trellis as tiny
from . import trellis_reference as ref

CPU = torch.device("cpu")
TOKENS = 16
FLOW_NAME = "ss_flow_img_dit_L_16l8_fp16"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trellis") / "image"
    tiny.write(out)
    return out


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(made, tmp_path / "image")


def change(path: Path, **values) -> None:
    """Edit a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- text models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A whole CLIP, as openai/clip-vit-large-patch14 is published, with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

    from diffalign.worlds.shapes.pretrain import _tokenizer

    out = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = _tokenizer()
    text = tiny_parts.clip(CLIPTextModelWithProjection, tokenizer).config.to_dict()
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    tiny.seeded(7, lambda: CLIPModel(config)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def text_folder(folder, clip) -> Path:
    """A text pipeline: its flow reads CLIP's states; its decoder is that of the image pipeline's repository."""
    args = tiny.FLOW | {"cond_channels": 8, "qk_rms_norm_cross": True}
    ref.write(folder / "ckpts" / FLOW_NAME, "SparseStructureFlowModel", args, ref.flow_table(args), 9)
    tiny.write_index(folder, image_cond_model=None, text_cond_model=str(clip))
    return folder


def test_text_states_are_clip_s(text_folder, clip):
    from transformers import AutoTokenizer, CLIPTextModel

    family = load_family("trellis", str(text_folder), "cpu")
    assert not family.reads_condition
    prompts = ["a red circle", ""]
    ids = AutoTokenizer.from_pretrained(clip)(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    expected = CLIPTextModel.from_pretrained(clip)(input_ids=ids).last_hidden_state
    cond = family.encode_prompt(prompts)
    assert cond["tokens"].shape == (2, TOKENS, 8)
    torch.testing.assert_close(cond["tokens"], expected.detach(), rtol=0, atol=1e-6)
    empty = family.unconditional(cond)["tokens"]
    assert torch.equal(empty, cond["tokens"][1:].expand_as(empty))
    x = torch.randn(2, *family.latent_shape(None), generator=torch.Generator().manual_seed(0))
    weights = {k: v.double() for k, v in load_file(text_folder / "ckpts" / f"{FLOW_NAME}.safetensors").items()}
    args = tiny.FLOW | {"cond_channels": 8}
    found = family.predict(family.net, x, torch.tensor([0.3, 0.6]), cond)
    t = torch.tensor([300.0, 600.0], dtype=torch.float64)
    torch.testing.assert_close(
        found.double(), ref.flow(weights, args, x.double(), t, expected.detach().double()), rtol=1e-5, atol=1e-5
    )


# --- where files are ------------------------------------------------------------------------------------------------


def test_parts_come_from_the_hub_file_by_file(made, monkeypatch, tmp_path):
    """A pipeline on the Hub whose VAE is in another repository, as those of the text models."""
    import huggingface_hub

    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, *allow_patterns))
        target = tmp_path / repository.replace("/", "--")
        target.mkdir(exist_ok=True)
        for name in allow_patterns:
            source = made / name
            if source.is_file() and (repository == "an-owner/the-vae") == ("_dec_" in name or "_enc_" in name):
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copy(source, target / name)
        if "pipeline.json" in allow_patterns:
            models = dict(tiny.INDEX["args"]["models"])
            models["sparse_structure_decoder"] = "an-owner/the-vae/ckpts/ss_dec_conv3d_16l8_fp16"
            tiny.write_index(target, models=models, image_cond_model=str(made / "dinov2"))
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    remote, local = (load_family("trellis", path, "cpu") for path in ("an-owner/the-model", str(made)))
    assert remote.fingerprint == local.fingerprint
    for name, value in local.net.state_dict().items():
        assert torch.equal(remote.net.state_dict()[name], value)
    assert asked[0] == ("an-owner/the-model", "pipeline.json")
    assert ("an-owner/the-model", f"ckpts/{FLOW_NAME}.json", f"ckpts/{FLOW_NAME}.safetensors") in asked
    names = [f"ckpts/ss_enc_conv3d_16l8_fp16.{end}" for end in ("json", "safetensors")]
    assert ("an-owner/the-vae", *names) in asked
    assert not any("slat" in name for call in asked for name in call)


def test_the_published_name_of_the_image_encoder_is_known(folder, monkeypatch):
    from diffalign.families import _trellis_files

    tiny.write_index(folder, image_cond_model="dinov2_vitl14_reg")
    assert _trellis_files.DINO == {"dinov2_vitl14_reg": "facebook/dinov2-with-registers-large"}
    monkeypatch.setitem(_trellis_files.DINO, "dinov2_vitl14_reg", "dinov2")
    assert load_family("trellis", str(folder), "cpu").reads_condition
    monkeypatch.undo()
    family = trellis.Family.load(str(folder), CPU, Loading(parts={"image_cond_model": str(folder / "dinov2")}))
    assert family.encode_prompt(["a"]) == {}


# --- what does not fit ----------------------------------------------------------------------------------------------


def refused(folder: Path, message: str, parts: dict[str, str] | None = None) -> None:
    with pytest.raises(UserError, match=message) as caught:
        trellis.Family.load(str(folder), CPU, Loading(parts=parts or {}))
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_pipeline(folder, tmp_path):
    refused(tmp_path / "none", r"holds no pipeline.json; give a TRELLIS folder")
    for content in ("", "[]", "{}", '{"args": {"models": {}}}', "{" * 50_000, '{"args": 1}'):
        (folder / "pipeline.json").write_text(content)
        refused(folder, r"pipeline.json is not TRELLIS's: \w+")
    for changes in (
        {"models": {"sparse_structure_flow_model": 1, "sparse_structure_decoder": "x"}},
        {"sparse_structure_sampler": {"params": 3}},
        {"sparse_structure_sampler": {"params": {"rescale_t": "fast"}}},
        {"sparse_structure_sampler": {"params": {"rescale_t": 0}}},
        {"sparse_structure_sampler": {"params": {"cfg_interval": [0.5]}}},
        {"image_cond_model": ["x"]},
        {"image_cond_model": None},
    ):
        tiny.write_index(folder, **changes)
        refused(folder, "is not TRELLIS's")


@pytest.mark.parametrize("name", tiny.NETS)
@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_missing_and_broken_checkpoints(name, end, folder):
    file = folder / "ckpts" / f"{name}.{end}"
    for content in (b"", b"{}", file.read_bytes()[:100]):
        file.write_bytes(content)
        refused(folder, f"cannot load .*{name}")
    file.unlink()
    refused(folder, f"holds no ckpts/{name}.json with ckpts/{name}.safetensors")


def test_checkpoints_of_another_network(folder):
    config, weights = (folder / "ckpts" / f"{FLOW_NAME}.{end}" for end in ("json", "safetensors"))
    kept = config.read_text()
    change(config, name="SLatFlowModel")
    refused(folder, "is a SLatFlowModel; SparseStructureFlowModel is needed")
    for option, message in (
        ({"patch_size": 2}, "patch_size 2 is not supported, only 1"),
        ({"pe_mode": "rope"}, "pe_mode 'rope' is not supported, only 'ape'"),
        ({"windows": 3}, "TypeError: .*windows"),
        ({"num_blocks": 3}, "RuntimeError: .*Missing key.*blocks.2"),
        ({"num_blocks": 1}, "RuntimeError: .*Unexpected key.*blocks.1"),
        ({"in_channels": 4}, "RuntimeError: .*size mismatch for input_layer.weight"),
    ):
        config.write_text(json.dumps({"name": "SparseStructureFlowModel", "args": tiny.FLOW | option}))
        refused(folder, message)
    config.write_text(kept)
    vae = folder / "ckpts" / "ss_dec_conv3d_16l8_fp16.json"
    vae.write_text(json.dumps({"name": "SparseStructureDecoder", "args": tiny.DECODER | {"norm_type": "group"}}))
    refused(folder, "norm_type 'group' is not supported, only 'layer'")
    assert weights.is_file()


def test_condition_models_that_do_not_fit(folder, clip, tmp_path):
    refused(folder, r"has no 'image_model', did you mean|has no 'image_model'", {"image_model": "x"})
    refused(folder, "is a clip model; dinov2_with_registers is needed", {"image_cond_model": str(clip)})
    wide = tmp_path / "wide"
    tiny.write_dino(wide, 24)
    refused(folder, "reads tokens of size 16, its image_cond_model gives 24", {"image_cond_model": str(wide)})
    file = folder / "dinov2" / "model.safetensors"
    state = load_file(file)
    del state["encoder.layer.1.norm2.weight"]
    save_file(state, file, metadata={"format": "pt"})
    refused(folder, "lacks weights: encoder.layer.1.norm2.weight")
    file.unlink()
    refused(folder, "cannot load .*dinov2 as Dinov2WithRegistersModel")


def test_adapters_that_do_not_fit(folder, tmp_path):
    family = load_family("trellis", str(folder), "cpu")
    add_lora(family.net, 2, None, family.lora_targets)
    lora = tmp_path / "lora"
    family.save_lora(lora, family.net)
    file = lora / "adapter_model.safetensors"
    state = load_file(file)

    def refuse(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_family("trellis", str(folder), "cpu", str(lora))

    some = "base_model.model.blocks.1.cross_attn.to_q.lora_A.weight"
    save_file({key: value for key, value in state.items() if key != some}, file)
    refuse("19 of 19 tensors fit the 20 of its config")
    save_file(state | {some.replace("blocks.1", "blocks.7"): state[some].clone()}, file)
    refuse("20 of 21 tensors fit the 20 of its config")
    save_file(state | {some: torch.zeros(2, 33)}, file)
    refuse("does not fit this trellis: RuntimeError")
    (lora / "adapter_config.json").write_text("{}")
    refuse("does not fit this trellis")
    (lora / "adapter_config.json").unlink()
    refuse("holds no adapter_config.json")
    file.unlink()
    refuse("holds no adapter_model.safetensors")
    with pytest.raises(UserError, match=r"model\.lora\.targets"):
        add_lora(load_family("trellis", str(folder), "cpu").net, 2, None, ["to_nothing"])
