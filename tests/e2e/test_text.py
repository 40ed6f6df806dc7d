"""The text path end to end: the same verbs, loop and objectives on the embedded language model."""

import json

import pytest
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.records import Candidate, Message, Record, read, write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("text") / "run"
    words = ["quickstart", "text/quickstart_short", f"dir={root}"]
    assert main(words) == 0
    return root, words


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_leaves_its_output(finished):
    root, _ = finished
    assert (root / "train/lora/adapter_model.safetensors").is_file()
    for name in ("sampled", "greedy"):
        results = json.loads((root / "eval" / name / "results.json").read_text())
        assert results["n"] == 48
        assert set(results["tasks"]) == {"add", "subtract", "maximum", "sort", "reverse", "close"}
        assert results["sampling"]["temperature"] == (1.0 if name == "sampled" else 0.0)
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "close ([" in page or "close {" in page
    assert 'class="text"' in page


def test_alignment_never_sees_a_held_out_prompt(finished):
    from diffalign.worlds.puzzles.prompts import is_held_out

    root, _ = finished
    assert not any(is_held_out(record.prompt) for record in read(root / "pool/train.jsonl"))
    assert all(is_held_out(record.prompt) for record in read(root / "eval/sampled/policy/scored.jsonl"))


def test_training_starts_at_ln_2_and_logs_both_likelihoods(finished):
    rows = metrics(finished[0] / "train")
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[0]["reward/accuracy"] == 0.5
    assert {"logp/chosen", "logp/rejected", "drift/chosen", "reward/margin"} <= rows[0].keys()
    assert rows[-1]["loss"] < 0.69


def test_a_finished_job_is_not_redone(finished):
    root, words = finished
    kept = ["pool/records.jsonl", "train/metrics.jsonl", "eval/greedy/policy/records.jsonl"]
    before = {name: (root / name).read_bytes() for name in kept}
    assert main(words) == 0
    assert before == {name: (root / name).read_bytes() for name in kept}


def test_a_pool_that_was_cut_short_continues_with_the_same_texts(finished, tmp_path):
    source = finished[0] / "pool"
    words = ["generate", "text/generate", f"out={tmp_path / 'pool'}", "prompts.per_task=10", "candidates=8"]
    assert main(words) == 0
    made = (tmp_path / "pool/records.jsonl").read_bytes()
    assert [r.candidates for r in read(tmp_path / "pool/records.jsonl")] == [
        r.candidates for r in read(source / "records.jsonl")
    ]
    lines = made.splitlines(keepends=True)
    (tmp_path / "pool/records.jsonl").write_bytes(b"".join(lines[:23]) + lines[23][:40])
    assert main(words) == 0
    assert (tmp_path / "pool/records.jsonl").read_bytes() == made


@pytest.fixture
def train(finished, tmp_path):
    """Runs `train` on the quickstart's pairs, or other records; returns the exit code and the folder."""

    def run(name: str, *words: str, records=None) -> tuple[int, object]:
        source = finished[0] / "pool/train.jsonl"
        if records is not None:
            source = tmp_path / f"{name}.jsonl"
            write(source, records)
        base = ["run.steps=4", "run.batch=8", "run.accumulate=1", "run.precision=fp32", "run.save_every=2"]
        words = (*base, "model.path=embedded:puzzles", "optim.lr=1e-3", "data.max_tokens=null", *words)
        code = main(["train", "text/dpo", f"run.dir={tmp_path / name}", f"data.records={source}", *words])
        return code, tmp_path / name

    return run


@pytest.mark.parametrize("words", [(), ("model.lora=null", "run.ema=0.9")])
def test_resuming_ends_where_an_undisturbed_run_does(train, words):
    code, whole = train("whole", *words)
    assert code == 0
    train("cut", *words, "run.steps=2")
    code, cut = train("cut", *words, "--resume", "latest")
    assert code == 0
    final = "model" if words else "lora"
    file = "model.safetensors" if words else "adapter_model.safetensors"
    ours, theirs = (load_file(folder / final / file) for folder in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def rows(n: int = 8, labels=None) -> list[Record]:
    texts = ["2", "3", "45", "6"]
    return [
        Record(
            id=str(i),
            prompt=f"{i}+1",
            candidates=[Candidate(text=text, labels=labels(i, k)) for k, text in enumerate(texts)],
        )
        for i in range(n)
    ]


def cut_to(k: int, records: list[Record]) -> list[Record]:
    return [record.model_copy(update={"candidates": record.candidates[:k]}) for record in records]


def ranked(i: int, k: int) -> dict[str, float]:
    return {"reward": float(-k), "desirable": float(k % 2), "score": float(-k)}


METHODS = {
    "ipo": (2, {"name": "ipo"}, {}),
    "simpo": (2, {"name": "simpo"}, {}),
    "orpo": (2, {"name": "orpo"}, {}),
    "madpo": (2, {"name": "madpo"}, {}),
    "ranked": (4, {"name": "plackett_luce", "beta": 0.1}, {}),
    "dcg": (4, {"name": "dcg", "beta": 0.1}, {}),
    "unpaired": (1, {"name": "ddo", "alpha": 1.0, "beta": 0.1}, {}),
    "shaped": (2, {}, {"shaping": [{"name": "length_desensitised", "alpha": 0.3}]}),
    "suffix": (2, {}, {"shaping": [{"name": "first_difference"}]}),
    "divergence": (2, {}, {"shaping": [{"name": "f_divergence", "divergence": "forward_kl"}]}),
    "regularised": (2, {}, {"extra": [{"name": "sft", "weight": 0.1}]}),
    "packed": (2, {}, {"estimate": {"packed": True}}),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_objectives_and_data_train_by_name(train, name):
    k, objective, more = METHODS[name]
    records = cut_to(k, rows(labels=ranked))
    words = [f"method.objective={json.dumps(objective)}", *(f"method.{key}={json.dumps(v)}" for key, v in more.items())]
    code, folder = train(name, *words, records=records)
    assert code == 0
    found = metrics(folder)
    assert len(found) == 4
    assert found[0]["grad_live"] > 0
    assert found[-1]["loss"] != found[0]["loss"]


def test_kto_trains_against_mismatched_completions(train):
    records = cut_to(1, rows(labels=lambda i, k: {"desirable": float(i % 2)}))
    code, folder = train("kto", "method.name=text-kto", "method.objective={}", records=records)
    assert code == 0
    assert metrics(folder)[0]["loss"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("granularity", ["token", "step", "response"])
def test_a_value_head_trains_with_the_policy(train, granularity):
    records = cut_to(1, rows(labels=lambda i, k: {"reward": float(i % 2)}))
    objective = json.dumps({"granularity": granularity})
    code, folder = train(granularity, "method.name=text-oreo", f"method.objective={objective}", records=records)
    assert code == 0
    assert metrics(folder)[-1]["loss"] < metrics(folder)[0]["loss"]
    exported = load_file(folder / "lora" / "adapter_model.safetensors")
    assert not [name for name in exported if "value_head" in name]


def test_a_guide_plays_its_role(train):
    code, first = train("first")
    assert code == 0
    shaping = json.dumps([{"name": "token_guided", "beta": 0.1}])
    code, folder = train("guided", f"model.others.guide={first / 'lora'}", f"method.shaping={shaping}")
    assert code == 0
    assert metrics(folder)[0]["grad_live"] > 0


def test_conversations_train_on_the_assistant_s_turns(train):
    def answer(*turns: tuple[str, str]) -> list[Message]:
        return [Message(role=role, content=content) for role, content in turns]

    good = answer(("assistant", "2"), ("tool", "right"), ("assistant", "so 2"))
    bad = answer(("assistant", "3"), ("user", "no"), ("assistant", "4"))
    pair = [Candidate(text=good, labels={"reward": 1.0}), Candidate(text=bad, labels={"reward": 0.0})]
    prompt = answer(("system", "be brief"), ("user", "1+1"))
    records = [Record(id=str(i), prompt=prompt, candidates=pair) for i in range(8)]
    code, folder = train("turns", records=records)
    assert code == 0
    assert metrics(folder)[-1]["reward/accuracy"] == 1.0


REFUSED = {
    "a diffusion method": (["method.name=diffusion-dpo", "method.objective={}"], "causal_lm is a text model"),
    "a text method on a diffusion model": (["model.family=sd3"], "sd3 is a diffusion model"),
    "an objective for diffusion": (["method.objective={name: mapo}"], "objective 'mapo' is not for text models"),
    "a listwise score on pairs": (["method.objective={name: tpo}"], "needs exactly 3"),
    "rankings from pairs": (
        ["method.objective={name: plackett_luce, beta: 1}"],
        "learns from rankings, and every record",
    ),
    "a missing label": (["method.objective={name: madpo}"], "without the label 'score'"),
    "a value network": (["method.objective={name: oreo}"], "objective 'oreo' reads 'values'"),
    "a role nobody plays": (["method.objective={name: inpo}"], "give a folder as model.others.prev"),
    "a shaping of pairs on a list": (
        [
            "method.objective={name: plackett_luce, beta: 1}",
            "method.shaping=[{name: f_divergence, divergence: forward_kl}]",
        ],
        "is for objectives over pairs",
    ),
    "an unknown shaping": (["method.shaping=[{name: f_divergences}]"], "did you mean 'f_divergence'"),
    "an extra without name": (["method.extra=[{weight: 1}]"], "every entry needs a name"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_go_together_is_one_line(train, capsys, why):
    words, message = REFUSED[why]
    code, folder = train("refused", *words)
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_a_method_of_trajectories_is_refused_before_the_model_loads(train, capsys):
    records = cut_to(2, rows(labels=lambda i, k: {"reward": float(-k), "advantage": 1.0}))
    words = ["method.name=flow-grpo", "method.objective={}", "model.family=sd3", "model.path=./nowhere"]
    assert train("paths", *words, records=records)[0] == 2
    assert "flow-grpo learns from sampling trajectories" in capsys.readouterr().err


def test_what_is_cut_is_said(train, capsys):
    assert train("cut", "data.max_tokens=6", records=cut_to(2, rows(labels=ranked)))[0] == 0
    assert "candidates were cut to data.max_tokens" in capsys.readouterr().out


def test_sampling_of_the_wrong_kind_is_refused(tmp_path, capsys):
    assert main(["generate", "text/generate", f"out={tmp_path / 'x'}", "sampling.steps=3"]) == 2
    assert "remove `sampling`" in capsys.readouterr().err
    assert main(["generate", "shapes/generate", f"out={tmp_path / 'x'}", "decoding.temperature=0"]) == 2
    assert "remove `decoding`" in capsys.readouterr().err
