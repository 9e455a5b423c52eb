"""Any JSON or YAML file of a run, an exported folder or an evaluation may be edited, cut or damaged: each command then
ends in one line, or does what it says. Edits are drawn with a fixed seed."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinymodels
import tinyruns
import yaml
from commands import call
from rich.console import Console

import zipr1
from zipr1.core import checksums
from zipr1.core.errors import ZipError
from zipr1.evaluate import plots
from zipr1.export import session as exports
from zipr1.models.open import find_source
from zipr1.train.page import RunPage

QUIET = Console(quiet=True)
VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**63, 10**24, 1e308, float("nan"), -0.5, "x", "", [], {}, [[]],
    {"a": 1}, [1, 2, 3], "[/bold]", "\ud83d", "../../x", ["x"] * 3, float("inf"), "a\0b",
]  # fmt: skip
DAMAGES = [
    b"",
    b"\0\0",
    b"null",
    b"NaN",
    b'"x"',
    b"5",
    b"9" * 6000,
    b"[" * 100_000,
    b"[]",
    b"\xff\xfe",
]


def places(values: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands that can be changed; of a long list or mapping the first five alone."""
    if here:
        yield here
    if isinstance(values, dict):
        for key in list(values)[:40]:
            yield from places(values[key], (*here, key))
    elif isinstance(values, list):
        for index in range(min(5, len(values))):
            yield from places(values[index], (*here, index))


def edited(raw: bytes, kind: str, dice: random.Random) -> tuple[bytes, str]:
    """A file's content with one change, and what was changed. kind: yaml, json or jsonl."""
    how = dice.choice(["value"] * 6 + ["key"] * 2 + ["bytes", "cut", "encoding", "damage"])
    if kind == "jsonl" and how in ("value", "key"):
        how = "bytes"
    if how in ("value", "key"):
        values = yaml.safe_load(raw) if kind == "yaml" else json.loads(raw)
        place = dice.choice(list(places(values)))
        last = values
        for key in place[:-1]:
            last = last[key]
        if how == "key":
            del last[place[-1]]
            note = f"without {place}"
        else:
            last[place[-1]] = copy.deepcopy(new := dice.choice(VALUES))
            note = f"{place} = {new!r}"
        text = yaml.safe_dump(values) if kind == "yaml" else json.dumps(values)
        return text.encode(), note
    if how == "bytes":
        content = bytearray(raw)
        for _ in range(dice.choice([1, 3])):
            content[dice.randrange(len(content))] = dice.randrange(256)
        return bytes(content), "flipped bytes"
    if how == "cut":
        at = dice.randrange(len(raw))
        return raw[:at], f"cut at {at}"
    if how == "encoding":
        name = dice.choice(["utf-16", "utf-32", "utf-8-sig"])
        return raw.decode().encode(name), name
    content = dice.choice(DAMAGES)
    return content, f"{content[:10]!r}"


# --- the doors, each as short as it can be: what comes after the files are read is not tried here


LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
MADE: list[Path] = []


def asked(model: Path) -> list[object]:
    return [
        "eval", "--model", model, "--tasks", "digits", "--limit", 1, "--no-base", "--device", "cpu",
    ]  # fmt: skip


def resume(root: Path) -> None:
    code, said = call("train", "--resume", root, "--device", "cpu")
    assert_one_line(code, said)


def export(root: Path) -> None:
    code, said = call("export", root, "--to", root.parent / "out", "--device", "cpu")
    assert_one_line(code, said)
    assert code == 0 or not (root.parent / "out").exists()


def evaluate(root: Path) -> None:
    """The benchmark was finished before: its file is read, and the report made of it."""
    model = json.loads((MADE[0] / "eval/eval.json").read_text())["model"]
    assert_one_line(*call(*asked(Path(model)), "-o", root))


def side(root: Path) -> None:
    """Compared with itself before the edit."""
    code, said = call("compare", MADE[0] / root.name, root, "-o", root.parent / "page")
    assert_one_line(code, said)
    assert code == 0 or not (root.parent / "page").exists(), "half written"


def load(root: Path) -> None:
    """A ZipError is what the command line prints as one line."""
    with contextlib.suppress(ZipError):
        zipr1.load(str(root), device="cpu")


def source(root: Path) -> None:
    with contextlib.suppress(ZipError):
        find_source(str(root))


def assert_one_line(code: int, said: str) -> None:
    assert code in (0, 1, 2), code
    assert "Traceback" not in said
    if code:
        assert said.count("error: ") >= 1


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run of one step, its export and an evaluation of that."""
    root = tmp_path_factory.mktemp("edited")
    MADE[:] = [root]
    tinymodels.make().save(root / "model")
    tinyruns.write(
        root / "r.yaml", root / "model", data={"prompts": 4, "heldout_prompts": 1},
        train={"steps": 1, "prompts_per_step": 1, "max_new_tokens": 2},
        budgets={"num_generations": 2}, evaluation={"after": False},
    )  # fmt: skip
    assert call("train", root / "r.yaml", "-o", root / "run", "--device", "cpu")[0] == 0
    assert call("export", root / "run", "--to", root / "exported", "--device", "cpu")[0] == 0
    # Another, of an adapter, that ends with held-out questions.
    again = ["-o", root / "finished", "--device", "cpu", "evaluation.after=true", "model.lora={}"]
    ended = call("train", root / "r.yaml", *again)
    assert ended[0] == 0, ended[1]
    measured = call(*asked(root / "exported"), "-o", root / "eval") if LMMS_EVAL else (0, "")
    assert measured[0] == 0, measured[1]
    return root


@pytest.fixture
def brief(monkeypatch):
    """What takes long and reads no file is left out."""
    monkeypatch.setattr(RunPage, "_curves", lambda self: None)
    monkeypatch.setattr(RunPage, "_write", lambda self, *a: None)
    monkeypatch.setattr(exports, "reference", lambda *a: None)
    checked = {"questions": "", "n": 0, "logits_error": 0.0, "limit": 1.0, "same_text": 0}
    monkeypatch.setattr(exports, "compare", lambda *a: checked)
    monkeypatch.setattr(plots, "draw", lambda *a: {})


STEP = "checkpoints/step-000001"
CASES: list[tuple[str, str, Any, int]] = [
    *(("run", name, door, count) for name, doors in {
        "recipe.yaml": [(resume, 5), (source, 20)],
        "run.json": [(resume, 5), (export, 8)],
        "before.json": [(resume, 8)],
        "metrics.jsonl": [(resume, 2)],
        "rollouts.jsonl": [(resume, 2)],
        f"{STEP}/complete.json": [(resume, 3), (export, 3)],
        f"{STEP}/state.json": [(resume, 10)],
        f"{STEP}/model/config.json": [(load, 30), (resume, 4)],
        f"{STEP}/model/generation_config.json": [(load, 12)],
        f"{STEP}/model/tokenizer_config.json": [(load, 12)],
        f"{STEP}/model/tokenizer.json": [(load, 8)],
        f"{STEP}/model/processor_config.json": [(load, 12)],
        f"{STEP}/model/preprocessor_config.json": [(load, 4)],
        f"{STEP}/model/video_preprocessor_config.json": [(load, 4)],
    }.items() for door, count in doors),
    ("exported", "zipr1.json", load, 25),
    ("exported", "recipe.yaml", source, 8),
    ("exported", "config.json", load, 8),
    ("eval", "eval.json", evaluate, 8),
    ("eval", "benchmarks/digits.json", evaluate, 16),
    ("eval", "benchmarks/digits.json", side, 12),
    ("eval", "results.json", side, 8),
    ("finished", "after.json", side, 12),
    ("finished", "metrics.jsonl", side, 2),
    ("finished", "summary.json", side, 2),
    ("finished", "summary.json", export, 4),
    ("finished", f"{STEP}/model/adapter/adapter_config.json", load, 12),
]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "name", "door", "count"),
    CASES,
    ids=[f"{name.replace(STEP, 'step')}-{door.__name__}" for _, name, door, _ in CASES],
)
def test_an_edited_file_is_one_line(made, brief, tmp_path, folder, name, door, count):
    if folder == "eval" and not LMMS_EVAL:
        pytest.skip("lmms-eval is not installed")
    dice = random.Random(name)
    raw = (made / folder / name).read_bytes()
    kind = name.rpartition(".")[2]
    for number in range(count):
        root = tmp_path / str(number)
        root.mkdir()
        shutil.copytree(made / folder, root / folder, symlinks=True)
        content, note = edited(raw, kind, dice)
        path = root / folder / name
        path.write_bytes(content)
        if name.startswith(STEP) and not name.endswith("complete.json"):
            checksums.write(root / folder / STEP, 1)  # else its hash alone would tell
        try:
            door(root / folder)
        except Exception as error:
            error.add_note(f"{name}: {note}")
            raise


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("before.json", lambda v: v.pop("dense"), "before.json: `dense` is missing; .* measured again"),
        ("before.json", lambda v: v["dense"]["said"].pop(), r"dense\.said has 2 entries for 3 questions"),
        ("before.json", lambda v: v["before"]["layer_ratios"][0].pop(), "has not 3 numbers for each question"),
        ("before.json", lambda v: v["before"].update(correct=7), "before.correct: got 7; a list is allowed"),
        (f"{STEP}/state.json", lambda v: v.update(seconds=-1), "state.json: seconds: got -1; 0 or more"),
        (f"{STEP}/state.json", lambda v: v.update(stage=4), "stage 4 and supervised.curriculum has 4"),
        (f"{STEP}/state.json", lambda v: v["pressure"].update(sum={"digits": [1.0]}),
         r"pressure\.sum\.digits has 1 numbers and the model 3 layers"),
        ("run.json", lambda v: v.update(resumed=3), "run.json: resumed: got 3; a list is allowed"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(made, brief, tmp_path, name, change, said):
    root = Path(shutil.copytree(made / "run", tmp_path / "run", symlinks=True))
    values = json.loads((root / name).read_text())
    change(values)
    (root / name).write_text(json.dumps(values))
    checksums.write(root / STEP, 1)
    code, line = call("train", "--resume", root, "--device", "cpu")
    assert code == 2 and re.search(said, line), line


def test_a_checkpoint_of_an_earlier_version_goes_on(made, brief, tmp_path):
    """It remembered less."""
    root = Path(shutil.copytree(made / "run", tmp_path / "run", symlinks=True))
    (root / STEP / "state.json").write_text('{"seconds": 1.5}')
    checksums.write(root / STEP, 1)
    code, line = call("train", "--resume", root, "train.steps=2", "--device", "cpu")
    assert code == 0, line
    assert json.loads((root / "summary.json").read_text())["seconds"] > 1.5
