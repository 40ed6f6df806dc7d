"""Files of data sets: shards and splits, rows one by one, and hostile content that gets one line and nothing more."""

import json
import os
from contextlib import suppress

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import importers
from diffalign.errors import UserError
from diffalign.importers import FORMATS, Broken, tables
from diffalign.importers.shelf import Shelf
from diffalign.records import Record

from .published import jsonl, load, parquet, pickapic, picture, put, to_csv, to_json


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def plain(source, split=None):
    return list(tables.rows(source, split))


# --- which files ----------------------------------------------------------------------------------------------------


def test_shards_come_in_order(data):
    for i in (1, 0, 2):
        parquet(data / f"data/train-0000{i}-of-00003-abc.parquet", [{"i": i}])
    assert [row["i"] for row in plain(data)] == [0, 1, 2]


def test_several_splits_must_be_chosen_from(data):
    for split in ("train", "validation_unique"):
        parquet(data / f"{split}-00000-of-00001.parquet", [{"split": split}])
    with pytest.raises(UserError, match="holds the splits train, validation_unique; choose one"):
        plain(data)
    with pytest.raises(UserError, match="choose one"):
        plain(data, "test")
    assert plain(data, "train") == [{"split": "train"}]


def test_saved_to_disk(data):
    import datasets

    rows = [{"caption": "a", "jpg_0": picture(0)}, {"caption": "b", "jpg_0": picture(1)}]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(data / "one", num_shards=2)
    assert plain(data / "one") == rows
    datasets.DatasetDict(train=saved, test=saved.select([1])).save_to_disk(data / "two")
    assert plain(data / "two", "test") == rows[1:]
    with pytest.raises(UserError, match="holds the splits test, train"):
        plain(data / "two")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "{}", "not what Dataset.save_to_disk writes"),
        ("state.json", '{"_data_files": [{"filename": "../../x.arrow"}]}', "no such file, but state.json names it"),
        ("readme.md", "", "holds no file of .parquet"),
    ],
)
def test_folders_that_are_none(data, name, content, message):
    (data / name).write_text(content)
    with pytest.raises(UserError, match=message):
        plain(data)


def test_sources_that_are_not_there(data):
    with pytest.raises(UserError, match="source: no file or folder"):
        plain(data / "gone")
    (data / "a.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.pkl is none of \.parquet"):
        plain(data / "a.pkl")


# --- rows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=30) | st.integers(), max_size=3), max_size=6))
def test_a_list_is_read_like_json_reads_it(tmp_path_factory, rows):
    """Whatever falls on the border of what is held at a time."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "CHUNK", 7)
            assert plain(path) == json.loads(path.read_text(encoding="utf-8"))


def test_only_a_row_of_a_long_list_is_held(data, monkeypatch):
    to_json(data / "a.json", [{"i": i} for i in range(1000)] + [{"long": "x" * 5000}])
    monkeypatch.setattr(tables, "CHUNK", 100)
    monkeypatch.setattr(tables, "LONGEST", 400)
    stream = tables.rows(data / "a.json")
    assert [next(stream)["i"] for _ in range(1000)] == list(range(1000))
    with pytest.raises(UserError, match="cut off or not valid"):
        next(stream)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b""),
        ("a.json", b"3"),
        ("a.json", b'[{"prompt": "a"}'),
        ("a.json", b'[{"prompt": "a"}, 3]'),
        ("a.json", b'[{"prompt": "a", \xff}]'),
        ("a.json", b"[" + DEEP.encode()),
        ("a.json", b'[{"a": ' + DEEP.encode()),
        ("a.csv", b'prompt,image\n"a,b\n'),
        ("a.csv", b"prompt\n\xff\n"),
        ("a.csv", b"prompt\n" + b"x" * 200_000 + b"\n"),
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 and no more PAR1"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00"),
        ("a.arrow", b"nothing"),
    ],
)
def test_broken_files_are_one_line(data, name, content):
    (data / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        plain(data / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_truncated_parquet(data, share):
    path = parquet(data / "a.parquet", [pickapic(i) for i in range(20)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"a\.parquet: truncated or not a parquet file"):
        plain(path)


def test_damaged_pages_of_a_parquet(data):
    path = parquet(data / "a.parquet", [{"text": "x" * 50 + str(i)} for i in range(50)])
    content = bytearray(path.read_bytes())
    content[10:200] = os.urandom(190)
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated or not a parquet file"):
        plain(path)


def test_broken_lines_do_not_end_a_file(data):
    lines = ['{"prompt": "a"}', "[1]", "nothing", DEEP, r'{"prompt": "\ud800"}', r'{"prompt": "\ud83d\ude00"}']
    (data / "a.jsonl").write_text("\n".join(lines))
    rows = plain(data / "a.jsonl")
    assert [isinstance(row, UserError) for row in rows] == [False, True, True, True, True, False]
    assert rows[-1] == {"prompt": "😀"}
    assert str(rows[1]) == "a.jsonl:2: not a JSON object: found list"
    (data / "b.csv").write_text("a,b\n1,2\n3\n4,5,6\n")
    rows = plain(data / "b.csv")
    assert rows[0] == {"a": "1", "b": "2"}
    assert [str(row) for row in rows[1:]] == ["b.csv: more or fewer fields than the header"] * 2


def test_lines_may_be_called_json(data):
    jsonl(data / "a.json", [{"i": 0}, {"i": 1}])
    assert plain(data / "a.json") == [{"i": 0}, {"i": 1}]


def test_half_a_character_in_a_list(data):
    (data / "a.json").write_text(r'[{"prompt": "\uD800"}, {"prompt": "a"}]')
    bad, good = plain(data / "a.json")
    assert isinstance(bad, UserError)
    assert good == {"prompt": "a"}


def test_times_of_every_kind_are_text(data):
    import pyarrow.parquet as pq

    kinds = (pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.date32(), pa.time64("ns"), pa.duration("ns"))
    table = pa.table({str(i): pa.array([1], pa.int32() if i == 2 else pa.int64()).cast(k) for i, k in enumerate(kinds)})
    pq.write_table(table, data / "a.parquet")
    [row] = plain(data / "a.parquet")
    assert all(isinstance(value, str) for value in row.values())


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "../secret.png", "a/../../secret.png", "C:\\x.png", "link.png", "way/secret.png", "a\0b"]
)
def test_no_path_leaves_the_folder(tmp_path, data, out, path):
    put(tmp_path / "secret.png")
    (data / "link.png").symlink_to("../secret.png")
    (data / "way").symlink_to("..")
    put(data / "fine.png")
    row = {"prompt": "p", "path1": path, "path2": "fine.png"}
    found, [broken] = load("hpdv3", jsonl(data / "a.jsonl", [row]), out)
    assert not found
    assert "path" in broken.reason
    assert "\n" not in broken.reason
    assert not out.exists()


@pytest.mark.parametrize("path", ["gone.png", "folder", "text.txt", "empty.png", 3, None, ["a"], {"a": 1}])
def test_paths_to_nothing_usable(data, out, path):
    put(data / "fine.png")
    (data / "folder").mkdir()
    (data / "text.txt").write_text("text")
    (data / "empty.png").write_bytes(b"")
    row = {"prompt": "p", "path1": path, "path2": "fine.png"}
    found, [broken] = load("hpdv3", jsonl(data / "a.jsonl", [row]), out)
    assert not found
    assert broken.row == 0
    assert any(words in broken.reason for words in ("no such file", "neither JPEG", "expected the path of a file"))


def test_captions_stay_in_the_folder(tmp_path, data, out):
    (tmp_path / "secret.txt").write_text("secret")
    for side in "wl":
        put(data / side / "0.png")
    (data / "w/0.txt").symlink_to(tmp_path / "secret.txt")
    found, [broken] = load("folders", data, out)
    assert not found
    assert "a link leads out of" in broken.reason


# --- any content ----------------------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("fine.png")
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "bytes", "path", "image", "labels"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"d3po", "folders"}))
@settings(max_examples=40)
@given(data=st.data())
def test_any_row_is_a_sound_record_or_a_reason(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("any")
    put(folder / "fine.png")
    columns = data.draw(st.sampled_from(FORMATS[name].columns))
    rows = [{key: data.draw(values) for key in columns} for _ in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder if name == "jsonl" else folder / "metadata.jsonl"
    for item in importers.read(name, source, Shelf(folder / "out", folder)):
        if isinstance(item, Record):
            assert Record.model_validate_json(item.model_dump_json()) == item
        else:
            assert item.reason
    outside = [path for path in folder.rglob("*") if path.is_file() and "out" not in path.parts]
    assert {path.name for path in outside} == {"fine.png", "metadata.jsonl"}


@settings(max_examples=40)
@given(prompts=st.lists(values, max_size=2), votes=st.lists(values, min_size=1, max_size=2))
def test_any_annotations(tmp_path_factory, prompts, votes):
    folder = tmp_path_factory.mktemp("d3po")
    put(folder / "images/00000.png")
    to_json(folder / "prompt.json", prompts)
    for i, content in enumerate(votes):
        to_json(folder / f"annotations/{i}.json", content)
    with suppress(UserError):
        items = list(importers.read("d3po", folder, Shelf(folder / "out", folder)))
        assert all(isinstance(item, Record | Broken) for item in items)


def test_csv_columns_of_another_data_set(data, out):
    source = to_csv(data / "a.csv", [{"prompt": "p", "path_A": "a"}])
    with pytest.raises(UserError, match="not videoalign: lacks path_B, VQ, MQ, TA; has prompt, path_A"):
        load("videoalign", source, out)
