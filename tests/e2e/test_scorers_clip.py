"""The CLIP scorers on small random checkpoints in the published layouts, against the libraries and released numbers."""

import gc
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from diffalign import records, scoring
from diffalign.errors import UserError
from diffalign.scoring import Failure, Sample, load_scorer

from . import tiny_scorers as tiny

PACKAGE = scoring._package()
CLOSE = {"rel": 1e-4, "abs": 1e-6}


def samples() -> list[Sample]:
    return [Sample(prompt, image=image) for prompt, image in zip(tiny.PROMPTS, tiny.pictures(), strict=True)]


def values(scorer, some=None) -> list[float]:
    return [outcome.value for outcome in scorer(samples() if some is None else some)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The name of a small architecture of open_clip."""
    return tiny.clip_config(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    """Its weights as HPSv2 publishes them: a state dict under a key."""
    path = tmp_path_factory.mktemp("weights") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": tiny.clip_state(model), "epoch": 1}, path)
    return path


@pytest.fixture
def calls(monkeypatch):
    """How many pictures and prompts each call of open_clip's encoders got."""
    from open_clip.model import CLIP

    counts: dict[str, list[int]] = {"encode_image": [], "encode_text": []}
    for name, sizes in counts.items():
        theirs = getattr(CLIP, name)

        def counted(self, x, *args, _theirs=theirs, _sizes=sizes, **kwargs):
            _sizes.append(len(x))
            return _theirs(self, x, *args, **kwargs)

        monkeypatch.setattr(CLIP, name, counted)
    return counts


@pytest.fixture
def predictor(tmp_path):
    """The aesthetic predictor's file on an embedding of 16 numbers, and the same as a plain stack."""
    stack = nn.Sequential()
    for name, layer in (
        *(("0", nn.Linear(16, 1024)), ("1", nn.Dropout(0.2)), ("2", nn.Linear(1024, 128)), ("3", nn.Dropout(0.2))),
        *(("4", nn.Linear(128, 64)), ("5", nn.Dropout(0.1)), ("6", nn.Linear(64, 16)), ("7", nn.Linear(16, 1))),
    ):
        stack.add_module(name, layer)
    path = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    state = tiny.random_state(tiny.stack_shapes(16))
    torch.save(state, path)
    stack.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    return path, stack.eval()


@pytest.fixture
def small_aesthetic(monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.aesthetic"), "WIDTH", 16)


def open_clip_features(model, weights):
    """Unit vectors of the samples by open_clip alone, one at a time."""
    import open_clip

    net, _, transform = open_clip.create_model_and_transforms(model, str(weights), weights_only=True)
    tokenizer = open_clip.get_tokenizer(model)
    net.eval()
    with torch.no_grad():
        pairs = [
            (net.encode_image(transform(s.image)[None], True), net.encode_text(tokenizer([s.prompt]), True))
            for s in samples()
        ]
    images, texts = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return images, texts, net.logit_scale.exp().item()


def test_clip_is_open_clip(model, weights):
    images, texts, scale = open_clip_features(model, weights)
    cosines = (images * texts).sum(-1)
    assert cosines.std() > 0.05  # the pictures and prompts do matter
    expected = {
        "cosine": cosines,
        "clipscore": 2.5 * cosines.clamp(min=0),
        "logit": scale * cosines / 100,
    }
    assert (expected["clipscore"] == 0).any()
    for metric, numbers in expected.items():
        found = values(load_scorer("clip", model=model, pretrained=str(weights), metric=metric, device="cpu"))
        assert found == pytest.approx(numbers.tolist(), **CLOSE)


@pytest.mark.parametrize("layout", ["plain.pt", "parallel.pt", "plain.safetensors"])
def test_clip_reads_every_layout_of_a_file(model, weights, tmp_path, layout):
    from safetensors.torch import save_file

    state = tiny.clip_state(model)
    if layout == "parallel.pt":
        state = {f"module.{key}": value for key, value in state.items()}
    (save_file if layout.endswith("safetensors") else torch.save)(state, tmp_path / layout)
    found, expected = (
        values(load_scorer("clip", model=model, pretrained=str(path), device="cpu"))
        for path in (tmp_path / layout, weights)
    )
    assert found == expected


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_folder_brings_its_own_preprocessing(model, tmp_path, mode):
    import open_clip

    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": mode, "interpolation": "bilinear"}
    whole = {"model_cfg": tiny.CLIP, "preprocess_cfg": settings}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(whole))
    torch.save(tiny.clip_state(model), tmp_path / "open_clip_pytorch_model.bin")
    name = f"local-dir:{tmp_path}"
    net, _, transform = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        expected = [net.eval().encode_image(transform(image)[None], True) for image in tiny.pictures()]
    encoder = load_scorer("clip", model=name, device="cpu").encoder
    torch.testing.assert_close(encoder.images(tiny.pictures(), 3), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_openai_weights_get_their_activation(monkeypatch):
    """Their tag asks for QuickGELU, which the plain name of the architecture does not have."""
    import open_clip

    asked = {}

    def create_model(model, pretrained=None, **settings):
        asked.update(settings, model=model, pretrained=pretrained)
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(UserError, match=r"^ViT-L-14 openai cannot be loaded: OSError: no network$"):
        load_scorer("clip", model="ViT-L/14", device="cpu")
    assert asked == {"model": "ViT-L-14", "pretrained": "openai", "force_quick_gelu": True, "require_pretrained": True}


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory):
    """A folder as PickScore's, of a small ``CLIPModel``, and one with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    from diffalign.worlds.shapes.pretrain import _tokenizer

    folder = tmp_path_factory.mktemp("pickscore")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    net = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ids},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    )
    net.load_state_dict({**tiny.random_state(tiny.shapes_of(net)), "logit_scale": torch.tensor(3.0)})
    net.save_pretrained(folder / "model")
    return str(folder / "model"), str(folder / "tokenizer")


def test_pickscore_is_the_diagonal_of_transformers_logits(pickscore):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = pickscore
    net = CLIPModel.from_pretrained(model).eval()
    side = {"height": 32, "width": 32}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)(tiny.pictures(), return_tensors="pt")
    words = AutoTokenizer.from_pretrained(tokenizer)(list(tiny.PROMPTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = net(**pixels, **words).logits_per_image.diagonal()
    assert logits.std() > 0.5
    for metric, scale in (("published", 1.0), ("cosine", np.exp(3.0))):
        scorer = load_scorer("pickscore", weights=model, tokenizer=tokenizer, metric=metric, device="cpu", batch=2)
        assert values(scorer) == pytest.approx((logits / scale).tolist(), **CLOSE)


def test_pickscore_is_loaded_whole_or_not_at_all(pickscore, tmp_path):
    from safetensors.torch import load_file, save_file

    model, tokenizer = pickscore
    shutil.copy(Path(model, "config.json"), tmp_path)
    state = load_file(f"{model}/model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as in the published file
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = {"weights": str(tmp_path), "tokenizer": tokenizer, "device": "cpu"}
    assert values(load_scorer("pickscore", **whole)) == values(load_scorer("pickscore", **{**whole, "weights": model}))
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit the network; missing: visual_projection\.weight$"):
        load_scorer("pickscore", **whole)


def test_hpsv2_gives_the_released_numbers(model, weights, monkeypatch):
    """Of hpsv2 1.2.0 (its own open_clip and transform, torchvision 0.29) on the same weights, pictures and prompts."""
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.hpsv2"), "MODEL", model)
    released = [0.1103036031126976, 0.14450332522392273, -0.12952189147472382]
    for where in (weights, weights.parent):
        assert values(load_scorer("hpsv2", weights=str(where), device="cpu")) == pytest.approx(released, **CLOSE)
    by_clip = values(load_scorer("clip", model=model, pretrained=str(weights), device="cpu"))
    assert abs(by_clip[2] - released[2]) < 0.002  # a square picture differs by the rounding to bytes
    assert abs(by_clip[0] - released[0]) > 0.01


def test_aesthetic_is_a_stack_on_the_embedding(model, weights, predictor, small_aesthetic):
    path, stack = predictor
    with torch.no_grad():
        expected = stack(open_clip_features(model, weights)[0])[:, 0]
    assert expected.std() > 0.1
    for where in (path, path.parent):
        scorer = load_scorer("aesthetic", weights=str(where), model=model, pretrained=str(weights), device="cpu")
        assert values(scorer) == pytest.approx(expected.tolist(), **CLOSE)


def test_each_prompt_and_each_picture_is_encoded_once(model, weights, predictor, small_aesthetic, calls):
    """By two scorers of the same weights together, in calls of up to ``batch``."""
    network = {"model": model, "pretrained": str(weights), "device": "cpu", "batch": 2}
    clip = load_scorer("clip", **network)
    aesthetic = load_scorer("aesthetic", weights=str(predictor[0]), **network)
    assert clip.encoder is aesthetic.encoder
    group = samples()
    assert [s.prompt for s in group].count("a red cat") == 2
    first = values(clip, group)
    assert calls == {"encode_image": [2, 1], "encode_text": [2]}
    values(aesthetic, group)
    assert calls == {"encode_image": [2, 1], "encode_text": [2]}
    again = Sample("a mat", image=group[0].image)
    assert values(clip, [again, *samples()])[1:] == pytest.approx(first, **CLOSE)  # new pictures, alike
    assert calls == {"encode_image": [2, 1, 2, 1], "encode_text": [2, 2, 1]}


def test_the_command_encodes_each_picture_once(
    cli, config, own_pairs, model, weights, predictor, small_aesthetic, calls
):
    network = {"model": model, "pretrained": str(weights), "device": "cpu"}
    scorers = [
        {"name": "clip", "label": "clip", "params": network},
        {"name": "aesthetic", "label": "looks", "params": {**network, "weights": str(predictor[0])}},
    ]
    path = config("score")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "scorers": scorers, "batch": 8}))
    outcome = cli("score", path)
    assert outcome.code == 0, outcome.err
    made = list(records.read(own_pairs.with_name("scored.jsonl")))
    labels = [candidate.labels for record in made for candidate in record.candidates]
    assert len(labels) == 32
    for label in ("clip", "looks"):
        assert len({numbers[label] for numbers in labels}) > 16
    assert sum(calls["encode_image"]) == 32


def test_what_is_remembered_goes_with_the_picture_and_the_scorers(model, weights):
    clip = load_scorer("clip", model=model, pretrained=str(weights), device="cpu")
    group = samples()
    values(clip, group)
    assert len(clip.encoder._seen) == 3
    del group
    gc.collect()
    assert len(clip.encoder._seen) == 0
    loaded = importlib.import_module(f"{PACKAGE}._clip")._loaded
    before = len(loaded)
    del clip
    gc.collect()
    assert len(loaded) == before - 1


def test_only_the_same_weights_in_the_same_dtype_are_shared(model, weights, tmp_path):
    other = tmp_path / "other.pt"
    torch.save(tiny.clip_state(model, seed=1), other)
    network = {"model": model, "pretrained": str(weights), "device": "cpu"}
    clip = load_scorer("clip", **network)
    assert load_scorer("clip", metric="clipscore", batch=3, **network).encoder is clip.encoder
    rounded = load_scorer("clip", dtype="bf16", **network)
    changed = load_scorer("clip", **{**network, "pretrained": str(other)})
    assert rounded.encoder is not clip.encoder is not changed.encoder
    exact = values(clip)
    assert values(rounded) == pytest.approx(exact, abs=0.03)
    assert values(rounded) != exact
    assert max(abs(a - b) for a, b in zip(values(changed), exact, strict=True)) > 0.05


def test_a_bad_item_costs_no_other_its_score(model, weights, predictor, small_aesthetic):
    network = {"model": model, "pretrained": str(weights), "device": "cpu"}
    bad = [Image.new("RGB", (0, 7)), Image.new("RGB", (9000, 2))]
    for scorer in (load_scorer("clip", **network), load_scorer("aesthetic", weights=str(predictor[0]), **network)):
        expected = values(scorer)
        good = samples()
        outcomes = scorer([Sample("x", image=bad[0]), *good[:2], Sample("x", image=bad[1]), good[2]])
        assert [type(outcome) is Failure for outcome in outcomes] == [True, False, False, True, False]
        assert [str(outcomes[0]), str(outcomes[3])] == [
            "input: a picture of 0x7 pixels",
            "input: a picture of 9000x2 pixels",
        ]
        assert [outcomes[n].value for n in (1, 2, 4)] == pytest.approx(expected, **CLOSE)
        assert all(isinstance(outcome, Failure) for outcome in scorer([Sample("x", image=image) for image in bad]))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"metric": "dot"}, r"scorer 'clip': metric 'dot': choose cosine, clipscore, logit"),
        ({"dtype": "fp8"}, r"dtype 'fp8': choose fp32, bf16, fp16"),
        ({"batch": 0}, r"batch 0: expected a positive integer"),
        ({"device": "gpu7"}, r"device 'gpu7': .*"),
        ({"model": "ViT-L-15"}, r"model 'ViT-L-15': not one of open_clip; did you mean .*'ViT-L-14'.*\?"),
        ({"model": "ViT-L-14", "pretrained": "opanai"}, r"pretrained 'opanai': no such file, and no tag of ViT-L-14.*"),
        ({"model": "local-dir:/gone"}, r"local-dir:/gone cannot be loaded: FileNotFoundError: .*"),
        ({"model": "ViT-B-32"}, r"\S*HPS_v2.1_compressed.pt does not fit the network; .*another shape: .* more"),
    ],
)
def test_bad_parameters_are_one_line(model, weights, changes, complaint):
    with pytest.raises(UserError, match=rf"^{complaint}$") as caught:
        load_scorer("clip", **{"model": model, "pretrained": str(weights), "device": "cpu", **changes})
    assert "\n" not in str(caught.value)


class Nasty:
    def __reduce__(self):
        return print, ("unpickled",)


def test_bad_files_are_one_line(model, tmp_path, predictor, small_aesthetic, capsys):
    path, _ = predictor
    state = torch.load(path, weights_only=True)
    cases = {
        r"gone\.pth: no such file": None,
        r"folder holds no sac\+logos\+ava1-l14-linearMSE\.pth": "folder",
        r"text\.pth: no file of plain tensors \(\w+\); objects and scripts are not unpickled": b"not a checkpoint",
        r"nasty\.pth: no file of plain tensors \(UnpicklingError\); .*": {**state, "x": Nasty()},
        r"list\.pth: holds no state dict of named tensors": [1, 2],
        r"part\.pth does not fit the network; missing: layers\.7\.bias; unexpected: layers\.8\.bias": {
            **{key: value for key, value in state.items() if key != "layers.7.bias"},
            "layers.8.bias": state["layers.7.bias"],
        },
    }
    (tmp_path / "folder").mkdir()
    for complaint, content in cases.items():
        name = tmp_path / complaint.partition(" ")[0].partition(":")[0].replace("\\", "")
        if isinstance(content, bytes):
            name.write_bytes(content)
        elif content is not None and content != "folder":
            torch.save(content, name)
        with pytest.raises(UserError, match=rf"^\S*{complaint}$"):
            load_scorer("aesthetic", weights=str(name), model=model, device="cpu")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("broken", [ModuleNotFoundError, RuntimeError])
def test_a_missing_or_broken_package_is_one_line(model, weights, monkeypatch, tmp_path, broken):
    if broken is ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, "open_clip", None)
        complaint = r"no module 'open_clip': pip install 'diffalign\[scorers\]'"
    else:  # what importing torchvision raises next to another torch than its own
        (tmp_path / "open_clip.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
        monkeypatch.delitem(sys.modules, "open_clip")
        monkeypatch.syspath_prepend(tmp_path)
        complaint = (
            r"open_clip cannot be imported \(operator .* does not exist\); `diffalign doctor` checks the versions"
        )
    with pytest.raises(UserError, match=rf"^{complaint}$"):
        load_scorer("clip", model=model, pretrained=str(weights), device="cpu", dtype="fp16")
