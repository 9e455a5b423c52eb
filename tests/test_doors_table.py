"""docs/models.md says what the tests do."""

import doors
import pytest


def test_the_table_is_what_the_tests_ask():
    assert doors.check(), "docs/models.md differs from the tests; run `python tests/doors.py`"


def test_a_row_has_the_doors_of_each_kind():
    cells = {family: {"text": {"load"}} for family in doors.families()}
    cells["qwen3_vl"] = {"pictures": {"vLLM", "train"}, "clips": {"eval"}}
    made = doors.table(cells).splitlines()
    assert made[0] == "| family | pictures | clips | several media | text |"
    assert "| `qwen3_vl` | train, vLLM | eval | - | - |" in made
    assert "| `smolvlm` | - | - | - | load |" in made
    with pytest.raises(AssertionError, match="each family has its tests"):
        doors.table({"qwen3_vl": {}})


def test_the_table_takes_its_place_in_the_page():
    once = doors.page(f"above\n{doors.BEGIN}old\n{doors.END}below\n", "new\n")
    assert once == f"above\n{doors.BEGIN}new\n{doors.END}below\n"
    assert doors.page(once, "new\n") == once
