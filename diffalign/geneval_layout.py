"""GenEval's files: its prompts, its folders of images, its results, and the summary of these.

The layout is that of the benchmark's own programs, which read what is written here, as this reads what they write::

    OUT/00000/metadata.jsonl         the metadata of one prompt, one JSON object
    OUT/00000/samples/00000.png ...  its images
    OUT/results.jsonl                an object per image: filename, tag, prompt, correct, reason, metadata, details
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

from diffalign import geneval
from diffalign import records as store
from diffalign.errors import UserError
from diffalign.files import replacing_folder
from diffalign.records import Candidate, Record, media_path, plain_text, read_image

METADATA, SAMPLES, RESULTS = "metadata.jsonl", "samples", "results.jsonl"
SCORES = "scores"  # where scorers leave their details in a record's meta
DIGITS = 5  # of folders, files and the overall score


# --- prompts ------------------------------------------------------------------------------------------------------


def read_metadata(path: str | Path) -> list[Record]:
    """The prompts of an ``evaluation_metadata.jsonl``: ids are zero-padded line numbers from 0, ``meta`` the lines.

    Raises:
        UserError: there is no such file, it is empty, or a line (named by its number) is not GenEval's metadata.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = path.read_bytes().splitlines()
    if not lines:
        raise UserError(f"{path}: the file is empty")
    records = []
    for number, line in enumerate(lines):
        metadata = _metadata(line, f"{path}:{number + 1}")
        wrong = geneval.complaint(metadata, geneval.CLASSES, geneval.COLORS)
        if wrong:
            raise UserError(f"{path}:{number + 1}: {wrong}")
        records.append(_record(f"{number:0{DIGITS}d}", metadata))
    return records


def _metadata(text: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), str) for key in ("tag", "prompt")):
        raise UserError(f"{where}: expected a JSON object with the texts `tag` and `prompt`")
    return content


def _record(name: str, metadata: dict[str, Any], candidates: Sequence[Candidate] = ()) -> Record:
    return Record(id=name, prompt=metadata["prompt"], meta=metadata, candidates=list(candidates))


# --- folders of images --------------------------------------------------------------------------------------------


def read_layout(folder: str | Path) -> Iterator[Record]:
    """The prompts and images of a GenEval folder, in order; media paths are relative to it.

    As in the benchmark, a prompt is a folder with a number as its name, and an image has one before ``.png``.

    Raises:
        UserError: there is no such folder, it holds no prompt, or one has no images or no sound metadata.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    prompts = sorted((p for p in folder.iterdir() if p.is_dir() and _is_number(p.name)), key=lambda p: int(p.name))
    if not prompts:
        raise UserError(f"{folder}: no folders 00000, 00001, ... as GenEval lays out its images")
    for prompt in prompts:
        path = prompt / METADATA
        if not path.is_file():
            raise UserError(f"{path}: no such file; it holds GenEval's metadata of the prompt")
        samples = sorted((prompt / SAMPLES).glob("*.png"), key=lambda image: image.name)
        images = [image for image in samples if _is_number(image.stem)]
        if not images:
            raise UserError(f"{prompt / SAMPLES}: no images 00000.png, 00001.png, ...")
        candidates = [Candidate(sample=image.relative_to(folder).as_posix()) for image in images]
        yield _record(prompt.name, _metadata(path.read_bytes(), str(path)), candidates)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"[0-9]+", name) is not None


def write_layout(records_path: str | Path, out: str | Path, label: str) -> None:
    """Lay out scored records as GenEval does, with ``results.jsonl``; ``out`` appears whole or not at all.

    Ids that are numbers name the folders, others are numbered in order. The metadata is the record's ``meta`` without
    the scorers' details; of these ``reason`` and ``detections`` are ``label``'s own.

    Raises:
        UserError: ``out`` holds something, an image cannot be read, a record's meta has no tag, or a candidate has
            no label of 0 or 1 by that name.
    """
    records_path, out = Path(records_path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder")
    records = list(store.read(records_path))
    names = _folder_names(records)
    with replacing_folder(out) as aside, (aside / RESULTS).open("wb") as results:
        for name, record in zip(names, records, strict=True):
            _write_prompt(record, records_path.parent, aside / name, out / name, label, results)


def _folder_names(records: Sequence[Record]) -> list[str]:
    numbers = [int(record.id) for record in records if _is_number(record.id)]
    if len(set(numbers)) < len(records):
        numbers = list(range(len(records)))
    return [f"{number:0{DIGITS}d}" for number in numbers]


def _write_prompt(record: Record, root: Path, folder: Path, final: Path, label: str, results: BinaryIO) -> None:
    metadata = {key: value for key, value in record.meta.items() if key != SCORES}
    metadata.setdefault("prompt", plain_text(record.prompt))
    if not isinstance(metadata.get("tag"), str):
        raise UserError(f"record {record.id!r}: its meta has no GenEval `tag`")
    (folder / SAMPLES).mkdir(parents=True)
    (folder / METADATA).write_bytes(_json(metadata))
    details = record.meta.get(SCORES, {}).get(label) or [{}] * len(record.candidates)
    for index, (candidate, detail) in enumerate(zip(record.candidates, details, strict=True)):
        value = candidate.labels.get(label)
        where = f"record {record.id!r}, candidate {index}"
        if label in candidate.errors:
            raise UserError(f"{where}: {label!r} could not score it ({candidate.errors[label]})")
        if value not in (0.0, 1.0):
            raise UserError(f"{where}: label {label!r} is {value}, expected 0 or 1, as official rules give it")
        if candidate.sample is None:
            raise UserError(f"{where}: has no image")
        image = f"{SAMPLES}/{index:0{DIGITS}d}.png"
        _copy_image(root, candidate.sample, folder / image)
        results.write(_json(_result(final / image, metadata, value == 1.0, detail)) + b"\n")


def _result(path: Path, metadata: Mapping[str, Any], correct: bool, detail: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "filename": path.as_posix(),
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": detail.get("reason", ""),
        "metadata": json.dumps(metadata),
        "details": json.dumps(detail.get("detections", {})),
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()


def _copy_image(root: Path, sample: str, target: Path) -> None:
    """PNG files as they are, others as what they show."""
    image = read_image(root, sample)
    if sample.endswith(".png"):
        shutil.copyfile(media_path(root, sample), target)
    else:
        image.save(target)


# --- summary ------------------------------------------------------------------------------------------------------


def summary(results_path: str | Path) -> dict[str, Any]:
    """What GenEval reports of a ``results.jsonl``.

    Returns:
        ``images`` and ``prompts``: how many (prompts are told apart by their metadata); ``correct_images``: share of
        images; ``correct_prompts``: share of prompts with a correct image; ``tasks``: tag -> ``correct``, ``images``
        and their ratio ``score``, in file order; ``overall``: mean of the tasks' scores, to five decimals.

    Raises:
        UserError: there is no such file, it is empty, or a line (named by its number) is no result.
    """
    path = Path(results_path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    tasks: defaultdict[str, list[bool]] = defaultdict(list)
    prompts: defaultdict[str, list[bool]] = defaultdict(list)
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            result = json.loads(line)
            tag, metadata, correct = result["tag"], result["metadata"], result["correct"]
        except (ValueError, TypeError, LookupError, RecursionError):
            raise UserError(f"{path}:{number}: expected a JSON object with tag, metadata and correct") from None
        if not isinstance(tag, str) or not isinstance(metadata, str) or not isinstance(correct, bool):
            raise UserError(f"{path}:{number}: tag and metadata must be texts, correct true or false")
        tasks[tag].append(correct)
        prompts[metadata].append(correct)
    if not tasks:
        raise UserError(f"{path}: the file is empty")
    images = [correct for task in tasks.values() for correct in task]
    return {
        "images": len(images),
        "prompts": len(prompts),
        "correct_images": fmean(images),
        "correct_prompts": fmean(map(any, prompts.values())),
        "tasks": {tag: {"score": fmean(v), "correct": sum(v), "images": len(v)} for tag, v in tasks.items()},
        "overall": round(fmean(map(fmean, tasks.values())), DIGITS),
    }


def report(found: Mapping[str, Any]) -> str:
    """A summary as lines, with the numbers that GenEval's own script prints."""
    lines = [
        f"GenEval: {found['images']} images of {found['prompts']} prompts",
        f"correct images: {found['correct_images']:.2%}; prompts with a correct image: {found['correct_prompts']:.2%}",
        *(f"  {tag}: {v['score']:.2%} ({v['correct']} of {v['images']})" for tag, v in found["tasks"].items()),
        f"overall: {found['overall']:.5f}",
    ]
    return "\n".join(lines)
