"""The prompts of compositional benchmarks, in the layouts of their releases."""

import pytest

from diffalign.errors import UserError

from .published import load, to_csv


def question(item: str, number: int, dependency: str, asked: str, **changes) -> dict:
    return {
        "item_id": item,
        "text": f"the prompt of {item}",
        "keywords": "",
        "proposition_id": number,
        "dependency": dependency,
        "category_broad": "entity",
        "category_detailed": "whole",
        "tuple": "entity - whole (cat)",
        "question_natural_language": asked,
        **changes,
    }


class TestDpg:
    def test_questions_of_a_prompt_are_one_record(self, tmp_path):
        rows = [
            question("coco_1", 1, "0", "Is there a cat?"),
            question("coco_1", 2, "1", "Is it red?", category_broad="attribute"),
            question("coco_1", 4, "1, 2", "Is the red cat asleep?"),
            question("drawtext_9", 1, "0", "Is there a word?"),
        ]
        found, broken = load("dpg", to_csv(tmp_path / "dpg_bench.csv", rows), tmp_path / "out")
        assert not broken
        assert [(record.id, record.prompt) for record in found] == [
            ("coco_1", "the prompt of coco_1"),
            ("drawtext_9", "the prompt of drawtext_9"),
        ]
        assert found[0].meta == {
            "tag": "dpg",
            "questions": ["Is there a cat?", "Is it red?", "Is the red cat asleep?"],
            "dependency": [[], [0], [0, 1]],
            "category": ["entity", "attribute", "entity"],
        }

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            ([question("a", 1, "3", "?")], "dependency: no proposition 3"),
            ([question("a", 1, "x", "?")], "dependency: expected numbers, found 'x'"),
            ([question("a", 1, "0", "?"), question("a", 1, "0", "?")], "proposition_id: one is there twice"),
            ([question("a", 1, "0", "?", proposition_id="")], "proposition_id: expected a number"),
        ],
    )
    def test_broken_prompts_are_handed_on(self, tmp_path, rows, reason):
        _, [broken] = load("dpg", to_csv(tmp_path / "dpg_bench.csv", rows), tmp_path / "out")
        assert reason in broken.reason

    def test_columns_must_be_there(self, tmp_path):
        with pytest.raises(UserError, match="not dpg: lacks proposition_id"):
            load("dpg", to_csv(tmp_path / "dpg_bench.csv", [{"item_id": "a", "text": "b"}]), tmp_path / "out")


class TestCompbench:
    def test_files_are_categories(self, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        (data / "color_val.txt").write_text("a green bench and a blue bowl\n\na red car\n")
        (data / "3d_spatial_val.txt").write_text("a cat in front of a dog\n")
        (data / "color_train.txt").write_text("a white wall\n")
        found, broken = load("compbench", data, tmp_path / "out")
        assert not broken
        assert [(record.id, record.prompt, record.meta) for record in found] == [
            ("0000000", "a cat in front of a dog", {"tag": "3d_spatial"}),
            ("0000001", "a green bench and a blue bowl", {"tag": "color"}),
            ("0000002", "a red car", {"tag": "color"}),
        ]
        [train], _ = load("compbench", data, tmp_path / "train", split="train")
        assert (train.prompt, train.meta) == ("a white wall", {"tag": "color"})
        [one], _ = load("compbench", data / "3d_spatial_val.txt", tmp_path / "one")
        assert one.meta == {"tag": "3d_spatial"}

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match=r"holds no <category>_val\.txt"):
            load("compbench", tmp_path, tmp_path / "out")
