"""The journal of a reward server: what is written stays, once, for as long as it should."""

import json
import os

import pytest

from diffalign.errors import UserError
from diffalign.outcomes import Outcomes, Stored

IDENTITY = {"scorers": {"a": {"name": "a", "params": {}}}}


def stored(key: str, at: float = 0.0) -> Stored:
    return Stored(("a", (key,)), f"digest of {key}", at, [{"status": "ok", "value": 1.0, "units": None, "detail": {}}])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "journal.jsonl"


def opened(path, now: float = 0.0, retention: float = 100.0) -> Outcomes:
    return Outcomes(path, retention, IDENTITY, clock=lambda: now)


def put(outcomes: Outcomes, *items: Stored) -> None:
    outcomes.write(items)
    outcomes.remember(items)


def test_what_was_written_is_there_again(path):
    first = opened(path)
    put(first, stored("x"), stored("y"))
    assert first.get(("a", ("x",))) == stored("x")
    first.close()
    second = opened(path)
    assert (len(second), second.get(("a", ("y",)))) == (2, stored("y"))
    assert second.get(("b", ("y",))) is None
    second.close()


def test_old_outcomes_are_forgotten_in_memory_and_in_the_file(path):
    first = opened(path, now=50)
    put(first, stored("old", 10), stored("new", 50))
    first.clock = lambda: 120.0
    put(first, stored("newer", 120))
    assert first.get(("a", ("old",))) is None
    assert len(first) == 2
    first.close()
    assert len(path.read_text().splitlines()) == 3
    second = opened(path, now=155)
    assert [json.loads(line)["unit"][1] for line in path.read_text().splitlines()] == [["newer"]]
    put(second, stored("last", 155))
    second.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_torn_line_is_cut(path):
    first = opened(path)
    put(first, stored("x"))
    first.close()
    with path.open("ab") as handle:
        handle.write(stored("y").line()[:-7])
    second = opened(path)
    put(second, stored("z"))
    second.close()
    third = opened(path)
    assert len(third) == 2
    third.close()


def test_a_failed_write_leaves_nothing(path, monkeypatch):
    outcomes = opened(path)
    put(outcomes, stored("x"))
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            outcomes.write([stored("y")])
    assert path.read_bytes() == before
    put(outcomes, stored("z"))
    outcomes.close()
    again = opened(path)
    assert len(again) == 2
    again.close()


def test_one_server_at_a_time(path):
    first = opened(path)
    with pytest.raises(UserError, match="another server uses this journal"):
        opened(path)
    first.close()
    opened(path).close()


def test_a_file_of_something_else(path):
    opened(path).close()
    path.write_text('{"unit": ["a", ["x", "y"]], "digest": "", "at": 0, "answers": [{}]}\n')
    with pytest.raises(UserError, match=r"journal\.jsonl:1: not an outcome: 1 answers for 2 keys"):
        opened(path)


def test_without_a_file_it_is_memory():
    outcomes = Outcomes(None, 100, IDENTITY, clock=lambda: 0.0)
    put(outcomes, stored("x"))
    assert len(outcomes) == 1
    outcomes.close()
