"""Help, versions and config errors come back at once, in a fresh interpreter, without torch or diffusers."""

import resource
import subprocess
import sys

import pytest

PROBE = """
import sys
from diffalign.cli import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules))
assert not heavy, f"imported {heavy}"
sys.exit(code)
"""
LIMIT = 1.0  # seconds; the target on an idle machine is 0.4


def probe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["quickstart", "--help"], 0),
        (["list", "--help"], 0),
        (["trian"], 2),
        (["train"], 2),
        (["train", "gone.yaml"], 2),
        (["quickstart", "model.pth=x"], 2),
        (["list", "nothing"], 2),
    ],
)
def test_answers_without_torch(words, code):
    done = probe(*words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_package_imports_no_library():
    code = "import sys; before = set(sys.modules); import diffalign; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names == {"diffalign"}


def test_importing_the_scorers_imports_no_library():
    code = """
import importlib, sys
from diffalign import scoring
for target in scoring._targets().values():
    importlib.import_module(target.partition(":")[0])
heavy = {"torch", "torchvision", "open_clip", "timm", "transformers", "diffusers"} & set(sys.modules)
assert not heavy, f"imported {sorted(heavy)}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_help_is_fast():
    """Processor time rather than the clock: what else the machine does must not decide."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "diffalign", "--help"], capture_output=True, check=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < LIMIT
