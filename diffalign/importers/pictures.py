"""Published preferences over pictures: Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB."""

from __future__ import annotations

from typing import Any

from diffalign.errors import UserError
from diffalign.importers.fields import array, known, number, text
from diffalign.importers.shelf import Shelf
from diffalign.records import Candidate, Record

CHOICES = (None, (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
RATINGS = ("overall_rating", "image_text_alignment_rating", "fidelity_rating")


def pickapic(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A row of Pick-a-Pic v1 or v2: ``reward`` is 1 and 0, or 0.5 for both when they tie.

    Rows whose ``has_label`` is false and whose labels are null get none. SmPO's ``ps_score_0`` and ``ps_score_1``
    become the label ``ps_score``.
    """
    unlabelled = row.get("has_label") is False and row["label_0"] is None and row["label_1"] is None
    choice = None if unlabelled else (number(row, "label_0"), number(row, "label_1"))
    if choice not in CHOICES:
        raise UserError(f"label_0, label_1: {choice} is none of {', '.join(map(str, CHOICES[1:]))}")
    candidates = []
    for side in "01":
        labels: dict[str, Any] = {} if choice is None else {"reward": choice[int(side)]}
        if row.get(f"ps_score_{side}") is not None:
            labels["ps_score"] = number(row, f"ps_score_{side}")
        sides = {"model": f"model_{side}", "uid": f"image_{side}_uid", "url": f"image_{side}_url"}
        origin = {key: row[column] for key, column in sides.items() if row.get(column) is not None}
        candidates.append(Candidate(sample=shelf.keep(row[f"jpg_{side}"]), labels=labels, origin=origin))
    about = ("ranking_id", "user_id", "num_example_per_prompt", "are_different", "best_image_uid", "created_at")
    return Record(
        id=name, prompt=text(row, "caption"), source="pickapic", candidates=candidates, meta=known(row, *about)
    )


def hpdv2(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A training item (``reward`` is ``human_preference``) or a test item, whose rank 1 is the best: minus the rank."""
    paths = array(row, "file_path" if "file_path" in row else "image_path")
    key, sign = ("human_preference", 1) if "human_preference" in row else ("rank", -1)
    values = array(row, key, len(paths))
    if len(paths) < 2:
        raise UserError(f"has {len(paths)} pictures, expected two or more")
    rewards = [sign * number({key: value}, key) for value in values]
    candidates = [
        Candidate(sample=shelf.take(path), labels={"reward": reward}, origin={"file": path})
        for path, reward in zip(paths, rewards, strict=True)
    ]
    meta = known(row, "raw_annotations", "user_hash")
    return Record(id=name, prompt=text(row, "prompt"), source="hpdv2", candidates=candidates, meta=meta)


def hpdv3(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """A pair whose ``path1`` is preferred; how sure the annotators were stays in ``meta``."""
    candidates = []
    for side, reward in (("1", 1.0), ("2", 0.0)):
        path, model = row[f"path{side}"], row.get(f"model{side}")
        origin = {"file": path} if model is None else {"model": model, "file": path}
        candidates.append(Candidate(sample=shelf.take(path), labels={"reward": reward}, origin=origin))
    meta = known(row, "confidence", "choice_dist")
    return Record(id=name, prompt=text(row, "prompt"), source="hpdv3", candidates=candidates, meta=meta)


def imagereward(name: str, row: dict[str, Any], shelf: Shelf) -> Record:
    """The pictures of a prompt of ImageRewardDB: rank 1 is the best, so ``reward`` is minus the rank; ratings stay."""
    candidates = []
    for item in row["rows"]:
        if text(item, "prompt") != row["prompt"]:
            raise UserError("prompt: differs between the rows of one prompt_id")
        labels: dict[str, Any] = {key: number(item, key) for key in RATINGS if item.get(key) is not None}
        labels["reward"] = -number(item, "rank")
        inside = item.get("image")
        sample = shelf.take(item["image_path"]) if inside is None else shelf.keep(inside)
        candidates.append(Candidate(sample=sample, labels=labels, origin=known(item, "image_path")))
    meta = known(row, "classification", "image_amount_in_total")
    return Record(id=name, prompt=text(row, "prompt"), source="imagereward", candidates=candidates, meta=meta)
