"""Every published layout becomes the records that it means, in rewards, labels, prompts and origins."""

import json
import os

import pytest

from diffalign.errors import UserError
from diffalign.importers.clips import DIMENSIONS
from diffalign.importers.shelf import Shelf
from diffalign.records import Message, read_image

from .published import chat, jsonl, load, parquet, pickapic, picture, put, to_csv, to_json


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def rewards(record, label="reward") -> list[float]:
    return [candidate.labels[label] for candidate in record.candidates]


def texts(record):
    return [candidate.text for candidate in record.candidates]


class TestPickapic:
    def test_pairs_ties_and_origins(self, data, out):
        source = parquet(data / "a.parquet", [pickapic(0, 1.0), pickapic(1, 0.0), pickapic(2, 0.5)])
        found, broken = load("pickapic", source, out)
        assert not broken
        assert [rewards(record) for record in found] == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
        first = found[0]
        assert (first.id, first.prompt, first.source) == ("0000000", "a cat 0", "pickapic")
        assert first.candidates[1].origin == {
            "model": "dreamlike",
            "uid": "uid-1",
            "url": "https://example.org/1.jpg",
        }
        assert first.meta["ranking_id"] == 100
        assert first.meta["created_at"].startswith("2023-01-01")
        assert first.candidates[1].sample == found[1].candidates[0].sample  # the same picture is there once
        assert len(list(out.rglob("*.jpg"))) == 4
        assert (out / str(first.candidates[0].sample)).read_bytes() == picture(0)
        folder, shard, name = str(first.candidates[0].sample).split("/")
        assert (folder, shard) == ("media", name[:2])

    def test_scores_of_smpo_and_rows_without_a_label(self, data, out):
        rows = [pickapic(0, None, ps_score_0=0.2, ps_score_1=0.1), pickapic(1, 1.0, ps_score_0=None, ps_score_1=0.3)]
        (bare, scored), broken = load("pickapic", parquet(data / "a.parquet", rows), out)
        assert not broken
        assert rewards(bare, "ps_score") == [0.2, 0.1]
        assert "reward" not in bare.candidates[0].labels
        assert scored.candidates[0].labels == {"reward": 1.0}

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"label_0": 0.7}, "label_0, label_1: (0.7, 0.0) is none of (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)"),
            ({"label_1": 1.0}, "label_0, label_1: (1.0, 1.0) is none of"),
            ({"label_1": None}, "label_1: expected a number, found 'None'"),
            ({"jpg_0": b"no picture"}, "truncated, or neither JPEG, PNG nor WebP"),
            ({"jpg_1": None}, "expected the bytes of a picture, found NoneType"),
            ({"caption": None}, "caption: expected text"),
        ],
    )
    def test_broken_rows_are_handed_on(self, data, out, changes, reason):
        source = parquet(data / "a.parquet", [pickapic(0), pickapic(1, **changes), pickapic(2)])
        found, [broken] = load("pickapic", source, out)
        assert [record.id for record in found] == ["0000000", "0000002"]
        assert broken.row == 1
        assert reason in broken.reason

    def test_suffix_is_that_of_the_content(self, data, out):
        rows = [pickapic(0, jpg_0=picture(0, "PNG"), jpg_1=picture(1, "WEBP"))]
        [record], _ = load("pickapic", parquet(data / "a.parquet", rows), out)
        assert [str(c.sample).rpartition(".")[2] for c in record.candidates] == ["png", "webp"]

    def test_columns_must_be_there(self, data, out):
        with pytest.raises(UserError, match=r"not pickapic: lacks jpg_0, label_1; has caption, jpg_1, label_0$"):
            load("pickapic", parquet(data / "a.parquet", [{"caption": "", "jpg_1": b"", "label_0": 1.0}]), out)


class TestHpd:
    def test_v2_training_items(self, data, out):
        put(data / "train/0.jpg", 0, "JPEG")
        put(data / "train/1.jpg", 1, "JPEG")
        item = {"prompt": "a", "file_path": ["train/0.jpg", "train/1.jpg"], "human_preference": [0, 1]}
        [record], _ = load("hpdv2", to_json(data / "train.json", [item]), out)
        assert rewards(record) == [0.0, 1.0]
        assert record.candidates[1].origin == {"file": "train/1.jpg"}

    def test_v2_ranks_are_negated(self, data, out):
        paths = [put(data / f"{i}.png", i).name for i in range(3)]
        raw = [{"rank": [2, 1, 3], "user_hash": "x"}]
        item = {"prompt": "a", "image_path": paths, "rank": [2, 1, 3], "raw_annotations": raw}
        [record], _ = load("hpdv2", to_json(data / "test.json", [item]), out)
        assert rewards(record) == [-2.0, -1.0, -3.0]
        assert record.meta == {"raw_annotations": raw}

    def test_v2_lists_must_fit(self, data, out):
        rows = [{"prompt": "a", "file_path": ["a", "b"], "human_preference": [1]}]
        _, [broken] = load("hpdv2", to_json(data / "train.json", rows), out)
        assert broken.reason == "human_preference: has 1 entries, expected 2"

    @pytest.mark.parametrize("write", [to_json, jsonl])
    def test_v3_prefers_the_first(self, data, out, write):
        put(data / "i/a.png", 0)
        put(data / "i/b.png", 1)
        row = {"prompt": "p", "path1": "i/a.png", "path2": "i/b.png", "confidence": 0.9, "model1": "x", "model2": "y"}
        suffix = "json" if write is to_json else "jsonl"
        [record], _ = load("hpdv3", write(data / f"train.{suffix}", [row]), out)
        assert rewards(record) == [1.0, 0.0]
        assert record.meta == {"confidence": 0.9}
        assert record.candidates[1].origin == {"model": "y", "file": "i/b.png"}


class TestImageReward:
    def rows(self, data):
        for i in range(4):
            put(data / f"images/{i}.webp", i, "WEBP")
        return [
            {
                "image_path": f"images/{i}.webp",
                "prompt_id": "000864-0061" if i < 3 else "000865-0001",
                "prompt": "a painting" if i < 3 else "a dog",
                "classification": "Abstract",
                "image_amount_in_total": 3,
                "rank": (1, 2, 2, 1)[i],
                "overall_rating": 5 - i,
                "image_text_alignment_rating": 4,
                "fidelity_rating": 6,
            }
            for i in range(4)
        ]

    def test_rows_of_a_prompt_are_one_ranking(self, data, out):
        (first, second), _ = load("imagereward", parquet(data / "metadata-train.parquet", self.rows(data)), out)
        assert (first.id, second.id) == ("000864-0061", "000865-0001")
        assert rewards(first) == [-1.0, -2.0, -2.0]
        assert first.candidates[2].labels == {
            "reward": -2.0,
            "overall_rating": 3.0,
            "image_text_alignment_rating": 4.0,
            "fidelity_rating": 6.0,
        }
        assert len(second.candidates) == 1

    def test_a_prompt_that_comes_back(self, data, out):
        rows = self.rows(data)
        found, [broken] = load("imagereward", parquet(data / "m.parquet", [rows[0], rows[3], rows[1]]), out)
        assert len(found) == 2
        assert "prompt_id '000864-0061' was there before" in broken.reason

    def test_pictures_inside(self, data, out):
        rows = [{**row, "image": {"bytes": picture(9), "path": "x.jpg"}} for row in self.rows(data)]
        found, broken = load("imagereward", parquet(data / "m.parquet", rows), out)
        assert not broken
        assert found[0].candidates[0].sample == found[1].candidates[0].sample


class TestClips:
    def test_videofeedback(self, data, out):
        (data / "a").mkdir()
        (data / "a/abc.mp4").write_bytes(b"clip")
        row = {"id": "abc", "text prompt": "a boat", "video link": "https://example.org/a/abc.mp4"}
        row |= {key: i % 4 + 1 for i, key in enumerate(DIMENSIONS)}
        [record], _ = load("videofeedback", to_json(data / "data_annotated.json", [row]), out)
        [candidate] = record.candidates
        assert candidate.labels == {
            "visual_quality": 1.0,
            "temporal_consistency": 2.0,
            "dynamic_degree": 3.0,
            "text_to_video_alignment": 4.0,
            "factual_consistency": 1.0,
        }
        assert str(candidate.sample).endswith(".mp4")
        (data / "abc.mp4").write_bytes(b"another")
        [record], _ = load("videofeedback", data / "data_annotated.json", out)
        assert record.candidates[0].sample != candidate.sample

    def test_videoalign(self, data, out):
        for side in "ab":
            (data / f"{side}.mp4").write_bytes(side.encode())
        row = {"path_A": "a.mp4", "path_B": "b.mp4", "prompt": "p", "VQ": "A", "MQ": "B", "TA": "same"}
        rows = [{**row, "fps_A": 8, "num_frames_A": 49, "fps_B": 24.0, "num_frames_B": ""}, {**row, "VQ": "C"}]
        rows[1] |= dict.fromkeys(("fps_A", "num_frames_A", "fps_B", "num_frames_B"), "")
        [record], [broken] = load("videoalign", to_csv(data / "train.csv", rows), out)
        assert [c.labels for c in record.candidates] == [
            {"VQ": 1.0, "MQ": 0.0, "TA": 0.5},
            {"VQ": 0.0, "MQ": 1.0, "TA": 0.5},
        ]
        assert record.candidates[0].origin == {"fps": 8.0, "num_frames": 49.0}
        assert broken.reason == "VQ: 'C' is none of A, B, same"


class TestText:
    def test_ultrafeedback(self, data, out):
        row = {
            "prompt": "hi",
            "prompt_id": "f00",
            "chosen": chat("hi", "hello"),
            "rejected": chat("hi", "go away"),
            "messages": chat("hi", "hello"),
            "score_chosen": 8.5,
            "score_rejected": 8.5,
        }
        [record], _ = load("ultrafeedback", parquet(data / "train_prefs-00000-of-00001.parquet", [row]), out)
        assert record.prompt == [Message(role="user", content="hi")]
        assert texts(record) == [[Message(role="assistant", content=word)] for word in ("hello", "go away")]
        assert (rewards(record), rewards(record, "score")) == ([1.0, 0.0], [8.5, 8.5])
        assert record.meta == {"prompt_id": "f00"}

    @pytest.mark.parametrize("write", [parquet, jsonl])
    @pytest.mark.parametrize(
        ("row", "prompt", "answers", "labels"),
        [
            ({"prompt": "p ", "chosen": "a", "rejected": "b"}, "p ", ["a", "b"], [{"reward": 1.0}, {"reward": 0.0}]),
            ({"chosen": "p: a c", "rejected": "p: a b"}, "p: a", [" c", " b"], [{"reward": 1.0}, {"reward": 0.0}]),
            ({"chosen": "same", "rejected": "same"}, "sam", ["e", "e"], [{"reward": 1.0}, {"reward": 0.0}]),
            ({"prompt": "p", "completion": "c", "label": True}, "p", ["c"], [{"desirable": 1.0}]),
            ({"prompt": "p", "completion": "c", "label": False}, "p", ["c"], [{"desirable": 0.0}]),
            ({"prompt": "p", "completion": "c"}, "p", ["c"], [{}]),
            ({"prompt": "p"}, "p", [], []),
        ],
    )
    def test_trl_standard(self, data, out, write, row, prompt, answers, labels):
        suffix = "parquet" if write is parquet else "jsonl"
        [record], _ = load("trl", write(data / f"train.{suffix}", [row]), out)
        assert (record.prompt, texts(record), [c.labels for c in record.candidates]) == (prompt, answers, labels)

    @pytest.mark.parametrize("write", [parquet, jsonl])
    @pytest.mark.parametrize(
        ("row", "turns"),
        [
            ({"prompt": chat("q"), "chosen": chat("q", "a")[1:], "rejected": chat("q", "b")[1:]}, 1),
            ({"chosen": chat("q", "a"), "rejected": chat("q", "b")}, 1),
            ({"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")}, 1),
            ({"chosen": chat("q", "r", "s", "a"), "rejected": chat("q", "r", "s", "b", "t", "u")}, 3),
            ({"chosen": chat("q", "a"), "rejected": chat("q", "a")}, 1),
            ({"prompt": chat("q", "r", "s"), "completion": chat("q", "a")[1:], "label": True}, 3),
            ({"prompt": chat("q")}, 1),
        ],
    )
    def test_trl_conversational(self, data, out, write, row, turns):
        suffix = "parquet" if write is parquet else "jsonl"
        [record], _ = load("trl", write(data / f"train.{suffix}", [row]), out)
        assert [message.content for message in record.prompt] == list("qrs")[:turns]
        assert all(text[0].role == "assistant" for text in texts(record))
        assert all(text[0].content in "ab" for text in texts(record))

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"chosen": "text", "rejected": chat("q", "a")}, "one is text and the other a conversation"),
            ({"chosen": chat("q", "a"), "rejected": chat("r", "a")}, "do not begin with the same message"),
            ({"chosen": [], "rejected": []}, "a conversation without messages"),
            ({"chosen": [{"role": "user"}], "rejected": "b"}, "found role"),
            ({"chosen": [{"role": "user", "content": "", "tool_calls": [1]}], "rejected": ""}, "tool_calls"),
            ({"chosen": 3, "rejected": 4}, "chosen: expected a list, found int"),
            ({"prompt": "p", "completion": "c", "label": 1}, "label: expected true or false, found '1'"),
        ],
    )
    def test_trl_broken_rows(self, data, out, row, reason):
        _, [broken] = load("trl", jsonl(data / "train.jsonl", [row]), out)
        assert reason in broken.reason


class TestFolders:
    @pytest.mark.parametrize(("w", "l"), [("w", "l"), ("winner", "loser")])
    def test_twins(self, data, out, w, l):  # noqa: E741
        for i in range(2):
            put(data / w / f"{i}.png", i)
            put(data / l / f"{i}.png", 10 + i)
        (data / w / "0.txt").write_text("a cat\n")
        (data / l / "1.txt").write_text("a dog")
        found, broken = load("folders", data, out)
        assert not broken
        assert [record.prompt for record in found] == ["a cat", "a dog"]
        assert [rewards(record) for record in found] == [[1.0, 0.0]] * 2
        assert (out / str(found[1].candidates[1].sample)).read_bytes() == picture(11, "PNG")

    def test_twins_with_a_list_of_captions(self, data, out):
        put(data / "w/0.png", 0)
        put(data / "l/0.png", 1)
        to_csv(data / "metadata.csv", [{"file_name": "0.png", "text": "a cat"}])
        [record], _ = load("folders", data, out)
        assert record.prompt == "a cat"

    def test_what_has_no_twin_or_caption(self, data, out):
        put(data / "w/0.png")
        put(data / "w/1.png")
        put(data / "l/1.png")
        put(data / "l/2.png")
        found, broken = load("folders", data, out)
        assert not found
        assert [item.reason.partition(";")[0] for item in broken] == [
            "0.png: not in l/",
            "w/1.png: no caption",
            "2.png: not in w/",
        ]

    @pytest.mark.parametrize(
        ("name", "file", "caption"), [("metadata.jsonl", "file_name", "text"), ("metadata.csv", "image", "prompt")]
    )
    def test_list(self, data, out, name, file, caption):
        put(data / "a/0.png")
        row = {file: "a/0.png", caption: "a cat", "style": "photo"}
        (jsonl if name.endswith("l") else to_csv)(data / name, [row])
        for source in (data, data / name):
            [record], _ = load("jsonl", source, out)
            assert (record.prompt, record.meta, len(record.candidates)) == ("a cat", {"style": "photo"}, 1)

    def test_list_of_a_split(self, data, out):
        put(data / "train/0.png")
        jsonl(data / "train/metadata.jsonl", [{"file_name": "0.png", "text": "a cat"}])
        [record], _ = load("jsonl", data, out, split="train")
        assert record.candidates[0].origin == {"file": "train/0.png"}
        with pytest.raises(UserError, match=r"holds 0 of metadata\.jsonl and metadata\.csv"):
            load("jsonl", data, out)

    def test_d3po(self, data, out):
        for i in range(21):
            put(data / f"images/{i:05d}.png", i)
        to_json(data / "prompt.json", ["a hand", "two hands", "no hands"])
        to_json(data / "annotations/anna.json", [[1, 0, 0, 0, 0, 0, 1], [0] * 7, [1] * 7])
        to_json(data / "annotations/ben.json", [[1, 1, 0, 0, 0, 0, 0], [1] * 7])
        (data / "sample.pkl").write_bytes(b"never read")
        (first, second), broken = load("d3po", data, out)
        assert not broken
        assert rewards(first) == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5]
        assert rewards(second) == [0.5] * 7
        assert second.candidates[0].origin == {"file": "images/00007.png"}
        assert second.meta == {"annotators": 2}
        to_json(data / "annotations/ben.json", [[1, 1], [1] * 7])
        found, [broken] = load("d3po", data, out)
        assert (len(found), broken.row, broken.reason) == (1, 0, "votes: has 2 entries, expected 7")


class TestPrompts:
    def test_geneval(self, data, out):
        line = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
        [record], [broken] = load("geneval", jsonl(data / "evaluation_metadata.jsonl", [line, {**line, "tag": 3}]), out)
        assert (record.prompt, record.meta, record.candidates) == ("two cats", line, [])
        assert broken.reason == "tag: expected text, found int"

    def test_text(self, data, out):
        (data / "train.txt").write_text("\ufeffa cat\n\n  a dog \r\n")
        found, _ = load("prompts", data, out, split="train")
        assert [record.prompt for record in found] == ["a cat", "a dog"]
        assert [record.id for record in found] == ["0000000", "0000001"]

    def test_list_with_conditions(self, data, out):
        put(data / "edges.png")
        rows = [
            {"prompt": "a", "negative_prompt": "blurry"},
            {"prompt": "b", "image": "edges.png"},
            {"prompt": "c", "images": ["edges.png"]},
            {"prompt": "d", "images": ["edges.png", "edges.png"]},
        ]
        (a, b, c), [broken] = load("prompts", jsonl(data / "train.jsonl", rows), out)
        assert (a.condition, a.meta) == (None, {"negative_prompt": "blurry"})
        assert b.condition == c.condition
        read_image(out, str(b.condition))
        assert broken.reason == "images: a record is conditioned on one picture at most"


def test_limit_and_what_is_done(data, out):
    source = parquet(data / "a.parquet", [pickapic(i) for i in range(5)])
    found, _ = load("pickapic", source, out, limit=4, done={"0000000", "0000002"})
    assert [record.id for record in found] == ["0000001", "0000003"]


def test_links_share_the_file_and_copies_do_not(data, out):
    path = put(data / "a.png")
    for link in (True, False):
        shelf = Shelf(out / str(link), data, link=link)
        stored = out / str(link) / shelf.take("a.png")
        assert os.path.samefile(stored, path) == link
        assert stored.read_bytes() == path.read_bytes()
    assert not (out / "nothing").exists()
    Shelf(out / "nothing", data, write=False).take("a.png")
    assert not (out / "nothing").exists()


def test_rows_of_all_fixtures_are_json(data, out):
    """What a parquet file holds beyond text and numbers never reaches a record."""
    source = parquet(data / "a.parquet", [pickapic(0, ranking_id=b"\xff")])
    _, [broken] = load("pickapic", source, out)
    assert broken.reason == "meta.ranking_id is bytes, which JSON cannot express"
    json.dumps(broken._asdict())
