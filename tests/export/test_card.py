"""README.md of an exported folder: names in it are text, whatever they hold."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from zipr1.export import card
from zipr1.export.session import describe
from zipr1.export.source import open_run

ODD = [
    "<b>x</b>",
    "a|b",
    "`c`",
    "[l](http://evil)",
    "x: [1",
    "a\nlicense: evil",
    '"); import os; ("',
]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_names_are_text(run, tmp_path, name, format):
    source = open_run(run)
    summary = {**source.summary, "by_task": {name: source.summary["by_task"]["digits"]}}
    machine = {"hardware": {"device_name": name}, "versions": {"zipr1": name}}
    source = dataclasses.replace(
        source, base=name, revision=name, summary=summary, run={**source.run, **machine}
    )
    readme = card.model_card(source, describe(source, format, "float32", tmp_path))
    _, head, body = readme.split("---\n", 2)
    known = yaml.safe_load(head)
    assert known["base_model"] == name and "license" not in known
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    tags = set(re.findall(r"<(\w+)", page))
    assert tags <= {
        "h1",
        "h2",
        "p",
        "em",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "code",
        "ul",
        "li",
        "a",
    }
    addresses = re.findall(r'href="([^"]*)"', page)
    assert addresses and all(a.startswith("https://huggingface.co/") for a in addresses)
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert page.count("<tr>") == 2 and len(rows) == 2
    for snippet in re.findall(r"```python\n(.*?)```", body, re.DOTALL):
        compile(snippet, "README.md", "exec")
        assert "import os" not in re.sub(r'"(\\.|[^"\\])*"', "", snippet)
