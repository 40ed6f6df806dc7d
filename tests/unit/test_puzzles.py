"""The puzzles world: every prompt has one answer that the parser finds, and the splits never meet."""

import numpy as np
import pytest

from diffalign.errors import UserError
from diffalign.scoring import Sample, load_scorer
from diffalign.worlds import load_prompts
from diffalign.worlds.puzzles.pretrain import mistake
from diffalign.worlds.puzzles.prompts import TASKS, prompts, solve

KNOWN = {
    "47+38": ("add", "85"),
    "90-27": ("subtract", "63"),
    "max 17 42 35": ("maximum", "42"),
    "max 9 42 100": ("maximum", "100"),
    "sort 4173": ("sort", "1347"),
    "sort 0100": ("sort", "0001"),
    "reverse kbxw": ("reverse", "wxbk"),
    "close ([{": ("close", "}])"),
}


@pytest.mark.parametrize("prompt", KNOWN)
def test_known_answers(prompt):
    assert solve(prompt) == KNOWN[prompt]


@pytest.mark.parametrize("prompt", ["", "47 + 38", "sort", "reverse K", "close ()", "max", "4٣+11", "47+38\n"])
def test_anything_else_is_no_puzzle(prompt):
    with pytest.raises(ValueError, match="is no puzzle"):
        solve(prompt)


def test_splits_are_disjoint_and_each_task_is_in_both():
    train, heldout = ({m["prompt"]: m["tag"] for m in prompts(split)} for split in ("train", "heldout"))
    assert not train.keys() & heldout.keys()
    for split in (train, heldout):
        assert set(split.values()) == set(TASKS)
        assert all(solve(prompt)[0] == tag for prompt, tag in split.items())
    assert len(train) == 27_184
    assert len(heldout) == 6_821
    assert next(iter(heldout)) == "96+49"  # the hash decides; a change of either would break every number shipped


def test_one_task_alone():
    assert {m["tag"] for m in prompts("train", "sort")} == {"sort"}
    with pytest.raises(ValueError, match="unknown split 'test'"):
        prompts("test")


def test_mistakes_are_wrong_and_short():
    rng = np.random.default_rng(0)
    for metadata in prompts("train")[::50]:
        tag, answer = solve(metadata["prompt"])
        wrong = mistake(tag, metadata["prompt"], answer, rng)
        assert wrong != answer
        assert abs(len(wrong) - len(answer)) <= 1


def test_the_judge_parses_the_prompt_and_gives_the_answer_as_reason():
    samples = [Sample("47+38", text=text) for text in ("85", "84", "85 ", "")]
    correct = load_scorer("puzzles")(samples)
    assert [score.value for score in correct] == [1.0, 0.0, 0.0, 0.0]
    assert [dict(score.detail) for score in correct] == [{}, *[{"reason": "the answer is 85"}] * 3]
    graded = load_scorer("puzzles", metric="graded")(samples)
    assert [score.value for score in graded] == [1.0, 0.5, pytest.approx(2 / 3), 0.0]


def test_the_judge_refuses_what_it_cannot_read():
    with pytest.raises(UserError, match="'hello' is no puzzle"):
        load_scorer("puzzles")([Sample("hello", text="you")])
    with pytest.raises(UserError, match="metric 'exact': choose correct, graded"):
        load_scorer("puzzles", metric="exact")


def test_the_world_is_known_by_name():
    assert load_prompts("puzzles", "heldout")[0] == {"tag": "add", "prompt": "96+49"}
    with pytest.raises(UserError, match="no world 'puzzle'; did you mean 'puzzles'"):
        load_prompts("puzzle", "train")
    with pytest.raises(UserError, match="not 'test'"):
        load_prompts("puzzles", "test")
