"""The server of `diffalign label`: the flow of answers, and requests that must not get through."""

import asyncio
import json
import socket
from collections import Counter

import httpx
import pytest

from diffalign.label import answers, plan
from diffalign.label.answers import Journal
from diffalign.label.desk import HELD, Desk, Refusal
from diffalign.label.server import BODY, HEADERS, STATIC, Gate, application
from diffalign.records import Candidate, Record

from . import label_kit as kit

HOST = "127.0.0.1:8410"
JSON = {"content-type": "application/json"}


class Client:
    """Requests to an application, as a browser on its own page makes them."""

    def __init__(self, app, host: str = HOST) -> None:
        self.app, self.host = app, host
        self.cookies = httpx.Cookies()

    def request(self, method: str, path: str, **more) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{self.host}") as client:
                client.cookies = self.cookies
                answer = await client.request(method, path, **more)
                self.cookies = client.cookies
                return answer

        return asyncio.run(send())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.request("GET", path, headers=headers)

    def raw(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        own = {"origin": f"http://{self.host}", **JSON, **headers}
        return self.request("POST", path, content=content, headers=own)

    def post(self, path: str, **body) -> httpx.Response:
        return self.raw(path, json.dumps(body).encode())


@pytest.fixture
def serve(tmp_path):
    """``serve(source, task, ...)`` -> a client; the file of answers is ``answers.jsonl``."""
    opened = []

    def start(source, task="pair", names=(), overlap=None, token=None, local=True):
        job = plan.make(source, task, seed=0, pairs=3, limit=None, segment_seconds=1.0)
        journal = Journal(tmp_path / "answers.jsonl").__enter__()
        opened.append(journal)
        gate = Gate("127.0.0.1" if local else "0.0.0.0", 8410, token, local)
        return Client(application(job, journal, gate, list(names), overlap))

    yield start
    for journal in opened:
        journal.__exit__()


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]


class TestFlow:
    def test_answers_until_done(self, serve, tmp_path):
        client = serve(kit.texts(tmp_path))
        assert client.get("/api/job").json() == {"task": "pair", "names": [], "fixed": False, "longest_name": 40}
        state = client.post("/api/next", annotator="ann").json()
        assert (state["done"], state["total"]) == (0, 5)
        seen = []
        while state["item"]:
            item = state["item"]
            seen.append((item["id"], item["shown"][1]["text"]))
            state = client.post("/api/answer", annotator="ann", item=item["id"], answer=1, seconds=1.26).json()
        assert (state["done"], state["total"]) == (5, 5)
        kept = lines(tmp_path)
        assert [row["item"] for row in kept] == [item for item, _ in seen]
        for row, (_, text) in zip(kept, seen, strict=True):
            assert text == f"answer {row['record'][1:]}-{row['answer']}", "the file names what was on the right"
            assert row["shown"][1] == row["answer"]
            assert row["seconds"] == 1.3
        assert {tuple(row["shown"]) for row in kept} & {(1, 0), (2, 0), (2, 1)}, "sides are shuffled"

    def test_a_reload_shows_the_same_item(self, serve, tmp_path):
        client = serve(kit.texts(tmp_path))
        assert client.post("/api/next", annotator="ann").json() == client.post("/api/next", annotator="ann").json()

    def test_twice_is_once(self, serve, tmp_path):
        client = serve(kit.texts(tmp_path))
        item = client.post("/api/next", annotator="ann").json()["item"]["id"]
        replies = [client.post("/api/answer", annotator="ann", item=item, answer=0) for _ in range(2)]
        assert replies[0].json() == replies[1].json()
        other = client.post("/api/answer", annotator="ann", item=item, answer=1)
        assert (other.status_code, len(lines(tmp_path))) == (409, 1)
        assert "undo" in other.text

    def test_undo_shows_what_was_answered(self, serve, tmp_path):
        client = serve(kit.texts(tmp_path, (4, 4)), "rank")
        first = client.post("/api/next", annotator="ann").json()["item"]["id"]
        order = [[3], [0, 2], [1]]
        client.post("/api/answer", annotator="ann", item=first, answer=order)
        back = client.post("/api/undo", annotator="ann").json()
        assert (back["item"]["id"], back["done"]) == (first, 0)
        shown = lines(tmp_path)[0]["shown"]
        assert [sorted(group) for group in back["item"]["previous"]] == order
        assert lines(tmp_path)[0]["answer"] == [sorted(shown[i] for i in group) for group in order]
        assert lines(tmp_path)[1]["retracted"] is True
        assert client.post("/api/undo", annotator="ann").status_code == 404
        client.post("/api/answer", annotator="ann", item=first, answer="skip")
        assert answers.read(tmp_path / "answers.jsonl").of("ann", first).answer == "skip"

    def test_named_annotators_only(self, serve, tmp_path):
        client = serve(kit.texts(tmp_path), names=["ann", "bob"])
        assert client.get("/api/job").json()["names"] == ["ann", "bob"]
        assert client.post("/api/next", annotator="eve").status_code == 403
        assert client.post("/api/next", annotator=" ann ").json()["total"] == 5

    def test_agreement(self, serve, tmp_path):
        client = serve(kit.texts(tmp_path, (2, 2)))
        for name in ("ann", "bob"):
            for item in ("r0#0-1", "r1#0-1"):
                side = plan.make(tmp_path / "records.jsonl", "pair", seed=0, pairs=3, limit=None, segment_seconds=1.0)
                shown = side.shown(name, side.items[item])
                wanted = shown.index(1 if item == "r0#0-1" and name == "bob" else 0)
                client.post("/api/answer", annotator=name, item=item, answer=wanted)
        found = client.get("/api/agreement").json()
        assert (found["share"], found["pairs"], found["disputes"]) == (0.5, 2, 1)
        assert found["alpha"] == pytest.approx(0.0)
        assert found["disputed"][0]["given"] == [{"annotator": "ann", "answer": 0}, {"annotator": "bob", "answer": 1}]
        assert [row["annotator"] for row in found["annotators"]] == ["ann", "bob"]

    def test_pictures_and_ranges(self, serve, tmp_path):
        client = serve(kit.pictures(tmp_path, n=1))
        item = client.post("/api/next", annotator="ann").json()["item"]
        assert "model" not in json.dumps(item), "file names would tell who made what"
        url = item["shown"][0]["url"]
        whole = client.get(url)
        assert (whole.headers["content-type"], whole.content[:4]) == ("image/png", b"\x89PNG")
        part = client.get(url, range="bytes=4-9")
        assert (part.status_code, part.content) == (206, whole.content[4:10])

    def test_a_full_disk_is_said(self, serve, tmp_path, monkeypatch):
        client = serve(kit.texts(tmp_path))
        item = client.post("/api/next", annotator="ann").json()["item"]["id"]

        def full(self, text):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Journal, "_append", full)
        refused = client.post("/api/answer", annotator="ann", item=item, answer=0)
        assert (refused.status_code, refused.text) == (507, "the answer is not saved: No space left on device\n")


class TestDesk:
    @pytest.fixture
    def desk(self, tmp_path):
        job = plan.make(kit.texts(tmp_path, [2] * 12), "pair", seed=0, pairs=1, limit=None, segment_seconds=1.0)
        self.time = 0.0
        with Journal(tmp_path / "answers.jsonl") as journal:
            yield Desk(job, journal, [], 2, lambda: self.time)

    def test_overlap_is_how_many_see_an_item(self, desk):
        open_ = {name: desk.following(name) for name in "abcde"}
        while any(state["item"] for state in open_.values()):
            for name, state in open_.items():
                if state["item"]:
                    open_[name] = desk.answer(name, state["item"]["id"], 0, None)
                else:
                    open_[name] = desk.following(name)
        given = Counter(item for item, of in desk.journal.answers.by_item.items() for _ in of)
        assert set(given.values()) == {2}
        assert len(given) == 12

    def test_a_skip_leaves_the_place_to_others(self, desk):
        for item in desk.plan.items:
            desk.answer("a", item, "skip", None)
            desk.answer("b", item, 0, None)
        assert desk.following("c")["total"] == 12
        assert desk.following("a")["item"] is None

    def test_an_item_is_held_for_a_while(self, desk):
        desk.overlap = 1
        held = desk.following("a")["item"]["id"]
        assert desk.following("b")["total"] == 11
        self.time = HELD + 1
        assert desk.following("c")["total"] == 12
        assert held in desk._split("c")[1]

    @pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\nb", "a\x00", "\u202eann"])
    def test_names_that_are_none(self, desk, name):
        with pytest.raises(Refusal, match="expected a name"):
            desk.following(name)


class TestAttacks:
    @pytest.fixture
    def client(self, serve, tmp_path):
        (tmp_path / "secret.txt").write_text("secret")
        (tmp_path / "data").mkdir()
        self.client = serve(kit.pictures(tmp_path / "data"))
        return self.client

    @pytest.mark.parametrize(
        "path",
        [
            "/media/../secret.txt",
            "/media/..%2f..%2fsecret.txt",
            "/media/%2e%2e/secret.txt",
            "/media/model-0-0.png",
            "/media/",
            "/media",
            "/static/",
            "/static/../server.py",
            "/static/..%2fserver.py",
            "/static/%00",
            "/media//etc/passwd",
            "/records.jsonl",
            "/docs",
            "/openapi.json",
        ],
    )
    def test_only_what_records_name_is_served(self, client, path):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "secret" not in answer.text

    def test_other_hosts_are_refused(self, client):
        for host in ("evil.example", "evil.example:8410", "127.0.0.1:9", "", "127.0.0.1"):
            assert client.get("/api/job", host=host).status_code == 403
        for host in ("localhost:8410", "[::1]:8410", HOST):
            assert client.get("/api/job", host=host).status_code == 200

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"origin": "http://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": ""}, 403),
            ({"origin": "http://127.0.0.1:9"}, 403),
            ({"origin": f"http://{HOST}.evil.example"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"content-type": "application/x-www-form-urlencoded"}, 415),
            ({"content-type": "application/json; charset=utf-8"}, 200),
        ],
    )
    def test_posts_of_other_sites_are_refused(self, client, headers, status):
        assert client.raw("/api/next", b'{"annotator": "ann"}', **headers).status_code == status

    def test_posts_without_an_origin_are_refused(self, client):
        answer = client.request("POST", "/api/next", content=b'{"annotator": "ann"}', headers=JSON)
        assert answer.status_code == 403

    def test_other_methods_are_refused(self, client):
        for method in ("PUT", "DELETE", "OPTIONS", "TRACE"):
            assert client.request(method, "/api/next").status_code == 405
        assert client.get("/api/next").status_code == 405

    @pytest.mark.parametrize(
        ("content", "status"),
        [
            (b"", 400),
            (b"{", 400),
            (b"\xff\xfe", 400),
            (b"[]", 400),
            (b"[" * 60_000, 400),
            (b'{"annotator": 3}', 400),
            (b'{"annotator": "ann"}', 400),
            (b'{"annotator": "ann", "item": "r0#0-1", "answer": 0, "more": 1}', 400),
            (b'{"annotator": "ann", "item": "r0#0-1", "answer": 5}', 400),
            (b'{"annotator": "ann", "item": "r0#0-1", "answer": NaN}', 400),
            (b'{"annotator": "ann", "item": "r0#0-1", "answer": {"a": 1}}', 400),
            (b'{"annotator": "ann", "item": "r0#0-1", "answer": 0, "seconds": -1}', 400),
            (b'{"annotator": "ann", "item": "r0#0-1", "answer": 0, "seconds": 1e999}', 400),
            (b'{"annotator": "\\ud800", "item": "r0#0-1", "answer": 0}', 400),
            (b'{"annotator": "ann", "item": "gone", "answer": 0}', 404),
            (b'{"annotator": "ann", "item": "%s", "answer": 0}' % (b"x" * 50_000), 404),
            (b'"%s"' % (b"x" * BODY), 413),
        ],
    )
    def test_bad_bodies_get_one_line(self, client, tmp_path, content, status):
        answer = client.raw("/api/answer", content)
        assert answer.status_code == status
        assert answer.text.count("\n") == 1
        assert len(answer.text) < 500
        assert not (tmp_path / "answers.jsonl").read_bytes()

    def test_an_oversized_body_is_not_read_to_its_end(self, client):
        pulled = 0

        async def endless():
            nonlocal pulled
            for _ in range(1000):
                pulled += 1
                yield b" " * 16_384

        answer = client.request("POST", "/api/answer", content=endless(), headers={"origin": f"http://{HOST}", **JSON})
        assert answer.status_code == 413
        assert pulled < 10

    def test_headers(self, client):
        for path in ("/", "/static/label.js", "/api/job", "/gone"):
            headers = client.get(path).headers
            assert {name: headers.get(name) for name in HEADERS} == HEADERS
        assert "unsafe" not in HEADERS["content-security-policy"]

    def test_nothing_on_the_page_is_inline(self, client):
        page = client.get("/").text
        assert "<style" not in page
        assert "style=" not in page
        assert page.count("<script") == page.count('<script type="module" src="/static/label.js"></script>') == 1
        for name in STATIC:
            code = client.get(f"/static/{name}").text
            for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
                assert sink not in code

    def test_html_is_data(self, serve, tmp_path):
        rows = [Record(id=kit.HOSTILE, prompt=kit.HOSTILE, candidates=[Candidate(text=kit.HOSTILE)] * 2)]
        client = serve(kit.stored(tmp_path, rows))
        answer = client.post("/api/next", annotator="<b>ann</b>")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["item"]["prompt"] == kit.HOSTILE


class TestToken:
    TOKEN = "correct horse"

    @pytest.fixture
    def client(self, serve, tmp_path):
        return serve(kit.pictures(tmp_path), token=self.TOKEN, local=False)

    def test_without_it_there_is_nothing(self, client):
        for path in ("/", "/api/job", "/static/label.js", "/media/x", "/?token=", "/?token=wrong", "/api/job?token=x"):
            assert client.get(path).status_code == 401
        assert client.post("/api/next", annotator="ann").status_code == 401
        assert client.get("/api/job", cookie="diffalign_label_8410=correct horse").status_code == 401

    def test_the_url_gives_a_cookie(self, client):
        answer = client.get("/?token=correct+horse")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert self.TOKEN not in cookie
        assert client.get("/").status_code == 200
        assert client.post("/api/next", annotator="ann").status_code == 200

    def test_the_printed_url(self):
        assert Gate("192.0.2.1", 80, "a b&c", False).url() == "http://192.0.2.1:80/?token=a+b%26c"
        assert Gate("0.0.0.0", 80, "t", False).url() == f"http://{socket.gethostname()}:80/?token=t"
        assert Gate("::1", 80, None, True).url() == "http://[::1]:80/"
