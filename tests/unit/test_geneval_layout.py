"""GenEval's files: read, written and summed up; the sums are derived a second time from the lines alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign import records as store
from diffalign.errors import UserError
from diffalign.geneval_layout import read_layout, read_metadata, summary, write_layout
from diffalign.records import Candidate, Record


def prompt(tag: str, name: str, count: int = 1, **more) -> dict:
    return {"tag": tag, "include": [{"class": name, "count": count, **more}], "prompt": f"a photo of {count} {name}"}


PROMPTS = [
    prompt("single_object", "bench"),
    prompt("single_object", "cow"),
    {**prompt("counting", "dog", 2), "exclude": [{"class": "dog", "count": 3}]},
    prompt("colors", "cup", color="red"),
]
CORRECT = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]


def lines(path: Path, content) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    return path


def picture(path: Path, shade: int, size=(4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def scored(folder: Path, ids=("000000", "000001", "000002", "000003"), suffix=".png") -> Path:
    """A records file as ``diffalign eval`` leaves it, three images to a prompt."""
    records = []
    for row, (name, meta) in enumerate(zip(ids, PROMPTS, strict=True)):
        candidates, details = [], []
        for k, value in enumerate(CORRECT[row]):
            sample = f"media/{row}-{k}{suffix}"
            picture(folder / sample, 40 * row + k)
            candidates.append(Candidate(sample=sample, labels={"geneval": float(value), "other": 0.5}))
            details.append(
                {} if value else {"reason": "expected\nmore", "detections": {"dog": [[1.0, 2.0, 3.0, 4.0, 0.95]]}}
            )
        scores = {"geneval": details, "other": [{"reason": "not this"}] * 3}
        records.append(Record(id=name, prompt=meta["prompt"], candidates=candidates, meta={**meta, "scores": scores}))
    store.write(folder / "scored.jsonl", records)
    return folder / "scored.jsonl"


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_numbered_lines(tmp_path):
    found = read_metadata(lines(tmp_path / "evaluation_metadata.jsonl", PROMPTS))
    assert [r.id for r in found] == ["00000", "00001", "00002", "00003"]
    assert [r.meta for r in found] == PROMPTS
    assert found[2].prompt == "a photo of 2 dog"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", r"m\.jsonl:2: not valid JSON"),
        ("[]", r"m\.jsonl:2: expected a JSON object with the texts `tag` and `prompt`"),
        ('{"tag": "colors", "include": []}', r"m\.jsonl:2: expected a JSON object with the texts"),
        ('{"tag": "colors", "prompt": "x", "include": []}', r"m\.jsonl:2: `include` must be a list of clauses"),
        (
            '{"tag": "a", "prompt": "x", "include": [{"class": "mouse", "count": 1}]}',
            r"m\.jsonl:2: include\.0: `class`",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, error):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(PROMPTS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=error):
        read_metadata(path)


def test_no_prompts_are_an_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_metadata(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").touch()
    with pytest.raises(UserError, match="empty"):
        read_metadata(tmp_path / "m.jsonl")


# --- layout -------------------------------------------------------------------------------------------------------


def test_the_layout_is_the_benchmarks(tmp_path):
    write_layout(scored(tmp_path), tmp_path / "out", "geneval")
    names = [f"{i:05d}/samples/{k:05d}.png" for i in range(4) for k in range(3)]
    metadata = [f"{i:05d}/metadata.jsonl" for i in range(4)]
    files = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(files) == sorted([*names, *metadata, "results.jsonl"])
    assert [json.loads((tmp_path / "out" / name).read_text("utf-8")) for name in metadata] == PROMPTS
    assert (tmp_path / "out" / names[4]).read_bytes() == (tmp_path / "media/1-1.png").read_bytes()


def test_results_are_lines_of_the_released_evaluator(tmp_path):
    write_layout(scored(tmp_path), tmp_path / "out", "geneval")
    results = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text("utf-8").splitlines()]
    assert len(results) == 12
    assert results[1] == {
        "filename": (tmp_path / "out/00000/samples/00001.png").as_posix(),
        "tag": "single_object",
        "prompt": "a photo of 1 bench",
        "correct": False,
        "reason": "expected\nmore",
        "metadata": json.dumps(PROMPTS[0]),
        "details": '{"dog": [[1.0, 2.0, 3.0, 4.0, 0.95]]}',
    }
    assert results[0]["correct"] is True
    assert (results[0]["reason"], results[0]["details"]) == ("", "{}")
    assert all(Path(result["filename"]).is_file() for result in results)


def test_numbers_as_ids_name_the_folders_and_others_are_counted(tmp_path):
    write_layout(scored(tmp_path, ids=("7", "000003", "12", "0")), tmp_path / "a", "geneval")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["00000", "00003", "00007", "00012", "results.jsonl"]
    assert json.loads((tmp_path / "a/00007/metadata.jsonl").read_text("utf-8")) == PROMPTS[0]
    write_layout(scored(tmp_path, ids=("7", "007", "x", "0")), tmp_path / "b", "geneval")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["00000", "00001", "00002", "00003", "results.jsonl"]


def test_other_pictures_become_png(tmp_path):
    write_layout(scored(tmp_path, suffix=".jpg"), tmp_path / "out", "geneval")
    with Image.open(tmp_path / "out/00003/samples/00000.png") as image, Image.open(tmp_path / "media/3-0.jpg") as was:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), np.asarray(was))


def test_what_was_laid_out_reads_back(tmp_path):
    path = scored(tmp_path, ids=("7", "3", "12", "0"))
    write_layout(path, tmp_path / "out", "geneval")
    found = list(read_layout(tmp_path / "out"))
    assert [r.id for r in found] == ["00000", "00003", "00007", "00012"]
    assert [r.meta for r in found] == [PROMPTS[i] for i in (3, 1, 0, 2)]
    assert [c.sample for c in found[2].candidates] == [f"00007/samples/{k:05d}.png" for k in range(3)]
    assert store.read_image(tmp_path / "out", found[0].candidates[0].sample or "").getpixel((0, 0)) == (120, 0, 135)
    store.write(tmp_path / "out/records.jsonl", found)
    assert list(store.read(tmp_path / "out/records.jsonl")) == found


def test_only_numbers_are_read(tmp_path):
    picture(tmp_path / "00001/samples/0.png", 0)
    picture(tmp_path / "00001/samples/grid.png", 0)
    picture(tmp_path / "00001/grid.png", 0)
    picture(tmp_path / "other/samples/0.png", 0)
    (tmp_path / "00001/metadata.jsonl").write_text(json.dumps(PROMPTS[0]), encoding="utf-8")
    (record,) = read_layout(tmp_path)
    assert [c.sample for c in record.candidates] == ["00001/samples/0.png"]


def test_a_folder_that_is_no_layout_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        list(read_layout(tmp_path / "missing"))
    with pytest.raises(UserError, match="no folders 00000"):
        list(read_layout(tmp_path))
    (tmp_path / "00000/samples").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metadata\.jsonl: no such file"):
        list(read_layout(tmp_path))
    (tmp_path / "00000/metadata.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="samples: no images"):
        list(read_layout(tmp_path))
    picture(tmp_path / "00000/samples/0.png", 0)
    with pytest.raises(UserError, match=r"metadata\.jsonl: expected a JSON object with the texts"):
        list(read_layout(tmp_path))


def test_what_cannot_be_laid_out_leaves_nothing_behind(tmp_path):
    path = scored(tmp_path)
    with pytest.raises(UserError, match=r"candidate 0: label 'other' is 0\.5, expected 0 or 1"):
        write_layout(path, tmp_path / "out", "other")
    with pytest.raises(UserError, match="label 'none' is None, expected 0 or 1"):
        write_layout(path, tmp_path / "out", "none")
    records = list(store.read(path))
    failed = records[0].candidates[0].model_copy(update={"labels": {}, "errors": {"geneval": "input: torn"}})
    store.write(path, [records[0].model_copy(update={"candidates": [failed]})])
    with pytest.raises(UserError, match=r"'geneval' could not score it \(input: torn\)"):
        write_layout(path, tmp_path / "out", "geneval")
    store.write(path, [records[0].model_copy(update={"meta": {}})])
    with pytest.raises(UserError, match="no GenEval `tag`"):
        write_layout(path, tmp_path / "out", "geneval")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["media", "scored.jsonl"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    with pytest.raises(UserError, match="exists already"):
        write_layout(path, tmp_path / "out", "geneval")


# --- summary ------------------------------------------------------------------------------------------------------


def test_the_summary_is_the_released_one(tmp_path):
    """Means over the images of a tag, then over the tags; a prompt is right if any of its images is."""
    write_layout(scored(tmp_path), tmp_path / "out", "geneval")
    found = summary(tmp_path / "out/results.jsonl")
    assert found["images"] == 12
    assert found["prompts"] == 4
    assert found["correct_images"] == pytest.approx(6 / 12)
    assert found["correct_prompts"] == pytest.approx(3 / 4)
    assert list(found["tasks"]) == ["single_object", "counting", "colors"]
    assert found["tasks"]["single_object"] == {"score": pytest.approx(2 / 6), "correct": 2, "images": 6}
    assert found["overall"] == round((2 / 6 + 1 / 3 + 1) / 3, 5)


def test_the_summary_of_random_results_by_arrays(tmp_path):
    rng = np.random.default_rng(0)
    prompts, tags = rng.integers(30, size=200), np.array(["b", "a", "c"])
    correct = rng.random(200) < 0.4
    rows = [
        {"tag": tags[p % 3], "metadata": json.dumps({"p": int(p)}), "correct": bool(c)}
        for p, c in zip(prompts, correct, strict=True)
    ]
    found = summary(lines(tmp_path / "r.jsonl", rows))
    assert found["correct_images"] == pytest.approx(correct.mean())
    any_right = [correct[prompts == p].any() for p in np.unique(prompts)]
    assert (found["prompts"], found["correct_prompts"]) == (len(any_right), pytest.approx(np.mean(any_right)))
    means = {tag: correct[tags[prompts % 3] == tag].mean() for tag in tags}
    assert {tag: task["score"] for tag, task in found["tasks"].items()} == pytest.approx(means)
    assert found["overall"] == pytest.approx(np.mean(list(means.values())), abs=5e-6)


def test_results_that_are_none_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match="no such file"):
        summary(path)
    path.touch()
    with pytest.raises(UserError, match="empty"):
        summary(path)
    good = {"tag": "a", "metadata": "{}", "correct": True}
    for bad in ("x", "[]", "{}", json.dumps({**good, "correct": 1}), json.dumps({**good, "metadata": {}})):
        path.write_text(json.dumps(good) + "\n" + bad + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"r\.jsonl:2: "):
            summary(path)
