"""Somebody who answers what a run of `online.source: human` asks, through the application of `diffalign label`."""

import threading
import time
from pathlib import Path

from diffalign import config as cfg
from diffalign import label
from diffalign.config.file import load
from diffalign.label.answers import Journal
from diffalign.label.server import Gate, application

from ..unit.test_label_server import Client


def is_whole(folder: Path) -> bool:
    """Whether a round can be answered."""
    return (folder / "records.jsonl").is_file()


def answer(folder: Path, limit: int | None = None) -> int:
    """Answer the questions of a round that are open, at most so many: the later candidate is the better one.

    Returns:
        How many were answered.
    """
    config = load(cfg.LabelConfig, folder / "label.yaml")
    asked = label.questions(config)
    label.claim(Path(config.out), label.identity(config))
    given = 0
    with Journal(Path(config.out)) as journal:
        client = Client(application(asked, journal, Gate("127.0.0.1", 8410, None, True), [], None))
        item = client.post("/api/next", annotator="ann").json()["item"]
        while item and given != limit:
            shown = asked.shown("ann", asked.items[item["id"]])
            places = sorted(range(len(shown)), key=lambda place: -shown[place])
            best_first = places[0] if config.task == "pair" else [[place] for place in places]
            item = client.post("/api/answer", annotator="ann", item=item["id"], answer=best_first).json()["item"]
            given += 1
    return given


def answering(rounds: Path, count: int) -> threading.Thread:
    """A thread that answers so many rounds as they appear."""

    def work() -> None:
        for index in range(count):
            while not is_whole(rounds / f"{index:06d}"):
                time.sleep(0.02)
            answer(rounds / f"{index:06d}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
