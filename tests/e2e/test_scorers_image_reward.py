"""ImageReward on small random weights under the published names, against the released code's numbers."""

import importlib
from functools import partial

import pytest
import torch
from PIL import Image

from diffalign import scoring
from diffalign.errors import UserError
from diffalign.scoring import Failure, Sample, load_scorer

from . import tiny_scorers as tiny

blip = importlib.import_module(f"{scoring._package()}._blip")

PROMPTS = (*tiny.PROMPTS, "a very very red cat, " * 20)  # the last has more than 35 tokens
RELEASED = [-3.5458693504333496, -3.394676446914673, -0.29639220237731934, 2.124368667602539]
BY_PROMPT = [-3.5458693504333496, -4.425745487213135, -3.5458693504333496, -3.166893720626831]
"""Of image-reward 1.5 with transformers 4.30.2, timm 0.6.13 and torch 2.15: each picture with its prompt, and the first
picture with each prompt."""


def pictures() -> list[Image.Image]:
    return [*tiny.pictures(), tiny.picture(90, 33)]


def values(scorer, images) -> list[float]:
    samples = [Sample(prompt, image=image) for prompt, image in zip(PROMPTS, images, strict=True)]
    return [outcome.value for outcome in scorer(samples)]


@pytest.fixture
def params(monkeypatch, tmp_path):
    """What builds the scorer at a small size, from a folder."""
    monkeypatch.setattr(blip, "Sizes", partial(blip.Sizes, **tiny.REWARD))
    torch.save(tiny.reward_state(), tmp_path / "ImageReward.pt")
    tokenizer = tiny.bert_tokenizer(tmp_path / "bert")
    return {"weights": str(tmp_path), "tokenizer": str(tokenizer), "device": "cpu"}


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_gives_the_released_numbers(params, batch):
    scorer = load_scorer("image_reward", batch=batch, **params)
    assert values(scorer, pictures()) == pytest.approx(RELEASED, rel=1e-4)
    assert values(scorer, pictures()[:1] * 4) == pytest.approx(BY_PROMPT, rel=1e-4)


def test_rounded_weights_leave_about_the_same(params):
    exact, rounded = (
        values(load_scorer("image_reward", dtype=dtype, **params), pictures()) for dtype in ("fp32", "bf16")
    )
    assert rounded == pytest.approx(exact, abs=0.4)
    assert rounded != exact


def test_a_bad_item_costs_no_other_its_score(params):
    scorer = load_scorer("image_reward", **params)
    outcomes = scorer([Sample("x", image=Image.new("RGB", (5, 0))), Sample(PROMPTS[0], image=pictures()[0])])
    assert isinstance(outcomes[0], Failure)
    assert outcomes[1].value == pytest.approx(RELEASED[0], rel=1e-4)


def test_the_published_sizes():
    """The parameters of the released code at its own size: ViT-L/16, BERT base that attends to it, the stack."""
    with torch.device("meta"):
        net = blip.RewardNet(blip.Sizes())
    counts = [sum(p.numel() for p in part.parameters()) for part in (net.vision, net.text, net.head)]
    assert counts == [303_301_632, 141_977_088, 927_969]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda state: state.pop("blip.visual_encoder.norm.bias"), "missing: vision.post_layernorm.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda state: state.update({"mlp.layers.7.bias": torch.zeros(2)}),
            r"another shape: head.7.bias \(2,\) for \(1,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(params, tmp_path, spoil, complaint):
    state = tiny.reward_state()
    spoil(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=rf"ImageReward\.pt does not fit the network; {complaint}$"):
        load_scorer("image_reward", **params)
