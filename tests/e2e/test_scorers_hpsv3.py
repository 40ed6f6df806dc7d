"""HPSv3 on a small random Qwen2-VL in the published layout, against stock classes of transformers."""

import importlib
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffalign import scoring
from diffalign.errors import UserError
from diffalign.scoring import Failure, Sample, load_scorer

from . import tiny_scorers as tiny

reward = importlib.import_module(f"{scoring._package()}._qwen_reward")

PROMPTS = (*tiny.PROMPTS, "a <|Reward|> {text_prompt} on a mat , very very very red")
ASK, SUFFIX = "\nlook at it: {text_prompt}\n", "\nthe rating: <|Reward|>\n\nEND\n"
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def pictures() -> list[Image.Image]:
    """Of which some shrink, and one has the right number of pixels."""
    return [tiny.picture(500, 370), tiny.picture(37, 51, 5), tiny.picture(448, 448, 9), tiny.picture(1000, 300)]


def samples() -> list[Sample]:
    return [Sample(prompt, image=image) for prompt, image in zip(PROMPTS, pictures(), strict=True)]


def tokenizer():
    """Words and marks; each letter that is in no word is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *tiny.WORDS[5:], "look", "at", "it", ":", "the", "rating", "END", "user", "assistant", *MARKS]
    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": list(MARKS[1:])})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The base folder, the published file in both layouts, the wording, and the network they are of."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    folder = tmp_path_factory.mktemp("hpsv3")
    words = tokenizer()
    words.save_pretrained(folder / "base")
    config = Qwen2VLConfig(
        text_config={
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 1, "vocab_size": len(words) + 9, "max_position_embeddings": 2048},
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            "pad_token_id": words.pad_token_id,
        },
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2},
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    config.save_pretrained(folder / "base")
    config.text_config.vocab_size = len(words) + 1  # and the token of the reward
    net = Qwen2VLModel(config).eval()
    head = nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
    for part, seed in ((net, 0), (head, 1)):
        part.load_state_dict(tiny.random_state(tiny.shapes_of(part), seed))
    own = {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    own["lm_head.weight"] = torch.zeros(len(words) + 1, 16)
    body = net.state_dict()
    save_file({**own, **{f"model.{key}": value for key, value in body.items()}}, folder / "new.safetensors")
    old = {key.replace("language_model.", "model."): value for key, value in body.items()}
    save_file({**own, **old}, folder / "HPSv3.safetensors")
    source = f"import no_such_module\nINSTRUCTION = {ASK!r}\nprompt_with_special_token = {SUFFIX!r}\n"
    (folder / "data_collator_qwen.py").write_text(source)
    return folder, net, head.eval()


@pytest.fixture
def params(release):
    folder = release[0]
    wording = str(folder / "data_collator_qwen.py")
    return {"wording": wording, "weights": str(folder), "base": str(folder / "base"), "device": "cpu", "dtype": "fp32"}


@pytest.fixture(scope="module")
def expected(release):
    """By stock classes, one sample at a time: mean and log standard deviation."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    _, net, head = release
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    pixels = 256 * 28 * 28
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": pixels, "longest_edge": pixels})
    numbers = []
    for sample in samples():
        seen = processor(sample.image, return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // 4
        text = ASK.format(text_prompt=sample.prompt) + SUFFIX
        chat = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{text}<|im_end|>\n"
        ids = words(f"{chat}<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = net(input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1), **seen)[0][0]
            place = (ids[0] == words.convert_tokens_to_ids("<|Reward|>")).nonzero()[-1, 0]
            numbers.append(head(states[place]).tolist())
    return numbers


@pytest.mark.parametrize("file", ["HPSv3.safetensors", "new.safetensors"])
@pytest.mark.parametrize("batch", [1, 3])
def test_gives_the_numbers_of_stock_classes(release, params, expected, file, batch):
    scorer = load_scorer("hpsv3", **{**params, "weights": str(release[0] / file), "batch": batch})
    outcomes = scorer(samples())
    found = [(outcome.value, math.log(outcome.detail["sigma"])) for outcome in outcomes]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert torch.tensor(expected).std(0).min() > 0.01


def test_a_bad_item_costs_no_other_its_score(params, expected):
    outcomes = load_scorer("hpsv3", **params)([Sample("x", image=Image.new("RGB", (0, 1))), samples()[0]])
    assert isinstance(outcomes[0], Failure)
    assert outcomes[1].value == pytest.approx(expected[0][0], rel=1e-4, abs=1e-5)


def test_pictures_are_sized_like_the_release():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for width, height in [(500, 370), (37, 51), (448, 448), (64, 64), (1024, 1024), (1000, 7), (1, 90), (896, 224)]:
        fitted = reward.fit_pixels(Image.new("RGB", (width, height)), 28)
        if min(width, height) > 14:  # else the stock function of transformers starts from a side of 0
            assert fitted.size[::-1] == smart_resize(height, width, 28, reward.PIXELS, reward.PIXELS)
        assert 0.8 < fitted.size[0] * fitted.size[1] / reward.PIXELS < 1.6


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1", "defines no string INSTRUCTION or prompt_with_special_token"),
        ("INSTRUCTION = 'a' + 'b'\nprompt_with_special_token = ''", "defines no string INSTRUCTION"),
        ("INSTRUCTION = 'rate it'\nprompt_with_special_token = ''", r"expected one \{text_prompt\} in INSTRUCTION .*"),
        ("def (", "SyntaxError: .*"),
        (None, "FileNotFoundError: .*"),
    ],
)
def test_a_wording_that_cannot_be_read_is_one_line(params, tmp_path, source, complaint):
    path = tmp_path / "wording.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=rf"^\S*wording\.py: {complaint}$"):
        load_scorer("hpsv3", **{**params, "wording": str(path)})


@pytest.mark.parametrize("key", ["visual.merger.ln_q.weight", "rm_head.5.bias"])
def test_weights_that_do_not_fit_are_one_line(release, params, tmp_path, key):
    from safetensors.torch import load_file

    state = load_file(release[0] / "HPSv3.safetensors")
    state["rm_head.9.bias"] = state.pop(key)
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError, match=rf"HPSv3\.safetensors does not fit the network; missing: {key}"):
        load_scorer("hpsv3", **{**params, "weights": str(tmp_path)})
