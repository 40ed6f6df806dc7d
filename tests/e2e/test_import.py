"""`diffalign import` and `diffalign export` of records: from published files to training records, and out again."""

import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import files, importing, parquet, records
from diffalign.importers.shelf import Shelf
from diffalign.records import Appender, Candidate, Message, Record

from ..unit import published


@pytest.fixture
def source(tmp_path):
    """Pick-a-Pic, seven rows in two shards: one tie, one broken row."""
    rows = [published.pickapic(i, (1.0, 0.0, 0.5)[i % 3]) for i in range(7)]
    rows[4]["jpg_1"] = b"broken"
    for i, part in enumerate((rows[:3], rows[3:])):
        published.parquet(tmp_path / f"data/train-0000{i}-of-00002.parquet", part)
    return tmp_path / "data"


@pytest.fixture
def words(source, tmp_path):
    return "import", "format=pickapic", f"source={source}", f"out={tmp_path / 'out'}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out/records.jsonl"


def ids(path) -> list[str]:
    return [record.id for record in records.read(path)]


def test_skipped_rows_are_listed(cli, words, path):
    outcome = cli(*words, "on_error=skip")
    assert outcome.code == 0, outcome.err
    line = outcome.out.strip().splitlines()[-1]
    listed = "records.jsonl.skipped.jsonl"
    assert line == f"wrote 6 records, 12 candidates, 2 ties, 1 skipped, listed in {listed} to {path}"
    assert ids(path) == [f"{i:07d}" for i in (0, 1, 2, 3, 5, 6)]
    [skipped] = [json.loads(row) for row in path.with_name(listed).read_text().splitlines()]
    assert skipped == {
        "row": 4,
        "reason": "a picture: truncated, or neither JPEG, PNG nor WebP: UnidentifiedImageError",
    }
    files.require_complete(path, 6)


def test_a_broken_row_stops_and_skipping_goes_on(cli, refused, words, path, monkeypatch):
    monkeypatch.setattr(importing, "BATCH", 2)
    refused(*words, names=["row 4: a picture: truncated", "on_error: skip"])
    assert ids(path) == [f"{i:07d}" for i in range(4)]
    with pytest.raises(records.UserError, match="is not finished"):
        files.require_complete(path, 4)
    outcome = cli(*words, "on_error=skip")
    assert "wrote 2 records, 4 candidates, 1 ties, 1 skipped" in outcome.out
    assert "4 records were there" in outcome.out
    assert len(ids(path)) == 6
    before = path.read_bytes(), path.with_name("records.jsonl.meta.json").read_bytes()
    assert "wrote 0 records" in cli(*words, "on_error=skip").out
    assert (path.read_bytes(), path.with_name("records.jsonl.meta.json").read_bytes()) == before


def test_any_crash_resumes_to_the_same_file(cli, words, path):
    cli(*words, "on_error=skip")
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert cli(*words, "on_error=skip").code == 0
        assert path.read_bytes() == whole


def test_another_source_is_not_mixed_in(cli, refused, words, source):
    cli(*words, "on_error=skip")
    refused(*words, "limit=3", names=["was made with different limit"])
    published.parquet(source / "train-00001-of-00002.parquet", [published.pickapic(9)])
    refused(*words, names=["was made with different files"])


def test_dry_run_writes_nothing(cli, refused, words, tmp_path):
    outcome = cli(*words, "on_error=skip", "--dry-run")
    assert "6 records, 12 candidates, 2 ties, 1 skipped" in outcome.out
    refused(*words, "--dry-run", names=["row 4: a picture: truncated"])
    assert not (tmp_path / "out").exists()
    cli(*words, "on_error=skip")
    refused(*words, "limit=3", "--dry-run", names=["was made with different limit"])


def test_names_that_are_no_text(cli, tmp_path):
    """A file name that is not UTF-8 cannot be written into a record."""
    for side in ("w", "l"):
        published.put(tmp_path / "data" / side / "fine.png")
        published.put(tmp_path / "data" / side / "bad\udcff.png")
    for name in ("fine", "bad\udcff"):
        (tmp_path / f"data/w/{name}.txt").write_text("a cat")
    outcome = cli("import", "format=folders", f"source={tmp_path / 'data'}", f"out={tmp_path / 'out'}", "on_error=skip")
    assert "wrote 1 records, 2 candidates, 0 ties, 1 skipped" in outcome.out


def test_what_cannot_be_imported(refused, words, source, tmp_path):
    refused(*words, f"out={source / 'out'}", names=["lies in the source"])
    refused(*words, f"source={tmp_path / 'gone'}", names=["no file or folder"])
    refused(*words, "split=test", names=["holds the splits train"])
    refused(*words, "format=picapic", names=["format"])
    refused("import", "format=trl", names=["command line: missing key 'source'; missing key 'out'"])
    one = published.parquet(tmp_path / "one/a.parquet", [published.pickapic(0, jpg_0=b"x")])
    refused("import", *words[1:], f"source={one}", "on_error=skip", names=["all 1 rows are broken"])
    published.jsonl(tmp_path / "empty.jsonl", [])
    out = f"out={tmp_path / 'other'}"
    refused("import", "format=trl", f"source={tmp_path / 'empty.jsonl'}", out, names=["holds no rows"])


def test_imported_pairs_train(cli, config, words, path):
    assert cli(*words, "on_error=skip", "limit=4").code == 0
    outcome = cli("train", config("train"), f"data.records={path}", "data.size=[32,32]")
    assert outcome.code == 0, outcome.err


# --- parquet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Records with everything that a record can have."""
    folder = tmp_path / "mixed"
    for i, name in enumerate(("media/a.png", "media/b/c.jpg", "top.webp")):
        published.put(folder / name, i, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.rpartition(".")[2]])
    (folder / "media/clip.mp4").write_bytes(b"clip")
    (folder / "media/real.mp4").write_bytes(b"real")
    turns = [Message(role="user", content="ü\u2028"), Message(role="assistant", content="")]
    rows = [
        Record(
            id="pictures",
            prompt="a cat",
            condition="top.webp",
            source="here",
            candidates=[
                Candidate(sample="media/a.png", labels={"reward": 0.1, "steps": [1.0, 2.5]}, origin={"seed": 3}),
                Candidate(sample="media/b/c.jpg", labels={"reward": 1e-300}, condition="media/a.png"),
            ],
            meta={"tag": "colors", "nested": [{"x": None}]},
        ),
        Record(
            id="clip",
            prompt="a boat",
            source="media/real.mp4",
            candidates=[Candidate(sample="media/clip.mp4", errors={"vq": "timeout: after 5 s"})],
        ),
        Record(id="chat", prompt=turns[:1], candidates=[Candidate(text=turns[1:]), Candidate(text="")]),
        Record(id="prompt", prompt="[]"),
    ]
    records.write(folder / "records.jsonl", rows)
    files.write_json(folder / "records.jsonl.meta.json", {"seed": 0, "count": 4})
    return folder / "records.jsonl"


def back(cli, tmp_path, name="again"):
    """Import an export; the records file."""
    outcome = cli("import", "format=parquet", f"source={tmp_path / 'pq'}", f"out={tmp_path / name}")
    assert outcome.code == 0, outcome.err
    return tmp_path / name / "records.jsonl"


def test_there_and_back(cli, mixed, tmp_path):
    outcome = cli("export", "format=parquet", f"records={mixed}", f"out={tmp_path / 'pq'}")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"wrote 4 records with reward, steps to 1 parquet files in {tmp_path / 'pq'}\n"
    again = back(cli, tmp_path)
    assert again.read_bytes() == mixed.read_bytes()
    for file in mixed.parent.rglob("*.*"):
        if file.suffix not in (".jsonl", ".json"):
            assert (again.parent / file.relative_to(mixed.parent)).read_bytes() == file.read_bytes()


def test_datasets_reads_it_and_decodes_the_pictures(cli, mixed, tmp_path):
    import datasets

    cli("export", "format=parquet", f"records={mixed}", f"out={tmp_path / 'pq'}")
    pattern = str(tmp_path / "pq/*.parquet")
    found = datasets.load_dataset("parquet", data_files=pattern, cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(found.features["condition"], datasets.Image)
    pictures, clip, chat, prompt = found
    assert [c["image"].size for c in pictures["candidates"]] == [(10, 12)] * 2
    assert pictures["condition"].format == "WEBP"
    assert json.loads(pictures["candidates"][0]["labels"]) == {"reward": 0.1, "steps": [1.0, 2.5]}
    assert clip["candidates"][0]["media"] == {"bytes": b"clip", "path": "media/clip.mp4"}
    assert json.loads(chat["prompt"]) == [{"role": "user", "content": "ü\u2028"}]
    assert (chat["conversation"], chat["candidates"][1]["text"], prompt["candidates"]) == (True, "", [])


def test_shards_row_groups_and_where_it_is_from(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "GROUP_ROWS", 1)
    contents = parquet.survey(mixed)
    (tmp_path / "pq").mkdir()
    assert parquet.write(mixed, tmp_path / "pq", contents, 120) == 3
    names = sorted(path.name for path in (tmp_path / "pq").iterdir())
    assert names == [f"data-0000{i}-of-00003.parquet" for i in range(3)]
    groups = [pq.ParquetFile(tmp_path / "pq" / name) for name in names]
    assert [(file.metadata.num_row_groups, file.metadata.num_rows) for file in groups] == [(1, 1), (2, 2), (1, 1)]
    about = json.loads(groups[0].schema_arrow.metadata[b"diffalign"])
    assert about["labels"] == ["reward", "steps"]
    assert about["count"] == 4
    assert about["made_from"] == {"seed": 0, "count": 4}
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1)
    assert parquet.write(mixed, tmp_path / "pq", contents, 10**9) == 1


def test_a_refused_export_leaves_nothing(refused, mixed, tmp_path):
    words = ("export", "format=parquet", f"records={mixed}", f"out={tmp_path / 'pq'}")
    (mixed.parent / "media/b/c.jpg").unlink()
    refused(*words, names=["c.jpg: no such file"])
    assert not (tmp_path / "pq").exists()
    with Appender(mixed) as output:
        output.append([Record(id="more", prompt="")])
    refused(*words, names=["holds 5 of 4 records"])
    refused(*words, "weights=x", names=["format: parquet takes `records`; given: records, weights"])
    refused(*words[:2], *words[3:], names=["format: parquet takes `records`; given: none"])
    refused("export", "format=lora", *words[2:], names=["format: lora takes `model` and `weights`; given: records"])
    (tmp_path / "pq").mkdir()
    (tmp_path / "pq/file").write_text("")
    refused(*words, names=["is there already"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"path": "../out.png"}, "without '..'"),
        ({"path": "/out.png"}, "must be relative"),
        ({"path": "records.jsonl"}, "is not that of a picture or a clip"),
        ({"path": ".x.tmp"}, "is not that of a picture or a clip"),
        ({"bytes": b"nothing"}, "truncated, or neither"),
        ({"bytes": None}, "not a row of"),
        ({"path": None}, "not a row of"),
    ],
)
def test_a_parquet_of_somebody_else_writes_media_alone(cli, refused, mixed, tmp_path, change, reason):
    cli("export", "format=parquet", f"records={mixed}", f"out={tmp_path / 'pq'}")
    [file] = (tmp_path / "pq").iterdir()
    rows = pq.read_table(file).to_pylist()
    rows[0]["candidates"][0]["image"] |= change
    published.parquet(file, rows)
    before = sorted(tmp_path.rglob("*.png"))
    words = ("import", "format=parquet", f"source={tmp_path / 'pq'}", f"out={tmp_path / 'again'}")
    refused(*words, names=["row 0", reason])
    assert sorted(tmp_path.rglob("*.png")) == before
    rows[0]["candidates"][0]["labels"] = "{"
    published.parquet(file, rows)
    assert cli(*words, "on_error=skip", f"out={tmp_path / 'skip'}").code == 0


def test_media_are_not_overwritten(tmp_path):
    published.put(tmp_path / "media/a.png", 0)
    shelf = Shelf(tmp_path, tmp_path)
    assert shelf.restore("media/a.png", published.picture(0, "PNG")) == "media/a.png"
    with pytest.raises(records.UserError, match="is there already, with another content"):
        shelf.restore("media/a.png", published.picture(1, "PNG"))


text = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
chats = st.lists(st.builds(Message, role=text, content=text), max_size=2)
values = st.none() | st.booleans() | st.integers() | numbers | text | st.lists(numbers)
objects = st.dictionaries(text, values, max_size=3)
labels = st.dictionaries(text, numbers | st.lists(numbers, min_size=1, max_size=4), max_size=3)
rows = st.builds(
    Record,
    id=st.text(min_size=1, max_size=8),
    prompt=text | chats,
    source=st.none() | text,
    candidates=st.lists(st.builds(Candidate, text=text | chats, labels=labels, origin=objects), max_size=3),
    meta=objects,
)


@settings(max_examples=60)
@given(st.lists(rows, min_size=1, max_size=3, unique_by=lambda row: row.id))
def test_any_text_record_comes_back(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp("any")
    records.write(folder / "records.jsonl", dataset)
    parquet.write(folder / "records.jsonl", folder, parquet.survey(folder / "records.jsonl"), 10**9)
    [file] = folder.glob("*.parquet")
    found = [parquet.record_of(row, lambda path, content: path) for row in pq.read_table(file).to_pylist()]
    assert found == dataset
