"""The README's tables are generated: what it lists is what there is."""

import re

import pytest

from diffalign.arena.results import markdown, read
from diffalign.config import ArenaConfig, TrainConfig
from diffalign.config.file import load
from diffalign.doctor import markdown_list


@pytest.mark.parametrize("what", ["methods", "objectives", "shapings", "families", "scorers", "extractors"])
def test_table_is_fresh(root, what):
    text = (root / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {what} -->\n(.*?)<!-- /{what} -->", text, re.DOTALL)
    assert found, f"README.md needs the markers <!-- {what} --> and <!-- /{what} -->"
    assert found[1] == markdown_list(what), f"README.md: update with doctor.markdown_list({what!r})"


def test_the_arenas_table_is_that_of_its_results(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- arena -->\n(.*?)<!-- /arena -->", text, re.DOTALL)
    assert found, "README.md needs the markers <!-- arena --> and <!-- /arena -->"
    assert found[1] == markdown(read(root / "benchmarks/arena/results.json")), "run benchmarks/arena.py"


def test_examples_are_valid(root, tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block, model in zip(blocks, (TrainConfig, ArenaConfig), strict=True):
        (tmp_path / "example.yaml").write_text(block, encoding="utf-8")
        load(model, tmp_path / "example.yaml")


def test_links_lead_somewhere(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / target).exists(), f"README.md links to {target}"
