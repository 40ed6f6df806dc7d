"""Reference numbers: one JSON file per method, from ``data/`` or from the folder that ``--golden-dir`` names."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``method`` and ``case`` runs once per case of every file."""
    if "case" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("--golden-dir")
    folder = DATA if given is None else metafunc.config.invocation_params.dir / given
    files = sorted(folder.glob("*.json"))
    if not files:
        raise pytest.UsageError(f"--golden-dir: {folder} holds no .json file")
    rows = []
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema_version", 1) != 1:
            raise pytest.UsageError(f"{path}: schema_version {content['schema_version']}, expected 1")
        for case in content.get("cases") or [{"name": "no-cases"}]:  # which fails
            rows.append(pytest.param(path.stem, case, id=f"{path.stem}-{case['name']}"))
    metafunc.parametrize(("method", "case"), rows)


@pytest.fixture(scope="session")
def golden_data() -> Path:
    """The reference numbers that come with the project."""
    return DATA
