"""The snippets of docs/usage.md, docs/serving.md, the README and exported model cards run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from zipr1.cli import main

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_blocks(text, monkeypatch):
    """Run sh and python blocks in order, in one namespace; returns how many of each kind."""
    names: dict[str, object] = {}
    counts = {"sh": 0, "python": 0}
    for kind, code in BLOCK.findall(text):
        if kind == "python":
            exec(compile(code, "<docs>", "exec"), names)
        elif kind == "sh":
            for line in code.strip().splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
                with pytest.raises(SystemExit) as left:
                    main()
                assert not left.value.code, line
        counts[kind] = counts.get(kind, 0) + 1
    return counts


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    """An empty folder in which `runs/tiny` is a finished run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_usage(folder, monkeypatch, capsys):
    counts = run_blocks((ROOT / "docs" / "usage.md").read_text(), monkeypatch)
    assert counts["sh"] == 1 and counts["python"] >= 8
    said = capsys.readouterr().out
    assert "generate: cache_implementation='static'" in said and "1 prompt of" in said


def test_serving(folder, monkeypatch, capsys):
    counts = run_blocks((ROOT / "docs" / "serving.md").read_text(), monkeypatch)
    assert counts["sh"] == 1 and counts["python"] == 2
    assert (folder / "answers.jsonl").read_text().count('"answer"') == 8
    assert "kept" in capsys.readouterr().out


def test_readme(folder, exported, monkeypatch, capsys):
    from PIL import Image

    from zipr1.data.digits import tasks

    (folder / "tiny-zipr1").symlink_to(exported)
    picture = tasks.prompts("train", "digits", 1, 1, seed=0)[0].media[0].source
    Image.fromarray(picture).save("picture.png")
    text = (ROOT / "README.md").read_text()
    blocks = [code for kind, code in BLOCK.findall(text) if kind == "python"]
    assert len(blocks) == 1 and "zipr1.load" in blocks[0]
    assert run_blocks(text, monkeypatch)["python"] == 1
    assert "kept" in capsys.readouterr().out


def test_the_model_cards_snippets(folder, exported, monkeypatch, capsys):
    """The sparse one runs as it stands; the dense one asks for torchvision, which is not needed elsewhere."""
    from PIL import Image

    from zipr1.data.digits import tasks

    Image.fromarray(tasks.prompts("train", "digits", 1, 1, seed=0)[0].media[0].source).save(
        "picture.png"
    )
    card = (exported / "README.md").read_text().replace("path/to/this/folder", str(exported))
    blocks = [code for kind, code in BLOCK.findall(card) if kind == "python"]
    exec(compile(blocks[0], "<card>", "exec"), {})
    dense = "\n".join(line for line in blocks[1].splitlines() if "AutoProcessor.from" not in line)
    exec(compile(dense, "<card>", "exec"), {})
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page", ["README.md", "docs/usage.md", "docs/serving.md", "docs/results.md"]
)
def test_links_within_the_repository_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        heads = [re.sub(r"[^\w\- ]", "", t).strip().lower().replace(" ", "-") for t in titles]
        assert anchor in heads, f"{target}#{anchor}"
