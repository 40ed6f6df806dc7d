"""The page of `diffalign label` in Chromium, and a server that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from diffalign import records
from diffalign.records import Candidate, Record

from ..unit import label_kit as kit

SIZES = {"wide": (1280, 800), "phone": (390, 844)}


@contextmanager
def server(source, task, *words):
    """The verb in a process of its own: (process, URL)."""
    command = [sys.executable, "-m", "diffalign", "label", f"records={source}", f"task={task}", "port=0"]
    out = f"out={source.parent / 'answers.jsonl'}"
    process = subprocess.Popen([*command, out, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().removeprefix("open: ").strip()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert not errors


def answers(source) -> list[dict]:
    return [json.loads(line) for line in (source.parent / "answers.jsonl").read_text().splitlines()]


def post(url: str, path: str, **body) -> httpx.Response:
    return httpx.post(f"{url}api/{path}", json=body, headers={"origin": url.rstrip("/")}, trust_env=False)


class TestKilled:
    def test_nothing_that_was_answered_is_lost(self, tmp_path):
        source = kit.texts(tmp_path, [2] * 40)
        given = {}
        for round_ in range(3):
            with server(source, "pair") as (process, url):
                state = post(url, "next", annotator="ann").json()
                assert state["done"] == len(given)
                for _ in range(7):
                    item = state["item"]["id"]
                    state = post(url, "answer", annotator="ann", item=item, answer=round_ % 2).json()
                    given[item] = state["done"]
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                process.stderr.close()
                process.stderr = open(os.devnull)  # noqa: SIM115
            with (tmp_path / "answers.jsonl").open("ab") as handle:
                handle.write(b'{"annotator": "ann", "item": "r')  # and in the middle of a line
        with server(source, "pair") as (_, url):
            assert post(url, "next", annotator="ann").json()["done"] == len(given) == 21
        assert [row["item"] for row in answers(source)] == list(given)

    def test_a_second_server_and_a_taken_port_are_refused(self, tmp_path, cli):
        source = kit.texts(tmp_path)
        with server(source, "pair") as (_, url):
            words = [f"records={source}", "task=pair", f"port={url.rstrip('/').rpartition(':')[2]}"]
            taken = cli("label", *words, f"out={tmp_path / 'other.jsonl'}")
            assert (taken.code, "choose another `port`" in taken.err) == (2, True)
            second = cli("label", *words, f"out={tmp_path / 'answers.jsonl'}")
            assert (second.code, "another `diffalign label` has it open" in second.err) == (2, True)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """``visit(url, name)`` -> a page after the name was typed; anything else in its console than a conflict fails."""
    contexts, said = [], []

    def open_page(url, name="Ada", size="wide", scheme="light"):
        width, height = SIZES[size]
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector(".card")
        page.wait_for_timeout(500)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [text for text in said if "409 (Conflict)" not in text]


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_timeout(600)


@pytest.mark.slow
class TestPage:
    def test_pairs(self, tmp_path, visit):
        source = kit.pictures(tmp_path, n=4)
        with server(source, "pair") as (_, url):
            page = visit(url)
            for key in ("1", "2", "0", "s"):
                press(page, key)
            assert page.inner_text("#finished h1") == "All done"
            press(page, "u")
            press(page, "u")
            press(page, "ArrowLeft", "Enter")
            press(page, "2")
            assert page.inner_text("#count") == "4 of 4"
        kept = answers(source)
        assert [row.get("answer") for row in kept[:4]] == [kept[0]["shown"][0], kept[1]["shown"][1], "tie", "skip"]
        assert [row.get("retracted") for row in kept[4:6]] == [True, True]
        assert kept[4]["item"] == kept[3]["item"]
        assert [row["answer"] for row in kept[6:]] == [kept[6]["shown"][0], kept[7]["shown"][1]]

    def test_double_presses_and_held_keys_answer_once(self, tmp_path, visit):
        source = kit.texts(tmp_path, [2] * 5)
        with server(source, "pair") as (_, url):
            page = visit(url)
            press(page, "1", "1", "2")
            for _ in range(5):
                page.keyboard.down("1")  # repeats
            press(page)
        assert len(answers(source)) == 2

    def test_a_click_and_two_tabs(self, tmp_path, visit):
        source = kit.pictures(tmp_path, n=2)
        with server(source, "pair") as (_, url):
            one, two = visit(url), visit(url)
            one.click(".card >> nth=0")
            one.wait_for_timeout(600)
            press(two, "2")
            assert "answered already" in two.inner_text("#note")
            assert two.inner_text("#count") == "1 of 2"
        assert len(answers(source)) == 1

    def test_best(self, tmp_path, visit):
        source = kit.pictures(tmp_path, n=3, k=5)
        with server(source, "best") as (_, url):
            page = visit(url)
            press(page, "5")
            press(page, "ArrowRight", "ArrowRight", "ArrowRight", "Enter")
            press(page, "0")
        kept = answers(source)
        assert [row["answer"] for row in kept] == [kept[0]["shown"][4], kept[1]["shown"][2], "tie"]

    def test_rank(self, tmp_path, visit):
        source = kit.pictures(tmp_path, n=3, k=4)
        with server(source, "rank") as (_, url):
            page = visit(url)
            press(page, "3", "ArrowLeft", "ArrowLeft", "4", "=", "Enter")
            press(page, "ArrowRight", "Enter")
            page.drag_and_drop(".card >> nth=3", ".card >> nth=0")
            press(page, "Enter")
        kept = answers(source)
        expected = [[[2], [0], [1, 3]], [[1], [0], [2], [3]], [[3], [0], [1], [2]]]
        for row, places in zip(kept, expected, strict=True):
            assert row["answer"] == [sorted(row["shown"][place] for place in group) for group in places]

    def test_segments(self, tmp_path, visit):
        source = kit.clips(tmp_path, n=2, seconds=4)
        with server(source, "segments") as (_, url):
            page = visit(url)
            press(page, "1", "2", "0")
            page.wait_for_timeout(1500)
            times = page.evaluate("[...document.querySelectorAll('video')].map((clip) => clip.currentTime)")
            assert all(2.9 <= time <= 4.1 for time in times), "the fourth segment loops"
            assert abs(times[0] - times[1]) < 0.15, "both clips are at the same place"
            press(page, "Enter")
            assert page.inner_text("#count") == "0 of 2", "a segment is open"
            press(page, "1", "Enter")
            press(page, "u")
            assert (
                page.eval_on_selector_all(".cell", "(cells) => cells.map((cell) => cell.textContent).join('')")
                == "12=1"
            )
            press(page, "ArrowRight", "2", "Enter")
            press(page, "w", " ", "s")
        kept = answers(source)
        first, second = kept[0]["shown"]
        assert kept[0]["answer"] == [first, second, "tie", first]
        assert kept[2]["answer"] == [first, second, "tie", first]
        assert kept[3]["answer"] == "skip"

    @pytest.mark.parametrize("task", ["pair", "best", "rank"])
    def test_html_in_data_stays_text(self, tmp_path, visit, task):
        made = [Candidate(text=kit.HOSTILE), Candidate(text=kit.talk())]
        source = kit.stored(tmp_path, [Record(id=kit.HOSTILE, prompt=kit.HOSTILE, candidates=made)])
        with server(source, task) as (_, url):
            page = visit(url, "<img src=x>")
            assert page.inner_text(".prompt") == kit.HOSTILE
            assert kit.HOSTILE in page.inner_text("#stage")
            press(page, "Enter" if task == "rank" else "1")
            page.goto(f"{url}#agreement")
            page.wait_for_selector("#agreement table")
            assert "<img src=x>" in page.inner_text("#agreement")
            assert page.title() == "diffalign label"
            assert page.locator("main img").count() == 0

    def test_two_annotators_and_their_agreement(self, tmp_path, visit):
        source = kit.texts(tmp_path, (2, 2))
        with server(source, "pair") as (_, url):
            for name in ("Ada", "Bob"):
                page = visit(url, name)
                for _ in range(2):
                    shown = page.eval_on_selector_all(".reading", "(all) => all.map((one) => one.textContent)")
                    wanted = "0-1" if name == "Bob" and shown[0].startswith("answer 0") else "-0"
                    press(page, str(1 + shown.index(next(text for text in shown if text.endswith(wanted)))))
            page.click("#to-agreement")
            page.wait_for_selector(".dispute")
            assert page.locator(".tiles b").all_inner_texts() == ["0.00", "50 %", "1", "2 of 2"]
            assert page.locator(".dispute table td").all_inner_texts() == ["Ada", "1", "Bob", "2"]

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_nothing_is_wider_than_the_screen(self, tmp_path, visit, size, scheme):
        word = "W" * 300
        source = kit.stored(tmp_path, [Record(id="r", prompt=word, candidates=[Candidate(text=word)] * 4)])
        for task in ("best", "rank", "pair"):
            with server(source, task) as (_, url):
                page = visit(url, size=size, scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
            for path in tmp_path.glob("answers*"):
                path.unlink()

    def test_merged_labels_follow_what_was_seen(self, tmp_path, visit, cli):
        source = kit.texts(tmp_path, (2,) * 6)
        with server(source, "pair") as (_, url):
            page = visit(url)
            for _ in range(6):
                shown = page.eval_on_selector_all(".reading", "(all) => all.map((one) => one.textContent)")
                press(page, "1" if shown[0].endswith("-1") else "2")
        words = [f"records={source}", f"out={tmp_path / 'answers.jsonl'}", "task=pair"]
        assert cli("label", *words, f"merge={tmp_path / 'labelled.jsonl'}").code == 0
        for record in records.read(tmp_path / "labelled.jsonl"):
            assert [c.labels["human"] for c in record.candidates] == [0.0, 1.0]
