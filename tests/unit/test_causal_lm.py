"""The language model family: templates and masks, sampling by seed, log-probs of tokens, files other programs read."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffalign.errors import UserError
from diffalign.estimate import tokens
from diffalign.families import causal_lm
from diffalign.families.base import load_family
from diffalign.records import Candidate, Record
from diffalign.textset import TextDataset
from diffalign.types import Decoding, Request
from diffalign.weights import Weights, add_lora

from . import tiny_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_text.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def family(folder) -> causal_lm.Family:
    return load_family("causal_lm", str(folder), "cpu")


def counted(family, encoded) -> list[str]:
    """The stretches of text that count."""
    text, out = family.tokenizer.convert_ids_to_tokens(encoded.ids), [""]
    for token, counts in zip(text, encoded.counts, strict=True):
        if counts:
            out[-1] += token
        elif out[-1]:
            out.append("")
    return [part for part in out if part]


# --- templates ------------------------------------------------------------------------------------------------------


def test_plain_prompt_and_completion_are_one_exchange(family):
    encoded = family.encode("1+1", "2")
    assert family.tokenizer.decode(encoded.ids) == "<|user|>1+1<|end|><|assistant|>2<|end|>"
    assert counted(family, encoded) == ["2<|end|>"]
    assert family.encode_prompt("1+1") == encoded.ids[: encoded.counts.index(1)]


def test_of_several_turns_only_the_assistant_s_count(family):
    turns = [("assistant", "3"), ("user", "no"), ("tool", "1+1=2"), ("assistant", "so 2")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1"}]
    encoded = family.encode(prompt, conversation)
    assert counted(family, encoded) == ["3<|end|>", "so 2<|end|>"]


def test_an_empty_completion_counts_its_end(family):
    assert counted(family, family.encode("1+1", "")) == ["<|end|>"]


def test_without_a_template_the_end_token_follows(family):
    family.tokenizer.chat_template = None
    encoded = family.encode("ab", "cd")
    assert family.tokenizer.decode(encoded.ids) == "abcd<|end|>"
    assert encoded.counts == [0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="no chat template"):
        family.encode([{"role": "user", "content": "a"}], "b")
    with pytest.raises(UserError, match="no chat template"):
        family.encode_prompt([{"role": "user", "content": "a"}])


def test_a_template_that_rewrites_the_past_is_refused(family):
    family.tokenizer.chat_template = (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(UserError, match="rewrites earlier turns"):
        family.encode("abc", "d")


# --- batches --------------------------------------------------------------------------------------------------------


def make_records() -> list[Record]:
    texts = [("1+1", ["2", "345"]), ("close ([{", ["}])", ""]), ("ab", ["c"])]
    return [
        Record(
            id=str(i),
            prompt=prompt,
            candidates=[Candidate(text=t, labels={"reward": float(-k)}) for k, t in enumerate(answers)],
        )
        for i, (prompt, answers) in enumerate(texts)
    ]


def test_a_batch_is_padded_and_its_mask_is_aligned_with_the_predicted_token(family):
    batch = TextDataset(make_records(), family).batch([0, 2], torch.Generator(), ("reward", "ids"))
    assert batch.x0.shape == (2, 2, 10)
    assert batch.mask.shape == (2, 2, 9)
    assert batch.present.tolist() == [[1, 1], [1, 0]]
    assert batch.labels["reward"].tolist() == [[0.0, -1.0], [0.0, 0.0]]
    assert torch.equal(batch.labels["ids"], batch.x0[..., 1:])
    following = batch.x0[0, 0, 1:][batch.mask[0, 0] > 0]
    assert family.tokenizer.decode(following.tolist()) == "2<|end|>"
    assert not batch.mask[1, 1].any()


def test_a_step_begins_an_answer_and_follows_a_line_break(family):
    records = [Record(id="r", prompt="1+1", candidates=[Candidate(text="a\nbc\n\nd"), Candidate(text="x")])]
    batch = TextDataset(records, family).batch([0], torch.Generator(), ("ids", "state"))
    begun = [batch.labels["ids"][0, k][batch.labels["state"][0, k] > 0].tolist() for k in range(2)]
    assert [family.tokenizer.decode(ids) for ids in begun] == ["ab\nd", "x"]
    assert torch.equal(batch.labels["state"] * batch.mask, batch.labels["state"])


def test_what_is_too_long_loses_the_start_of_its_prompt(family):
    data = TextDataset(make_records()[:1], family, max_tokens=6)
    batch = data.batch([0], torch.Generator(), ())
    assert data.truncated == 2
    assert batch.x0.shape == (1, 2, 6)
    kept = [family.tokenizer.decode(row.tolist()) for row in batch.x0[0]]
    assert kept == ["+1<|end|><|assistant|>2<|end|>", "<|end|><|assistant|>345<|end|>"]
    short = TextDataset(make_records()[:1], family, max_tokens=3).batch([0], torch.Generator(), ())
    assert family.tokenizer.decode(short.x0[0, 1].tolist()) == "<|assistant|>34"


def test_files_are_no_text(family):
    with pytest.raises(UserError, match="record 'r': a language model needs text candidates"):
        TextDataset([Record(id="r", prompt="p", candidates=[Candidate(sample="a.png")])], family)


# --- log-probs ------------------------------------------------------------------------------------------------------


def by_hand(family, ids: list[int]) -> torch.Tensor:
    logits = family.net(torch.tensor([ids])).logits[0].double()
    return F.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_log_probs_are_those_of_every_sequence_alone(family, packed):
    data = TextDataset(make_records(), family)
    weights = Weights(family.net, lora=False)
    weights.prepare(("reference",))
    batch = data.batch([0, 1, 2], torch.Generator(), ())
    lp = tokens(family, weights, batch, None, ("reference",), packed=packed)
    assert lp.by_role["policy"].shape == batch.mask.shape
    assert torch.equal(lp.by_role["policy"], lp.by_role["reference"])
    assert not lp.by_role["reference"].requires_grad
    for b, record in enumerate(make_records()):
        for k, candidate in enumerate(record.candidates):
            encoded = family.encode(record.prompt, candidate.text)
            counts = torch.tensor(encoded.counts[1:]) > 0
            expected = by_hand(family, encoded.ids)[counts]
            found = lp.by_role["policy"][b, k][batch.mask[b, k] > 0]
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert lp.sum()[2, 1] == 0.0  # a padding candidate
    lp.sum().sum().backward()
    assert all(p.grad is not None for p in family.net.parameters())


# --- sampling -------------------------------------------------------------------------------------------------------


def test_greedy_decoding_is_that_of_transformers(family):
    prompts = ["1+1", "reverse abcd"]
    ours = family.generate(family.net, [Request(p, 0) for p in prompts], Decoding(temperature=0.0, max_tokens=8))
    for prompt, text in zip(prompts, ours, strict=True):
        ids = torch.tensor([family.encode_prompt(prompt)])
        theirs = family.net.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
        assert text == family._text(theirs)


def test_a_sample_depends_on_its_seed_alone(family):
    wanted = [Request("1+1", 5), Request("reverse abcd", 6), Request("1+1", 7)]
    decoding = Decoding(max_tokens=10)
    together = family.generate(family.net, wanted, decoding)
    assert [family.generate(family.net, [request], decoding)[0] for request in wanted] == together
    assert together[0] != together[2]
    assert family.generate(family.net, wanted, decoding) == together


def test_a_conversation_can_be_continued(family):
    turns = [{"role": "user", "content": "1+1"}]
    decoding = Decoding(temperature=0.0, max_tokens=4)
    plain, chat = (family.generate(family.net, [Request(p, 0)], decoding) for p in ("1+1", turns))
    assert plain == chat


def test_a_prompt_that_fills_the_context_is_refused(family):
    with pytest.raises(UserError, match="leaves no room for an answer"):
        family.generate(family.net, [Request("1" * 200, 0)], Decoding())


def test_samples_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).expand(4000, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = causal_lm.sample_token(logits, Decoding(), generators)
    share = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.025)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    nucleus = causal_lm.sample_token(logits, Decoding(top_p=0.7), generators).bincount(minlength=4) / 4000
    two = logits[0, [0, 2]].softmax(-1)
    torch.testing.assert_close(nucleus, torch.tensor([two[0], 0.0, two[1], 0.0]), rtol=0, atol=0.025)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own use of transformers
def test_a_lora_loads_here_and_in_stock_peft(family, folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    add_lora(family.net, 4, None, family.lora_targets)
    with torch.no_grad():
        for name, parameter in family.net.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    ids = torch.tensor([family.encode_prompt("1+1")])
    trained = family.net(ids).logits
    family.save_lora(tmp_path / "lora", family.net)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (base(ids).logits - trained).abs().max() > 1e-2
    stock = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(stock(ids).logits, trained)
    again = load_family("causal_lm", str(folder), "cpu", adapter=str(tmp_path / "lora"))
    torch.testing.assert_close(again.net(ids).logits, trained)


def test_full_weights_load_in_stock_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    family.save_net(tmp_path / "model", family.net)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "model").encode("1+1")])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(stock(ids).logits, family.net(ids).logits)


@pytest.mark.parametrize(
    ("path", "adapter", "message"),
    [
        ("./nowhere", None, "holds no config.json"),
        (None, "nowhere", "holds no adapter_model.safetensors"),
    ],
)
def test_bad_folders_are_one_line(folder, path, adapter, message):
    with pytest.raises(UserError, match=message) as caught:
        load_family("causal_lm", path or str(folder), "cpu", adapter=adapter)
    assert "\n" not in str(caught.value)


def test_broken_weights_are_one_line(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"cannot load .* as a causal language model") as caught:
        load_family("causal_lm", str(tmp_path), "cpu")
    assert "\n" not in str(caught.value)
