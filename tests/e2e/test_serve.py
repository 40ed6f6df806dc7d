"""Reward server and client: the same scores as without them, and every item once."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from diffalign import mesh, records, wire
from diffalign.errors import UserError
from diffalign.records import Candidate, Record
from diffalign.scoring import Failure, Sample, Score, load_scorer, score_records

from .reward_server import Server, answers, ask, noise, remote, text


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for the tests that do not stop it."""
    folder = tmp_path_factory.mktemp("served")
    options = {"max_body_mb": 2, "max_items": 100, "max_pixels": 1_000_000, "upload_timeout": 1.0}
    with Server(folder, journal=str(folder / "journal.jsonl"), **options) as running:
        yield running


class TestClient:
    def test_scores_are_those_of_the_scorer(self, server):
        samples = [Sample("p", noise(seed)) for seed in range(7)]
        assert remote(server, "jpeg", batch=3)(samples) == load_scorer("jpeg")(samples)

    def test_files_conditions_meta_and_texts_arrive(self, server, tmp_path):
        (tmp_path / "clip.mp4").write_bytes(b"c" * 11)
        (tmp_path / "shape.obj").write_bytes(b"o" * 13)
        (tmp_path / "edge.PNG").write_bytes(b"e" * 17)
        mesh.write_occupancy(tmp_path / "grid.npz", np.ones((4, 4, 4), dtype=bool))
        samples = [
            Sample("p", video=tmp_path / "clip.mp4", meta={"é": [1, None]}),
            Sample("p", mesh=tmp_path / "shape.obj"),
            Sample("p", mesh=tmp_path / "grid.npz"),
            Sample("p", image=noise(0), condition=tmp_path / "edge.PNG"),
            Sample("p \ud800", text="x"),
        ]
        found = remote(server, "files")(samples)
        assert [one.value for one in found] == [11.0, 13.0, 64.0, 17.0, 0.0]
        assert found[0].detail["meta"] == {"é": [1, None]}
        assert not Path(found[0].detail["path"]).exists()

    def test_failures_stay_failures(self, server, tmp_path):
        prompts = ["fine", "fail", "raise", "nan"]
        found = remote(server, "files")([Sample(prompt, text="x") for prompt in prompts])
        assert isinstance(found[0], Score)
        assert [(one.kind, "as you wish" in one.reason) for one in found[1:]] == [
            ("input", True),
            ("RuntimeError", True),
            ("not-finite", False),
        ]
        lost = remote(server, "files")([Sample("p", video=tmp_path / "none.mp4"), Sample("p", text="y")])
        assert lost[0].kind == "input"
        assert lost[1] == Score(0.0, None, {"path": "None", "meta": {}})

    def test_comparing_scorers_see_whole_records(self, server, tmp_path):
        rows = [
            Record(id=str(n), prompt="p", candidates=[Candidate(text="x" * k) for k in (3, 1, 2)]) for n in range(3)
        ]
        scorer = remote(server, "ranks", batch=3)
        for record in score_records(rows, tmp_path, {"rank": scorer}, batch=256):
            assert [candidate.labels["rank"] for candidate in record.candidates] == [[0.0, 3.0]] * 3

    def test_ten_thousand_items(self, server):
        samples = [Sample("p", text=f"{n}" * 3) for n in range(10_000)]
        found = remote(server, "files", batch=1000)(samples)
        assert all(isinstance(one, Score) for one in found)
        assert len(found) == 10_000

    def test_an_item_that_is_too_large_is_no_zero(self, server, tmp_path):
        (tmp_path / "clip.mp4").write_bytes(bytes(3_000_000))
        found = remote(server, "files")([Sample("p", video=tmp_path / "clip.mp4"), Sample("p", text="x")])
        assert found[0] == Failure("input", "larger than the server takes")
        assert isinstance(found[1], Score)

    def test_what_cannot_work_is_said_at_once(self, server, monkeypatch):
        with pytest.raises(UserError, match=r"has no scorer 'jpge'; did you mean 'jpeg'"):
            remote(server, "jpge")
        with pytest.raises(UserError, match="NO_SUCH_VARIABLE is not set"):
            remote(server, "jpeg", token_env="NO_SUCH_VARIABLE")
        with pytest.raises(UserError, match=r"no answer from http://127\.0\.0\.1:1: ConnectError"):
            load_scorer("remote", url="http://127.0.0.1:1", scorer="jpeg", budget=0.5)
        with pytest.raises(UserError, match="expected http"):
            load_scorer("remote", url="127.0.0.1:1", scorer="jpeg")
        monkeypatch.setattr(wire, "VERSION", 2)
        with pytest.raises(UserError, match="speaks version 1 of the protocol, not 2"):
            remote(server, "jpeg")

    def test_a_server_that_is_gone_costs_failures(self, tmp_path):
        with Server(tmp_path) as running:
            scorer = remote(running, "files", budget=1.0, batch=2)
            assert scorer([Sample("p", text="x")]) == [Score(0.0, None, {"path": "None", "meta": {}})]
        started = time.monotonic()
        found = scorer([Sample("p", text="x")] * 5)
        assert time.monotonic() - started < 3  # the budget once, and not once per request
        assert [one.kind for one in found] == ["remote"] * 5


class TestOnce:
    def test_asking_again_scores_nothing_again(self, server):
        before = len(server.scored())
        parcels = [text("once-1", "a"), text("once-2", "bb")]
        first, second = (answers(ask(server, "slow", parcels)) for _ in range(2))
        assert first == second
        assert len(server.scored()) == before + 2

    def test_twins_at_the_same_time_are_scored_once(self, server):
        found: list[list[dict]] = []
        parcels = [text(f"twin-{n}", f"twin {n}") for n in range(20)]
        threads = [
            threading.Thread(target=lambda: found.append(answers(ask(server, "slow", parcels)))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [found[0]] * 8
        texts = [line for line in server.scored() if line.startswith("twin ")]
        assert sorted(texts) == sorted(f"twin {n}" for n in range(20))

    def test_a_key_names_one_item(self, server):
        ask(server, "files", [text("mine", "a")])
        [other] = answers(ask(server, "files", [text("mine", "b")]))
        assert (other["status"], other["kind"]) == ("failed", "input")
        [scorer] = answers(ask(server, "slow", [text("mine", "b")]))  # keys belong to a scorer
        assert scorer["status"] == "ok"

    def test_items_of_many_clients_share_a_call(self, server):
        threads = [
            threading.Thread(target=ask, args=(server, "slow", [text(f"share-{n}", f"share {n}")])) for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sizes = [int(line.split()[0]) for line in server.log.read_text().splitlines() if "share" in line]
        assert len(sizes) == 16
        assert max(sizes) > 2

    def test_late_items_are_timeouts_and_can_be_asked_for(self, tmp_path):
        with Server(tmp_path, max_batch=1) as running:
            parcels = [text(f"k{n}", f"late {n}") for n in range(12)]
            found = answers(ask(running, "slow", parcels, timeout=0.2))
            states = [one["status"] for one in found]
            assert states[0] == "ok"
            assert states[-1] == "timeout"
            again = answers(ask(running, "slow", parcels))
            assert [one["status"] for one in again] == ["ok"] * 12
            assert len(running.scored()) == 12
            # a client does the same by itself
            scorer = remote(running, "slow", timeout=0.2)
            assert [one.value for one in scorer([Sample("p", text="x" * n) for n in range(1, 13)])] == list(
                range(1, 13)
            )
            assert len(running.scored()) == 24

    def test_a_kill_loses_nothing_that_was_written(self, tmp_path):
        journal = tmp_path / "journal.jsonl"
        parcels = [text(f"k{n}", f"text {n}") for n in range(10)]
        running = Server(tmp_path, journal=str(journal))
        running.start()
        first = answers(ask(running, "slow", parcels[:5]))
        running.stop(signal.SIGKILL)
        with journal.open("ab") as handle:
            handle.write(b'{"unit": ["slow", ["torn')
        (tmp_path / "journal.jsonl.files").mkdir(exist_ok=True)
        (tmp_path / "journal.jsonl.files" / "left").write_text("behind")
        with running:
            assert "5 outcomes known" in running.line
            assert answers(ask(running, "slow", parcels))[:5] == first
            assert sorted(running.scored()) == sorted(f"text {n}" for n in range(10))
            assert not (tmp_path / "journal.jsonl.files" / "left").exists()
        assert not (tmp_path / "journal.jsonl.files").exists()
        assert len(journal.read_text().splitlines()) == 10

    def test_a_stop_finishes_what_is_queued(self, tmp_path):
        running = Server(tmp_path, journal=str(tmp_path / "j.jsonl"), max_batch=1)
        running.start()
        parcels = [text(f"k{n}", f"text {n}") for n in range(10)]
        answers(ask(running, "slow", parcels, timeout=0.1))  # the client has its answer, the queue is long
        assert running.stop(signal.SIGTERM) == -signal.SIGTERM
        assert len(running.scored()) == 10
        assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 10

    def test_a_journal_has_one_server_and_one_set_of_scorers(self, tmp_path, cli):
        journal = tmp_path / "j.jsonl"
        with Server(tmp_path, journal=str(journal)) as running:
            ask(running, "files", [text("k", "x")])
            outcome = cli("serve", running.path, f"journal={journal}", "scorers=jpeg")
            assert outcome.code == 2
            assert "another server uses this journal" in outcome.err
        outcome = cli("serve", f"journal={journal}", "scorers=jpeg", "port=0")
        assert outcome.code == 2
        assert "was made with different scorers" in outcome.err
        journal.write_text("{}\n")
        (tmp_path / "j.jsonl.meta.json").write_text(json.dumps({"scorers": {"jpeg": {"name": "jpeg", "params": {}}}}))
        outcome = cli("serve", f"journal={journal}", "scorers=jpeg", "port=0")
        assert "j.jsonl:1: not an outcome" in outcome.err


class TestConfig:
    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["host=0.0.0.0"], "`token_env` must name a variable"),
            (["host=example.org"], "`token_env` must name a variable"),
            (["token_env=NO_SUCH_VARIABLE"], "must hold 16 or more"),
            (["scorers=jpge"], "unknown scorer 'jpge'; did you mean 'jpeg'"),
            (["scorers=jpeg,jpeg"], "two scorers write the label 'jpeg'"),
            (["max_items=10000"], "must fit into max_queued"),
        ],
    )
    def test_refusals(self, cli, words, reason):
        outcome = cli("serve", "--scorers", "jpeg,length", "--port", "0", *words)
        assert outcome.code == 2
        assert reason in outcome.err

    def test_a_dry_run_does_not_listen(self, cli):
        outcome = cli("serve", "--scorers", "jpeg, length", "--dry-run")
        assert (outcome.code, outcome.out) == (0, "would serve jpeg, length on 127.0.0.1 port 8765\n")

    def test_a_taken_port(self, cli):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            outcome = cli("serve", "--scorers", "jpeg", "--port", str(taken.getsockname()[1]))
        assert (outcome.code, "address already in use" in outcome.err) == (2, True)

    def test_health(self, server):
        health = httpx.get(f"{server.url}/health").json()
        assert health["version"] == 1
        assert health["scorers"]["ranks"] == {"accepts": ["text"], "together": True}
        assert health["limits"] == {"items": 100, "bytes": 2_000_000}
        assert health["queued"] == 0
        assert health["counts"]["ok"] > 0


def test_score_through_a_server(server, tmp_path, cli):
    """`diffalign score` with a remote scorer writes the labels of the local one."""
    rows = []
    for n in range(3):
        noise(n).save(tmp_path / f"{n}.png")
        rows.append(Record(id=str(n), prompt="p", candidates=[Candidate(sample=f"{n}.png")]))
    records.write(tmp_path / "records.jsonl", rows)
    words = [f"records={tmp_path}/records.jsonl", f"out={tmp_path}/scored.jsonl"]
    scorer = f"{{name: remote, label: far, params: {{url: '{server.url}', scorer: jpeg}}}}"
    assert cli("score", *words, f"scorers=[{scorer}, {{name: jpeg, label: near}}]").code == 0
    for record in records.read(tmp_path / "scored.jsonl"):
        labels = record.candidates[0].labels
        assert labels["far"] == labels["near"]


def _load(root: Path, tmp_path: Path, *words: str) -> str:
    command = [sys.executable, str(root / "benchmarks/reward_server.py"), "--check", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout


def test_killed_under_load(root, tmp_path):
    assert "| text | 1 | 240 |" in _load(root, tmp_path, "--clients=8", "--items=30", "--kills=1")


@pytest.mark.slow
def test_killed_under_more_load(root, tmp_path):
    assert "| text | 4 | 6,400 |" in _load(root, tmp_path, "--items=100", "--kills=4")
