"""The snippets of docs/usage.md, docs/serving.md, the README and exported model cards run as they stand; the commands,
files and functions that the README and CONTRIBUTING.md name exist."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from zipr1.cli import app, main

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


def test_tutorial(tmp_path, monkeypatch, capsys):
    """Every command and snippet, from twenty pictures to the exported folder; with two steps in place of 150."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text()
    for long, short in (("train.steps=150", "train.steps=2"), ("--limit 40", "--limit 4")):
        assert long in text
        text = text.replace(long, short)
    assert run_blocks(text, monkeypatch) | {"text": 0} == {"sh": 5, "python": 2, "text": 0}
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    assert len({row["image"] for row in rows}) == 20 and all(
        Path(row["image"]).is_file() for row in rows
    )
    said = capsys.readouterr().out
    assert "checks 90 questions; 'three', said word for word, earns 1" in said
    assert said.count("memory, peak (estimate)") == 2 and re.search(
        r"peak \(estimate\) +10.1 GiB", said
    )
    assert re.search(r"hours on one A100 +30 \(estimate\)", said)
    shown = re.search(r'^{"question".*$', text, re.M)[0]
    assert shown in Path("test.jsonl").read_text()
    assert re.search(r"digits +4 ", said) and "checked against the run" in said
    assert re.search(r"^eight$", said, re.M) and "1 prompt of 79 tokens" in said


def test_lmms_evals_own_command_line_takes_what_the_readme_says(monkeypatch):
    """Its parser knows the options, and the folder has the task; tests/evaluate/test_adapter.py runs it."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.__main__ import parse_eval_args

    (line,) = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "-m lmms_eval" in line
    ]
    monkeypatch.setattr(sys, "argv", ["lmms_eval", *shlex.split(line)[3:]])
    _, options = parse_eval_args()
    assert (
        options.model == "zipr1"
        and (ROOT / options.include_path / f"{options.tasks}.yaml").is_file()
    )
    given = dict(pair.split("=") for pair in options.model_args.split(","))
    assert set(given) == {"pretrained", "budget"}


def test_readme(tmp_path, monkeypatch, capsys):
    """Its one snippet needs nothing but the repository, and its answer is right."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    assert run_blocks(text, monkeypatch)["python"] == 1
    said = capsys.readouterr().out
    assert re.search(r"which digit is blue\?.*three'\]", said), (
        said
    )  # the question, then its answer
    (kept,) = re.findall(r"1 prompt of \d+ tokens, ([\d.]+)% kept", said)
    assert 0 < float(kept) < 60
    (stated,) = re.findall(r"# three; (\d+)% of the tokens", text)
    assert abs(float(kept) - float(stated)) < 1


def test_the_picture_of_the_readme_is_of_the_embedded_test_digits():
    from zipr1.data.digits import tasks

    prompts = tasks.prompts("test", "digits", 1, 4, seed=0)
    assert np.array_equal(
        np.asarray(Image.open(ROOT / "docs/digits.png")), prompts[0].media[0].source
    )
    asked = [p for p in prompts if p.messages[-1]["content"][-1]["text"] == "which digit is blue?"]
    assert [p.answer for p in asked] == ["three"]


def commands(page: str) -> list[list[str]]:
    """Every command of this project in the blocks of a page that name no language, and in its inline code."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    words = [shlex.split(line.replace("[", " ").replace("]", " "), comments=True) for line in lines]
    return [
        w
        for w in words
        if w
        and (w[0].rpartition("/")[2] in ("zipr1", "make") or "zipr1" in w[1:])
        and "lmms_eval" not in w  # a test of its own, above
    ]


PAGES = ["README.md", "CONTRIBUTING.md", "recipes/README.md"]
PAGES += [f"docs/{name}.md" for name in ("choosing", "results", "models")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page):
    from zipr1.core.load import load

    known = typer.main.get_command(app).commands
    seen = set()
    for words in commands(page):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
            seen.add("make")
            continue
        launcher = words.index("zipr1") if "zipr1" in words else 0
        name, *given = words[launcher + 1 :]
        command = known[name]
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {w.partition("=")[0] for w in given if w.startswith("--")} <= options, words
        files = [w for w in given if w.endswith(".yaml")]
        overrides = [w for w in given if "=" in w and not w.startswith("-") and w != "KEY=VALUE"]
        for file in files:
            load(ROOT / file, overrides)  # raises for a key that is not there
        seen.add(name)
    wanted = {
        "README.md": {"make", *known},
        "CONTRIBUTING.md": {"make", "train"},
        "recipes/README.md": {"make", "train"},
        "docs/results.md": {"make", "train", "eval", "profile"},
    }
    assert seen >= wanted.get(page, {"profile"})


def named_files(page: str) -> list[tuple[str, str | None]]:
    """(path, name in it or None) of each `some/path`, `some/file.py` and `some/file.py:name` of a page."""
    found = re.findall(
        r"`([\w.-]+/[\w./-]*)(?::([\w.]+))?`",
        (ROOT / page).read_text(),
    )
    return [(path, name or None) for path, name in found]


def names_in(path: Path) -> set[str]:
    """What a module defines at its top level, and the members of its classes as Class.member."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_files_and_functions_that_are_named_exist(page):
    missing = []
    for file, name in named_files(page):
        path = ROOT / file
        if not path.exists() or (name and name not in names_in(path)):
            missing.append(f"{file}:{name}" if name else file)
    assert missing == []


def test_contributing_shows_the_rooms_that_there_are():
    """The picture is the contract of pyproject.toml, and both are the folders of zipr1/."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = re.search(r"## The rooms.*?^```\n(.*?)^```$", text, re.M | re.S)[1]
    shown = [re.findall(r"\w+", re.sub(r"\(.*?\)", "", line)) for line in picture.splitlines()]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = [
        c["layers"] for c in contracts if c["type"] == "layers" and c["containers"] == ["zipr1"]
    ]
    assert shown == [[r for r in re.findall(r"\w+", layer) if r != "__main__"] for layer in layers]
    rooms = [room for line in shown for room in line]
    folders = [p.parent.name for p in (ROOT / "zipr1").glob("*/__init__.py")]
    assert sorted(rooms) == sorted(folders)
    modules = {p.name for p in (ROOT / "zipr1").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py"} and len(rooms) <= 10 and len(shown) <= 6
    purposes = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.M))
    assert list(purposes) == rooms
    for room in rooms:
        purpose = ast.get_docstring(ast.parse((ROOT / "zipr1" / room / "__init__.py").read_text()))
        assert purpose, room
        assert (ROOT / "tests" / room).is_dir()


def test_paths_through_the_code_have_at_most_eight_steps():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"## Three paths through the code\n(.*?)^## ", text, re.M | re.S)[1]
    steps = [
        re.findall(r"^\d+\. ", part, re.M)
        for part in re.split(r"^\*\*.*\*\*$", section, flags=re.M)[1:]
    ]
    assert len(steps) == 3 and all(0 < len(path) <= 8 for path in steps)


def test_the_model_cards_snippets(folder, exported, monkeypatch, capsys):
    """The sparse one runs as it stands; the dense one asks for torchvision, which is not needed elsewhere."""
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
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/usage.md",
        "docs/serving.md",
        "docs/results.md",
        "docs/log.md",
        "docs/tutorial.md",
        "docs/choosing.md",
        "docs/recipe.md",
        "docs/models.md",
        "recipes/README.md",
        "kernels/README.md",
    ],
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


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_help_has_an_example_that_parses_and_every_default(name):
    """An option that takes a value shows its default, or says in words what happens without it."""
    command = typer.main.get_command(app).commands[name]
    (example,) = re.findall(r"^\s*For example: zipr1 (.*)$", command.help, re.M)
    first, *words = shlex.split(example)
    assert first == name
    command.make_context(name, words)  # raises for an option or a value that is not taken
    silent = [
        option.opts[0]
        for option in command.params
        if option.param_type_name == "option"
        and not option.is_flag
        and not option.required
        and option.name not in ("help", "install_completion", "show_completion")
        and not (option.show_default and option.default is not None)
        and "Default: " not in (option.help or "")
    ]
    assert silent == []
    folder = {"train": "-o", "eval": "-o", "profile": "-o", "export": "-o", "compare": "-o"}
    options = {o for option in command.params for o in option.opts}
    assert name not in folder or folder[name] in options
    assert "--json" in options
