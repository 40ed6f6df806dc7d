"""The README's tables are generated: what it lists is what there is."""

import re

import pytest

from diffalign.doctor import markdown_list


@pytest.mark.parametrize("what", ["methods", "objectives", "shapings", "families", "scorers", "extractors"])
def test_table_is_fresh(root, what):
    text = (root / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {what} -->\n(.*?)<!-- /{what} -->", text, re.DOTALL)
    assert found, f"README.md needs the markers <!-- {what} --> and <!-- /{what} -->"
    assert found[1] == markdown_list(what), f"README.md: update with doctor.markdown_list({what!r})"


def test_links_lead_somewhere(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / target).exists(), f"README.md links to {target}"
