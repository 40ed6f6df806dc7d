"""Files from elsewhere are data: none of them makes this project run code, read outside its folder, or eat memory.

Every attack here would create ``FLAG`` if it worked, and the first test shows that the pickle does.
"""

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign import records

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer.transformer_blocks.0.attn.to_q.lora_"
LORA = {f"{PREFIX}A.weight": torch.zeros(2, 16), f"{PREFIX}B.weight": torch.zeros(16, 2)}


class Attack:
    """Unpickling this makes a folder."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.fixture
def flag(tmp_path):
    """What an attack would create; that it did not is checked after every test."""
    path = tmp_path / "FLAG"
    yield path
    assert not path.exists(), "the attack was carried out"


def code(flag: Path) -> str:
    return f"import os\nos.mkdir({str(flag)!r})\n\nclass Evil:\n    pass\n"


def test_the_attack_works_on_a_careless_reader(tmp_path):
    torch.save({"x": Attack(tmp_path / "FLAG")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "FLAG").is_dir()


# --- checkpoints --------------------------------------------------------------------------------------------------


def in_the_optimizer(state: Path, flag: Path) -> None:
    torch.save({**torch.load(state, weights_only=True), "optimizer": Attack(flag)}, state)


def legacy_format(state: Path, flag: Path) -> None:
    torch.save({"step": Attack(flag)}, state, _use_new_zipfile_serialization=False)


def bare_pickle(state: Path, flag: Path) -> None:
    state.write_bytes(pickle.dumps(Attack(flag)))


def weights_as_pickle(state: Path, flag: Path) -> None:
    torch.save({"x": Attack(flag)}, state.with_name("weights.safetensors"))


def weights_beside_a_pickle(state: Path, flag: Path) -> None:
    state.with_name("weights.safetensors").unlink()
    torch.save({"x": Attack(flag)}, state.with_name("pytorch_model.bin"))


@pytest.mark.parametrize(
    "attack", [in_the_optimizer, legacy_format, bare_pickle, weights_as_pickle, weights_beside_a_pickle]
)
def test_malicious_checkpoint(cli, refused, config, warm, tmp_path, flag, attack):
    path, checkpoint = config("train"), tmp_path / "run/checkpoint-000002"
    assert cli("train", path).code == 0
    attack(checkpoint / "state.pt", flag)
    words = ("train", path, "run.steps=3", "--resume")
    for resume in ("latest", checkpoint):
        refused(*words, resume, names=[checkpoint, "not a readable checkpoint", "resume from another"])
    code, err = warm.run(*words, "latest")
    assert (code, err.count("\n")) == (2, 1), f"warnings are lines too: {err}"
    assert not (tmp_path / "run/checkpoint-000003").exists()


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "pytorch_model.bin", "adapter_model.bin", LORA_FILE])
def test_malicious_adapter(refused, config, tmp_path, flag, name):
    torch.save({"x": Attack(flag)}, tmp_path / name)
    refused("generate", config("generate"), f"model.adapter={tmp_path}", names=["model.adapter", tmp_path])
    file = tmp_path / name
    refused("generate", config("generate"), f"model.adapter={file}", names=["model.adapter", file])


def test_broken_safetensors_do_not_fall_back_to_a_pickle(refused, config, tmp_path, flag):
    (tmp_path / LORA_FILE).write_bytes(b"broken")
    torch.save({"x": Attack(flag)}, tmp_path / "pytorch_lora_weights.bin")
    refused("generate", config("generate"), f"model.adapter={tmp_path}", names=["model.adapter", tmp_path])


def test_a_pickle_beside_a_sound_adapter_is_not_opened(cli, config, tmp_path, flag):
    save_file(LORA, tmp_path / LORA_FILE)
    for name in ("pytorch_lora_weights.bin", "pytorch_model.bin"):
        torch.save({"x": Attack(flag)}, tmp_path / name)
    assert cli("generate", config("generate"), f"model.adapter={tmp_path}").code == 0


@pytest.mark.parametrize("header", [b"\xff" * 8, struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_safetensors_with_a_lying_header(refused, config, tmp_path, header):
    (tmp_path / LORA_FILE).write_bytes(header)
    refused("generate", config("generate"), f"model.adapter={tmp_path}", names=["model.adapter", tmp_path])


# --- model folders ------------------------------------------------------------------------------------------------


def index(folder: Path, **changes) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def custom_component(folder: Path, flag: Path) -> None:
    (folder / "transformer/evil.py").write_text(code(flag))
    index(folder, transformer=["evil", "Evil"])


def custom_pipeline(folder: Path, flag: Path) -> None:
    (folder / "evil.py").write_text(code(flag))
    index(folder, _class_name=["evil", "Evil"])


def any_module(folder: Path, flag: Path) -> None:
    index(folder, scheduler=["os", "system"])


def outside_module(folder: Path, flag: Path) -> None:
    (folder.parent / "evil.py").write_text(code(flag))
    index(folder, scheduler=["../evil", "Evil"])


@pytest.mark.parametrize("attack", [custom_component, custom_pipeline, any_module, outside_module])
def test_model_folder_that_brings_code(refused, config, own_sd3, flag, attack):
    attack(own_sd3, flag)
    refused("generate", config("generate"), f"model.path={own_sd3}", names=["model.path", own_sd3, "is code from"])


@pytest.mark.parametrize(
    ("weights", "instead"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder/model.safetensors", "pytorch_model.bin"),
    ],
)
def test_model_folder_with_pickled_weights(refused, config, own_sd3, flag, weights, instead):
    (own_sd3 / weights).unlink()
    torch.save({"x": Attack(flag)}, (own_sd3 / weights).with_name(instead))
    refused("generate", config("generate"), f"model.path={own_sd3}", names=["model.path", own_sd3])


@pytest.mark.parametrize("part", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_auto_map_is_not_followed(cli, config, own_sd3, flag, part):
    """Nothing needs the code, so the model loads; what must not happen is that the code runs."""
    path = own_sd3 / part
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": names}))
    path.with_name("evil.py").write_text(code(flag))
    assert cli("generate", config("generate"), f"model.path={own_sd3}").code == 0


# --- YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{}]", "!!python/object/new:os.mkdir [{}]", "!!python/name:os.mkdir"]
)
def test_yaml_cannot_make_objects(refused, config, flag, tag):
    value = tag.format(flag)
    path = config("train")
    refused("train", path, f"data.size={value}", names=["data.size", "not valid YAML"])
    path.write_text(path.read_text() + f"\nextra: {value}\n")
    refused("train", path, names=[path, "not valid YAML", "python/"])


def test_yaml_aliases_do_not_explode(refused, tmp_path):
    path = tmp_path / "bomb.yaml"
    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(["k0: &k0 [x, x]", *levels, "run: *k11", "model: {family: *k11}"]))
    err = refused("train", path, names=[path, "run"])
    assert len(err) < 20_000


# --- records ------------------------------------------------------------------------------------------------------


def point_at(own_pairs: Path, sample: str) -> None:
    rows = own_pairs.read_text().splitlines()
    row = json.loads(rows[3])
    row["candidates"][1]["sample"] = sample
    own_pairs.write_text("\n".join([*rows[:3], json.dumps(row), *rows[4:]]) + "\n")


@pytest.mark.parametrize(
    "sample", ["../secret.png", "media/../../secret.png", "{}/secret.png", "..\\secret.png", "C:/x"]
)
def test_records_do_not_leave_their_folder(refused, config, own_pairs, tmp_path, sample):
    sample = sample.format(tmp_path)
    (own_pairs.parent / "media/000003-1.png").rename(tmp_path / "secret.png")
    point_at(own_pairs, sample)
    for verb, *more in (("train",), ("score", "failures=0")):
        refused(verb, config(verb), *more, names=[repr(sample), "must be relative to"])


def test_links_do_not_lead_out_of_the_folder(refused, config, own_pairs, tmp_path):
    secret, media = tmp_path / "outside/secret.png", own_pairs.parent / "media"
    secret.parent.mkdir()
    (media / "000003-1.png").rename(secret)
    (media / "000003-1.png").symlink_to(secret)
    for verb, *more in (("train",), ("score", "failures=0")):
        refused(verb, config(verb), *more, names=["'media/000003-1.png'", "a link leads out of"])
    (media / "linked").symlink_to(secret.parent)
    point_at(own_pairs, "media/linked/secret.png")
    for verb, *more in (("train",), ("score", "failures=0")):
        refused(verb, config(verb), *more, names=["'media/linked/secret.png'", "a link leads out of"])


def png(width: int, height: int) -> bytes:
    """A tiny file that says it is a large image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (100_000, 100_000), (2**31 - 1, 1)])
def test_decompression_bombs(refused, config, own_pairs, width, height):
    (own_pairs.parent / "media/000003-1.png").write_bytes(png(width, height))
    for verb, *more in (("train",), ("score", "failures=0")):
        refused(verb, config(verb), *more, names=["media/000003-1.png", f"more than {records.MAX_PIXELS:,} pixels"])


def test_an_image_that_is_a_pipe_or_a_folder_does_not_block(refused, config, own_pairs):
    image = own_pairs.parent / "media/000003-1.png"
    image.unlink()
    os.mkfifo(image)
    for verb, *more in (("train",), ("score", "failures=0")):
        refused(verb, config(verb), *more, names=["'000003'", image, "no such image"])
    image.unlink()
    image.mkdir()
    for verb, *more in (("train",), ("score", "failures=0")):
        refused(verb, config(verb), *more, names=["'000003'", image, "no such image"])


@pytest.mark.parametrize("line", ['{"id": ' + "[" * 100_000, '{"id": "x", "meta": {"a": ' + '{"a":' * 50_000])
def test_deeply_nested_records(refused, config, own_pairs, line):
    own_pairs.write_text(own_pairs.read_text() + line + "\n")
    refused("score", config("score"), names=[f"{own_pairs}:17", "not valid JSON"])
