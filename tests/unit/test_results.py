"""Results in words: no claim beyond the interval."""

import pytest

from diffalign.results import Results, headline, markdown_table, number, table

from . import report_folder as folder


def sentence(**changes) -> str:
    return headline(Results.model_validate(folder.results(**changes)))


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (0.5, 2, False, ".50"),
        (1.0, 2, False, "1.00"),
        (-0.021, 2, False, "−.02"),
        (0.114, 2, True, "+.11"),
        (-0.001, 2, True, ".00"),
        (21.456, 1, True, "+21.5"),
    ],
)
def test_number(value, digits, sign, text):
    assert number(value, digits, sign=sign) == text


class TestHeadline:
    def test_improvement(self):
        assert sentence() == "Unguided held-out score .40 → .51 (+.11, 95 % interval +.08 to +.14, n = 384)"

    @pytest.mark.parametrize("after", [0.41, 0.39, 0.40])
    def test_interval_with_zero_is_no_significant_change(self, after):
        assert sentence(after=after).endswith("n = 384): no significant change")

    def test_interval_that_touches_zero_is_no_significant_change(self):
        assert sentence(before=0.25, after=0.5, half=0.25).endswith("no significant change")

    def test_decline_is_said_with_its_sign(self):
        assert sentence(after=0.30).endswith(".40 → .30 (−.10, 95 % interval −.13 to −.07, n = 384)")

    def test_end_near_zero_never_reads_as_zero(self):
        assert "+.111, 95 % interval +.001 to +.221" in sentence(before=0.4, after=0.511, half=0.11)

    def test_claims_held_out_only_if_the_note_does(self):
        assert sentence(note="training prompts").startswith("Unguided score .40")

    def test_without_baseline(self):
        alone = Results.model_validate(folder.unpaired(folder.results()))
        assert headline(alone) == "Unguided held-out score .51 (95 % interval .48 to .54, n = 384)"


class TestTable:
    def test_verdicts(self):
        rows = table(Results.model_validate(folder.results(0.40, 0.43)))
        assert [(row.task, row.verdict) for row in rows] == [
            ("single_object", "better"),
            ("two_object", "unclear"),
            ("counting", "unclear"),
            ("overall", "unclear"),
        ]

    def test_markdown(self):
        lines = markdown_table(folder.results()).splitlines()
        assert lines[0] == "| task | n | before | after | difference (95 % interval) |"
        assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
        assert lines[2] == "| single_object | 128 | .30 | .46 | +.16 (+.09 to +.23) |"
        assert lines[-1] == "| overall | 384 | .40 | .51 | +.11 (+.08 to +.14) |"

    def test_markdown_without_baseline(self):
        lines = markdown_table(folder.unpaired(folder.results())).splitlines()
        assert lines[0] == "| task | n | score (95 % interval) |"
        assert lines[-1] == "| overall | 384 | .51 (.48 to .54) |"
