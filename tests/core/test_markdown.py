"""Names and answers in Markdown stay text: read by a Markdown parser, they come out as they went in."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from zipr1.core import markdown as md

PARSER = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
AWKWARD = [
    "<b>bold</b>", "a|b", "`code`", "``", "[x](http://y)", "![x](y)", "*a* **b**", "_a_ b_c __d__",
    "# h", "> q", "- item", "+ item", "1. one", "2) two", "a\nb", "a\n\n# b", "~~gone~~", "&lt;", "&amp;",
    "\\", "\\*", "<!-- x -->", "<script>alert(1)</script>", "$x$", "===", "---", "|", "tiny_base_2", "| a | b |",
]  # fmt: skip


def words(page: str) -> str:
    """The text of a page as a reader sees it."""
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def check(value: str) -> None:
    shown = " ".join(value.split())
    page = PARSER.render(f"* before {md.text(value)} after")
    assert re.findall(r"<(\w+)", page) == ["ul", "li"]
    assert words(page).strip() == f"before {shown} after".replace("  ", " ") or not shown
    for line, tags in ((f"* {md.text(value)}", ["ul", "li"]), (f"# {md.text(value)}", ["h1"])):
        if shown:
            assert re.findall(r"<(\w+)", PARSER.render(line)) == tags
            assert words(PARSER.render(line)).strip() == shown
    table = PARSER.render(f"| a | b |\n|---|---|\n| {md.text(value)} | end |\n")
    cells = re.findall(r"<td>(.*?)</td>", table, re.DOTALL)
    assert len(cells) == 2 and cells[1] == "end" and "<" not in cells[0]
    assert words(cells[0]).strip() == shown
    if shown:
        page = PARSER.render(f"x {md.code(value)} y")
        assert re.findall(r"<(\w+)", page) == ["p", "code"]
        found = re.search("<code>(.*)</code>", page, re.DOTALL)
        assert found and html.unescape(found[1]).strip() == shown


@pytest.mark.parametrize("value", AWKWARD)
def test_awkward_text(value):
    check(value)


@given(st.text(alphabet=st.sampled_from("ab1 `*_[]()<>&|\\~#>+-=.!$\n:/"), max_size=12))
def test_any_text(value):
    check(value)


def test_plain_names_are_written_plainly():
    for name in (
        "tiny",
        "moving_digits",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "runs/tiny-20260101",
        "87.50",
        "+0.5",
    ):
        assert md.text(name) == name
