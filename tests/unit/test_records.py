"""The data store: what is written reads back, what is broken is refused by name, crashes lose nothing whole."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from diffalign import files, records
from diffalign.errors import UserError
from diffalign.records import Appender, Candidate, Message, Record


def record(name: str, *rewards: float, **meta) -> Record:
    candidates = [Candidate(sample=f"media/{name}-{i}.png", labels={"reward": r}) for i, r in enumerate(rewards)]
    return Record(id=name, prompt="a photo of a circle", candidates=candidates, meta=meta)


def names(path) -> list[str]:
    return [r.id for r in records.read(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


class TestModels:
    def test_candidate_has_exactly_one_of_sample_and_text(self):
        with pytest.raises(ValidationError, match="exactly one"):
            Candidate()
        with pytest.raises(ValidationError, match="exactly one"):
            Candidate(sample="a.png", text="b")
        assert Candidate(text=[Message(role="assistant", content="hi")]).text

    @pytest.mark.parametrize("bad", [math.nan, math.inf, [0.0, -math.inf]])
    def test_labels_are_finite(self, bad):
        with pytest.raises(ValidationError, match=r"labels\.clip.*not a finite number"):
            Candidate(sample="a.png", labels={"clip": bad})

    @pytest.mark.parametrize("bad", ["0.5", True, None, []])
    def test_labels_are_numbers_and_not_coerced(self, bad):
        with pytest.raises(ValidationError):
            Candidate.model_validate({"sample": "a.png", "labels": {"clip": bad}})

    def test_nan_hides_nowhere(self):
        with pytest.raises(ValidationError, match=r"meta\.a\.1\.b is nan"):
            Record(id="x", prompt="", meta={"a": [0, {"b": math.nan}]})
        with pytest.raises(ValidationError, match=r"origin\.guidance is inf"):
            Candidate(text="", origin={"guidance": math.inf})


class TestReadWrite:
    def test_round_trip(self, path):
        written = [record("a", 1.0, 2.0, tag="colors"), record("b"), Record(id="ü\u2028", prompt="晴\n\x85")]
        records.write(path, iter(written))
        assert list(records.read(path)) == written
        assert path.read_bytes().count(b"\n") == 3

    def test_reading_streams(self, path):
        path.write_text('{"id": "a", "prompt": ""}\nbroken\n')
        stream = records.read(path)
        assert next(stream).id == "a"
        with pytest.raises(UserError, match=r"records\.jsonl:2: not valid JSON"):
            next(stream)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is empty"),
            ("[1]\n", r":1: .*dictionary"),
            ('{"id": "a", "prompt": ""}\n\n', ":2: not valid JSON"),
            ('{"id": "a", "prompt": ""}\n{"id": "b", "pro', r":2: .*cut off.*re-run the stage"),
            ('{"id": "a", "prompt": ""}', r":1: .*cut off"),
            ('{"id": "a", "prompt": ""}\n' * 2, r":2: id 'a' is already on line 1"),
            ('{"id": "a", "prompt": "", "promt": ""}\n', r":1: record 'a': promt"),
            (
                '{"id": "a", "prompt": "", "candidates": [{"text": "", "labels": {"clip": NaN}}]}\n',
                r"record 'a': .*clip",
            ),
            ('{"id": "a", "prompt": "", "candidates": [{"text": "", "labels": {"clip": 1e999}}]}\n', r"clip is inf"),
            ('{"id": "", "prompt": ""}\n', ":1: "),
            ("[" * 100_000 + "\n", ":1: not valid JSON"),
        ],
    )
    def test_refusals_name_the_line(self, path, content, message):
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            list(records.read(path))
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)

    def test_not_utf8(self, path):
        path.write_bytes(b"\xff\xfe\n")
        with pytest.raises(UserError, match=":1: not valid JSON"):
            list(records.read(path))

    def test_missing_file_and_folder(self, path, tmp_path):
        with pytest.raises(UserError, match="no such records file"):
            list(records.read(path))
        with pytest.raises(UserError, match="is a folder"):
            list(records.read(tmp_path))
        with pytest.raises(UserError, match="is a folder"):
            records.write(tmp_path, [record("a")])

    def test_write_is_atomic(self, path, tmp_path):
        records.write(path, [record("old")])

        def fails():
            yield record("new")
            raise RuntimeError("disk on fire")

        with pytest.raises(RuntimeError, match="on fire"):
            records.write(path, fails())
        assert names(path) == ["old"]
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ([], "no records"),
            ([record("a"), record("a")], "two records have the id 'a'"),
            ([record("a", 0.0).model_copy(update={"meta": {"x": math.nan}})], r"record 'a' .*meta\.x is nan"),
            ([record("a").model_copy(update={"meta": {"x": np.float32(1)}})], "record 'a' cannot be written"),
            ([record("a").model_copy(update={"prompt": "\ud800"})], "record 'a' cannot be written"),
        ],
    )
    def test_write_refuses_what_would_not_read_back(self, tmp_path, path, bad, message):
        with pytest.raises(UserError, match=message):
            records.write(path, bad)
        assert not list(tmp_path.iterdir())

    def test_nan_label_is_not_written_as_null(self, path):
        candidate = Candidate(text="").model_copy(update={"labels": {"clip": math.nan}})
        with pytest.raises(UserError, match=r"record 'a' .*candidates\.0\.labels\.clip is nan"):
            records.write(path, [Record(id="a", prompt="").model_copy(update={"candidates": [candidate]})])

    def test_content_is_on_disk_before_the_name_changes(self, path, monkeypatch):
        synced = []
        monkeypatch.setattr(records.os, "fsync", lambda descriptor: synced.append(path.exists()))
        records.write(path, [record("a")])
        assert synced == [False, True], "the file before the rename, then the folder"


class TestAppender:
    def test_creates_appends_and_resumes(self, tmp_path):
        path = tmp_path / "new" / "records.jsonl"
        with Appender(path) as out:
            assert out.done == set()
            out.append([record("a"), record("b")])
            assert names(path) == ["a", "b"], "on disk before the file is closed"
        with Appender(path) as out:
            assert out.done == {"a", "b"}
            out.append([record("c")])
            assert out.done == {"a", "b", "c"}
        assert names(path) == ["a", "b", "c"]

    @pytest.mark.parametrize("cut", [1, 10, 30])
    def test_torn_last_line_is_cut_off(self, path, cut):
        records.write(path, [record("a", 1.0), record("b", 2.0)])
        whole = path.read_bytes()
        path.write_bytes(whole[:-cut])
        with Appender(path) as out:
            assert out.done == {"a"}
            out.append([record("b", 2.0)])
        assert path.read_bytes() == whole

    def test_only_line_torn(self, path):
        path.write_bytes(b'{"id"')
        with Appender(path) as out:
            assert out.done == set()
        assert path.read_bytes() == b""

    def test_damage_in_the_middle_is_refused_and_kept(self, path):
        path.write_bytes(b'\0\0\n{"id": "a", "prompt": ""}\n')
        before = path.read_bytes()
        with pytest.raises(UserError, match=":1: not valid JSON"), Appender(path):
            pass
        assert path.read_bytes() == before

    def test_one_bad_record_writes_none_of_them(self, path):
        with Appender(path) as out:
            with pytest.raises(UserError, match="cannot be written"):
                out.append([record("a"), record("b").model_copy(update={"meta": {"x": math.nan}})])
            with pytest.raises(UserError, match="already there"):
                out.append([record("a"), record("a")])
            out.append([record("a")])
            with pytest.raises(UserError, match="already there"):
                out.append([record("a")])
        assert names(path) == ["a"]


class TestSiblings:
    def test_same_folder_different_files(self, tmp_path):
        source = tmp_path / "a.jsonl"
        assert files.siblings(source, tmp_path / "b.jsonl") == (source, tmp_path / "b.jsonl")
        with pytest.raises(UserError, match="media paths are relative"):
            files.siblings(source, tmp_path / "elsewhere" / "b.jsonl")
        with pytest.raises(UserError, match="is the input itself"):
            files.siblings(source, tmp_path / "." / "a.jsonl")

    def test_link_to_the_input(self, tmp_path):
        source, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        source.touch()
        link.symlink_to(source)
        with pytest.raises(UserError, match="is the input itself"):
            files.siblings(source, link)


class TestMediaPath:
    def test_inside(self, tmp_path):
        assert records.media_path(tmp_path, "media/a.png") == (tmp_path / "media" / "a.png").resolve()

    @pytest.mark.parametrize(
        "bad", ["", "/etc/passwd", "../a.png", "media/../../a.png", "media/..", "C:/a.png", "media\\a.png", "a\0.png"]
    )
    def test_escapes(self, tmp_path, bad):
        with pytest.raises(UserError, match="must be relative"):
            records.media_path(tmp_path, bad)

    def test_links(self, tmp_path):
        root, outside = tmp_path / "root", tmp_path / "outside"
        (root / "real").mkdir(parents=True)
        outside.mkdir()
        (root / "inner").symlink_to(root / "real")
        (root / "outer").symlink_to(outside)
        (root / "loop").symlink_to(root / "loop")
        assert records.media_path(root, "inner/a.png") == (root / "real" / "a.png").resolve()
        for bad in ("outer", "outer/a.png"):
            with pytest.raises(UserError, match="a link leads out"):
                records.media_path(root, bad)
        with pytest.raises(UserError, match="loop"):
            records.read_image(root, "loop")

    def test_root_may_itself_be_a_link(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert records.media_path(tmp_path / "link", "a.png") == (tmp_path / "real" / "a.png").resolve()


class TestImages:
    @pytest.fixture
    def pixels(self):
        return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    def test_round_trip(self, tmp_path, pixels):
        records.save_image(tmp_path / "deep" / "media" / "a.png", pixels)
        image = records.read_image(tmp_path, "deep/media/a.png")
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)
        assert [p.name for p in (tmp_path / "deep" / "media").iterdir()] == ["a.png"]

    def test_save_leaves_the_old_image_when_it_fails(self, tmp_path, pixels, monkeypatch):
        records.save_image(tmp_path / "a.png", pixels)

        def half(self, handle, format):
            handle.write(b"\x89PNG")
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", half)
            with pytest.raises(OSError, match="no space"):
                records.save_image(tmp_path / "a.png", 255 - pixels)
        np.testing.assert_array_equal(np.asarray(records.read_image(tmp_path, "a.png")), pixels)
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("bad", [np.zeros((2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((2, 2, 4), np.uint8)])
    def test_save_refuses_other_arrays(self, tmp_path, bad):
        with pytest.raises(ValueError, match="expected uint8"):
            records.save_image(tmp_path / "a.png", bad)

    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.png: no such image"):
            records.read_image(tmp_path, "a.png")

    def test_every_truncation_is_refused(self, tmp_path, pixels):
        records.save_image(tmp_path / "a.png", pixels)
        whole = (tmp_path / "a.png").read_bytes()
        for keep in range(0, len(whole) - 40, 97):
            (tmp_path / "a.png").write_bytes(whole[:keep])
            with pytest.raises(UserError, match=r"a\.png: truncated or not an image"):
                records.read_image(tmp_path, "a.png")

    def test_not_an_image(self, tmp_path):
        (tmp_path / "a.png").write_text("hello")
        with pytest.raises(UserError, match=r"a\.png: truncated or not an image"):
            records.read_image(tmp_path, "a.png")

    @pytest.mark.parametrize("pillow_limit", [10**8, 400, 100])  # our own limit, Pillow's warning, Pillow's error
    def test_too_many_pixels(self, tmp_path, pixels, monkeypatch, pillow_limit):
        records.save_image(tmp_path / "a.png", pixels)
        monkeypatch.setattr(records, "MAX_PIXELS", 599)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
        with pytest.raises(UserError, match=r"a\.png: more than 599 pixels"):
            records.read_image(tmp_path, "a.png")

    def test_limit_itself_is_fine(self, tmp_path, pixels, monkeypatch):
        records.save_image(tmp_path / "a.png", pixels)
        monkeypatch.setattr(records, "MAX_PIXELS", 600)
        assert records.read_image(tmp_path, "a.png").size == (30, 20)

    def test_modes(self, tmp_path):
        Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
        assert records.read_image(tmp_path, "grey.png").getpixel((0, 0)) == (7, 7, 7)
        Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
        assert records.read_image(tmp_path, "clear.png").getpixel((0, 0)) == (255, 255, 255)
        Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert("P").save(tmp_path / "p.png", transparency=b"\0\1")
        assert records.read_image(tmp_path, "p.png").mode == "RGB"
        Image.new("I;16", (2, 2), 60000).save(tmp_path / "deep.png")
        with pytest.raises(UserError, match="more than 8 bits"):
            records.read_image(tmp_path, "deep.png")

    def test_orientation_is_applied(self, tmp_path):
        image = Image.new("RGB", (4, 2))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.jpg", exif=exif)
        assert records.read_image(tmp_path, "a.jpg").size == (2, 4)


class TestSummary:
    def test_counts(self):
        rows = [record("a", 1.0, 3.0, tag="colors"), record("b", 2.0, 2.0, tag="colors"), record("c", tag="position")]
        segments = Candidate(text="", labels={"vq": [1.0, 2.0]})
        failed = Candidate(text="", errors={"vq": "timeout: after 5 s"})
        rows.append(Record(id="d", prompt="", candidates=[segments, failed]))
        assert records.summary(iter(rows)) == {
            "records": 4,
            "candidates": {0: 1, 2: 3},
            "labels": {
                "reward": {"count": 4, "mean": 2.0, "min": 1.0, "max": 3.0},
                "vq": {"count": 1, "mean": 1.5, "min": 1.5, "max": 1.5},
            },
            "ties": 1,
            "tasks": {"colors": 2, "position": 1},
            "failed": {"vq": 1},
        }

    def test_of_nothing(self):
        assert records.summary([])["records"] == 0


def test_written_lines_are_plain_json(path):
    records.write(path, [Record(id="a", prompt="é", candidates=[Candidate(text="t", labels={"n": 1.0})])])
    assert path.read_text(encoding="utf-8").count("é") == 1
    assert json.loads(path.read_bytes()) == {
        "id": "a",
        "prompt": "é",
        "candidates": [{"text": "t", "labels": {"n": 1.0}}],
    }


def test_replacing_makes_folders_and_cleans_up(tmp_path):
    with pytest.raises(UserError, match="stop"), files.replacing(tmp_path / "a" / "b.jsonl"):
        raise UserError("stop")
    assert list((tmp_path / "a").iterdir()) == []


def test_an_unfinished_output_is_refused(tmp_path):
    out = tmp_path / "out.jsonl"
    files.require_complete(out, 3)  # without a sidecar it is not the output of a stage
    files.claim(out, {"seed": 0, "count": 4})
    files.require_complete(out, 4)
    with pytest.raises(UserError, match=r"out\.jsonl: holds 3 of 4 records; run the stage"):
        files.require_complete(out, 3)
    files.sidecar_of(out).write_text("{}")
    with pytest.raises(UserError, match=r"out\.jsonl\.meta\.json: not readable"):
        files.require_complete(out, 4)
