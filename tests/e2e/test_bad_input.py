"""Bad input is one line that says what, where and how to fix it, and exit code 2: no traceback, nothing skipped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

LORA_FILE = "pytorch_lora_weights.safetensors"
CHECKPOINT = "checkpoint-000003"


def rewrite(path: Path, change) -> None:
    """Apply a change to the JSON of every record: ``change(index, record)``. Written as it is, NaN included."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for index, row in enumerate(rows):
        change(index, row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def candidate(index, field, value):
    """Set a field of the second candidate of one record."""

    def change(i, row):
        if i == index:
            row["candidates"][1][field] = value

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "override", "names"),
    [
        ("train", "run.stepz=3", ["train.yaml", "'run.stepz'", "did you mean 'steps'"]),
        ("train", "extra=3", ["train.yaml", "'extra'", "valid: data, method, model, online, optim, run"]),
        ("train", "model.lora.rnk=3", ["'model.lora.rnk'", "'rank'"]),
        ("generate", "sampling.step=3", ["generate.yaml", "'sampling.step'", "'steps'"]),
        ("train", "run.steps=many", ["train.yaml", "run.steps", "integer", "'many'"]),
        ("train", "run.steps=2.5", ["run.steps", "integer", "2.5"]),
        ("train", "optim.lr=-1", ["optim.lr", "greater than 0", "-1"]),
        ("train", "optim.lr=.nan", ["optim.lr", "finite", "nan"]),
        ("train", "optim.lr=[1]", ["optim.lr", "number", "[1]"]),
        ("train", "run.precision=fp8", ["run.precision", "'fp32' or 'bf16'", "'fp8'"]),
        ("train", "run=3", ["run", "dictionary", "3"]),
        ("train", "run.steps=[1", ["'run.steps=[1'", "not valid YAML"]),
        ("score", "scorers=[]", ["score.yaml", "scorers", "at least 1"]),
        ("build", "rule=worst", ["build.yaml", "rule", "'best_worst'"]),
        ("train", "method.name=diffusion-dop", ["'diffusion-dop'", "'diffusion-dpo'"]),
        ("train", "method.objective.bta=3", ["'bta'", "'beta'"]),
        ("train", "method.objective.beta=big", ["objective 'sigmoid'", "beta must be float", "'big'"]),
        ("train", "method.objective.beta=.inf", ["objective 'sigmoid'", "beta must be float", "inf"]),
        ("train", "method.draw.share_t=1", ["draw", "share_t must be bool", "1"]),
        ("train", "model.family=sd4", ["'sd4'", "'sd3'"]),
        ("train", "model.device=tpu", ["model.device", "'tpu'"]),
        ("train", "model.device=meta", ["model.device", "'meta'"]),
        ("train", "model.lora.targets=[nope]", ["model.lora.targets", "nope"]),
        ("train", "model.lora.targets=[norm_out]", ["model.lora.targets", "AdaLayerNorm"]),
        ("train", "model.adapter=runs/x/lora", ["model.adapter", "remove it"]),
        ("train", "optim.name=admw", ["optim.name", "'admw'", "'adamw'"]),
        ("train", "optim.name=lbfgs", ["optim.name", "'lbfgs'"]),
        ("train", "optim.params.beta=3", ["optim.params", "adamw", "'beta'"]),
        ("train", "data.size=[30,30]", ["30x30", "multiples of 8"]),
        ("train", "data.size=[64,64]", ["64x64", "up to 32"]),
        ("generate", "sampling.size=[0,0]", ["0x0", "multiples of 8"]),
        ("generate", "sampling.sampler=dimm", ["sampling.sampler", "'dimm'", "'ddim'"]),
        ("generate", "model.lora={}", ["model.lora", "model.adapter"]),
        ("score", "scorers=[{name: shape}]", ["'shape'", "'shapes'"]),
        ("score", "scorers=[{name: shapes, params: {metrc: x}}]", ["'shapes'", "'metrc'", "metric"]),
    ],
)
def test_wrong_keys_and_values(refused, config, verb, override, names):
    refused(verb, config(verb), override, names=names)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run: [", ["not valid YAML", "line 1"]),
        ("run: {steps: 1, steps: 2}", ["'steps' is given twice"]),
        ("- a", ["expected a mapping", "list"]),
        ("[" * 5000, ["not valid YAML"]),
        ("extends: gone.yaml", ["gone.yaml"]),
    ],
)
def test_broken_config_files(refused, tmp_path, text, names):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    refused("train", path, names=names if "gone" in text else [path, *names])


@pytest.mark.parametrize("verb", ["train", "generate", "score", "build"])
def test_a_config_that_is_not_there(refused, tmp_path, verb):
    refused(verb, tmp_path / "gone.yaml", names=[tmp_path / "gone.yaml"])


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "key"),
    [("train", "data.records"), ("score", "records"), ("build", "records"), ("generate", "prompts.source")],
)
def test_missing_input_files(refused, config, own_pairs, verb, key):
    gone = own_pairs.with_name("gone.jsonl")
    refused(verb, config(verb), f"{key}={gone}", names=[gone])


@pytest.mark.parametrize("gone", ["/nowhere/model", "./nowhere", "no-such-owner/no-such-model", "embedded:shape"])
def test_missing_model(refused, config, gone):
    for verb in ("train", "generate"):
        refused(verb, config(verb), f"model.path={gone}", names=[gone.removeprefix("embedded:").removeprefix("./")])


def test_missing_adapter(refused, config, tmp_path):
    refused("generate", config("generate"), f"model.adapter={tmp_path}", names=[tmp_path, LORA_FILE])


def test_missing_image(refused, config, own_pairs):
    (own_pairs.parent / "media/000003-1.png").unlink()
    refused("train", config("train"), names=["'000003'", "media/000003-1.png", "no such image"])
    refused("score", config("score"), "failures=0", names=["'000003'", "media/000003-1.png", "no such image"])


def test_prompts_that_are_not_text(refused, config, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"caf\xe9\n")
    refused("generate", config("generate"), f"prompts.source={path}", names=[path, "UTF-8"])
    path.write_text("\n\n")
    refused("generate", config("generate"), f"prompts.source={path}", names=[path, "no prompts"])


# --- model folders ------------------------------------------------------------------------------------------------

NET = "transformer/diffusion_pytorch_model.safetensors"


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / NET)
    save_file(dict(list(tensors.items())[1:]), folder / NET)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), ["model_index.json"]),
        (lambda folder: (folder / "model_index.json").write_text("{"), ["model_index.json"]),
        (lambda folder: (folder / "model_index.json").write_text("[]"), ["model_index.json"]),
        (lambda folder: cut(folder / NET), [NET]),
        (lambda folder: cut(folder / "text_encoder/model.safetensors"), ["SafetensorError"]),
        (lambda folder: (folder / NET).unlink(), ["diffusion_pytorch_model.safetensors"]),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), ["tokenizer"]),
        (without_a_tensor, ["transformer"]),
    ],
)
def test_broken_model_folders(refused, config, own_sd3, spoil, names):
    spoil(own_sd3)
    refused("train", config("train"), f"model.path={own_sd3}", names=["model.path", own_sd3, *names])


QUERY = "transformer.transformer_blocks.{}.attn.to_q.lora_"


def lora(width: int = 16, fill: float = 0.0, block: int = 0) -> dict[str, torch.Tensor]:
    name = QUERY.format(block)
    return {f"{name}A.weight": torch.full((2, width), fill), f"{name}B.weight": torch.full((16, 2), fill)}


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"unet.lora_A.weight": torch.zeros(2, 2)}, ["no weights for the transformer"]),
        (lora(width=99), ["99"]),
        (lora(block=77), ["transformer_blocks.77.attn.to_q"]),
        (lora() | lora(block=77), ["only 2 of 4"]),
        (lora(fill=float("nan")), ["record '000000'", "nan", "adapter"]),
    ],
)
def test_adapters_that_do_not_fit(refused, config, tmp_path, state, names):
    save_file(state, tmp_path / LORA_FILE)
    found = [] if "nan" in names else ["model.adapter", tmp_path]
    refused("generate", config("generate"), f"model.adapter={tmp_path}", names=[*found, *names])
    assert not list((tmp_path / "pool").glob("media/*"))


# --- records ------------------------------------------------------------------------------------------------------


def test_truncated_png(refused, config, own_pairs):
    cut(own_pairs.parent / "media/000003-1.png")
    refused("train", config("train"), names=["media/000003-1.png", "truncated"])
    refused("score", config("score"), "failures=0", names=["media/000003-1.png", "truncated"])


def test_an_image_that_is_none(refused, config, own_pairs):
    (own_pairs.parent / "media/000003-1.png").write_text("no image")
    refused("train", config("train"), names=["media/000003-1.png", "not an image"])
    refused("score", config("score"), "failures=0", names=["media/000003-1.png", "not an image"])


def test_one_candidate_where_two_are_needed(refused, config, own_pairs):
    rewrite(own_pairs, lambda i, row: i == 3 and row["candidates"].pop())
    refused("train", config("train"), names=[own_pairs, "'000003'", "1 candidate,", "needs exactly 2", "build"])
    refused("build", config("build"), names=["'000003'", "1 candidates", "at least two"])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_labels_that_are_no_numbers(refused, config, own_pairs, value):
    rewrite(own_pairs, candidate(3, "labels", {"reward": "VALUE"}))
    own_pairs.write_text(own_pairs.read_text().replace('"VALUE"', value))
    shown = {"NaN": "nan", "-Infinity": "-inf"}.get(value, "inf")
    for verb in ("train", "build", "score"):
        where = [f"{own_pairs}:4", "'000003'", "candidates.1", f"labels.reward is {shown}"]
        refused(verb, config(verb), names=where)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (candidate(3, "labels", {}), ["'000003'", "label 'reward'"]),
        (candidate(3, "labels", {"reward": "high"}), [":4", "labels.reward"]),
        (candidate(3, "labels", {"reward": [1.0, 2.0]}), ["'000003'", "'reward' has shape (2,)", "()"]),
        (candidate(3, "lables", {}), [":4", "candidates.1.lables"]),
        (candidate(3, "text", "both"), [":4", "exactly one of 'sample' and 'text'"]),
        (lambda i, row: i == 3 and row.pop("prompt"), [":4", "prompt"]),
        (lambda i, row: i == 3 and row.update(id="000001"), [":4", "'000001' is already on line 2"]),
    ],
)
def test_unsound_records(refused, config, own_pairs, change, names):
    rewrite(own_pairs, change)
    refused("train", config("train"), names=[own_pairs, *names])


@pytest.mark.parametrize(("text", "names"), [("", ["empty"]), ("{}\n", [":1", "id"]), ("nonsense\n", [":1", "JSON"])])
def test_records_files_that_are_none(refused, config, own_pairs, text, names):
    own_pairs.write_text(text)
    for verb in ("train", "score", "build"):
        refused(verb, config(verb), names=[own_pairs, *names])


def test_all_ties(refused, config, own_pairs):
    rewrite(own_pairs, lambda i, row: [c["labels"].update(reward=float(i)) for c in row["candidates"]])
    for verb in ("train", "build"):
        refused(verb, config(verb), names=[own_pairs, "all ties"])
    assert not own_pairs.with_name("built.jsonl").exists()


# --- outputs ------------------------------------------------------------------------------------------------------


def test_a_run_directory_that_is_not_empty(refused, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    refused("train", config("train"), names=["run.dir", tmp_path / "run", "--resume latest"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    refused("train", config("train"), f"--resume={tmp_path}", names=["run.resume", tmp_path, "`latest`"])


def test_images_of_an_older_adapter_are_not_taken_for_new_ones(cli, refused, config, tmp_path):
    save_file(lora(), tmp_path / LORA_FILE)
    words = ("generate", config("generate"), f"model.adapter={tmp_path}")
    assert cli(*words).code == 0
    assert cli(*words).code == 0
    save_file(lora(fill=0.5), tmp_path / LORA_FILE)
    refused(*words, names=[tmp_path / "pool/records.jsonl", "different model", "records.jsonl.meta.json"])


def test_a_failed_start_does_not_claim_the_output(cli, refused, config, tmp_path, own_pairs):
    refused("generate", config("generate"), f"model.adapter={tmp_path}", names=["model.adapter"])
    assert cli("generate", config("generate")).code == 0
    image, kept = own_pairs.parent / "media/000000-0.png", own_pairs.parent / "kept.png"
    image.rename(kept)
    refused("score", config("score"), "failures=0", names=[image])
    kept.rename(image)
    assert cli("score", config("score"), "scorers=[{name: shapes, label: other}]").code == 0


def test_outputs_that_belong_to_something_else(cli, refused, config, tmp_path, own_pairs):
    (tmp_path / "pool/media").mkdir(parents=True)
    (tmp_path / "pool/media/000000-0.png").write_bytes(b"from another run")
    refused("generate", config("generate"), names=[tmp_path / "pool/media", "records.jsonl.meta.json", "delete it"])
    shutil.rmtree(tmp_path / "pool")
    assert cli("generate", config("generate")).code == 0
    refused("generate", config("generate"), "seed=1", names=[tmp_path / "pool/records.jsonl", "different seed"])
    scored = own_pairs.with_name("scored.jsonl")
    assert cli("score", config("score")).code == 0
    changes = "scorers=[{name: shapes, label: graded, params: {metric: strict}}]"
    refused("score", config("score"), changes, names=[scored, "different scorers"])
    elsewhere = tmp_path / "elsewhere.jsonl"
    refused("score", config("score"), f"out={elsewhere}", names=[elsewhere, own_pairs.parent])
    refused("score", config("score"), f"out={own_pairs}", names=[own_pairs, "input itself"])


# --- training -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(cli, refused, config, tmp_path):
    run = tmp_path / "run"
    settings = {"run": {"steps": 3, "save_every": 1}}
    assert cli("train", config("train", settings)).code == 0
    good = {path: path.read_bytes() for name in (CHECKPOINT, "lora") for path in (run / name).iterdir()}

    broken = config("train", {"run": {"steps": 9, "save_every": 1}, "optim": {"lr": 1e30}})
    last = run / CHECKPOINT
    refused("train", broken, "--resume", names=["step 5", "loss nan", "lower optim.lr", f"--resume {last}"])
    for path, content in good.items():
        assert path.read_bytes() == content, f"{path} was touched"

    outcome = cli("train", broken, "--resume", last, "optim.lr=1e-3")
    assert outcome.code == 0, "the advice works"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_a_first_step_that_is_not_finite(refused, config):
    names = ["step 1", "gradient norm", "lower optim.lr", "start again"]
    refused("train", config("train"), "method.objective.beta=1e38", "optim.clip=null", names=names)


@pytest.fixture
def finished(cli, config, tmp_path):
    """A run of two steps and its last checkpoint."""
    path = config("train")
    assert cli("train", path).code == 0
    return path, tmp_path / "run/checkpoint-000002"


def state_with(**changes):
    def spoil(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", weights_only=True)
        torch.save({**state, **changes}, checkpoint / "state.pt")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda checkpoint: cut(checkpoint / "state.pt"), ["not a readable checkpoint"]),
        (lambda checkpoint: cut(checkpoint / "weights.safetensors"), ["not a readable checkpoint"]),
        (lambda checkpoint: (checkpoint / "weights.safetensors").unlink(), ["not a readable checkpoint"]),
        (lambda checkpoint: torch.save([1], checkpoint / "state.pt"), ["not a readable checkpoint"]),
        (state_with(step="two"), ["not a readable checkpoint"]),
        (state_with(optimizer={"state": {}, "param_groups": []}), ["parameter groups"]),
        (state_with(scheduler={}), ["last_epoch"]),
        (state_with(rng=torch.zeros(3)), ["RNG state"]),
        (lambda checkpoint: save_file(lora(), checkpoint / "weights.safetensors"), ["other trained parameters"]),
    ],
)
def test_broken_checkpoints(refused, finished, spoil, names):
    path, checkpoint = finished
    spoil(checkpoint)
    refused("train", path, "--resume", "latest", "run.steps=3", names=[checkpoint, *names])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("run.seed=1", ["run.seed=0", "this run has 1"]),
        ("optim.name=sgd", ["optim.name=AdamW", "SGD"]),
        ("model.lora=null", ["other trained parameters"]),
        ("run.ema=0.9", ["other trained parameters"]),
        ("run.steps=1", ["step 2", "run.steps=1"]),
    ],
)
def test_checkpoints_of_another_run(refused, finished, change, names):
    path, checkpoint = finished
    refused("train", path, "--resume", "latest", change, names=[checkpoint, *names])


def test_a_new_learning_rate_applies_when_resumed(cli, finished):
    path, checkpoint = finished
    assert cli("train", path, "--resume", "latest", "run.steps=4", "optim.lr=1e-5").code == 0
    lines = (checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == [1e-3, 1e-3, 1e-5, 1e-5]


def test_a_broken_cache_is_made_again(cli, finished, own_pairs):
    path, checkpoint = finished
    (cached,) = own_pairs.parent.glob("cache/*.safetensors")
    whole = cached.read_bytes()
    cut(cached)
    again = checkpoint.parent.with_name("again")
    assert cli("train", path, f"run.dir={again}").code == 0
    assert cached.read_bytes() == whole
    weights = f"{checkpoint.name}/weights.safetensors"
    assert (again / weights).read_bytes() == (checkpoint.parent / weights).read_bytes()
