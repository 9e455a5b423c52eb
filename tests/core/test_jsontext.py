"""JSON and lines of it: whatever a text holds, it comes back, or is refused in one line."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zipr1
from zipr1.core.config import parse
from zipr1.core.errors import InputError
from zipr1.core.jsontext import MAX_DEPTH, dumps, lines, loads
from zipr1.core.recipe import Recipe
from zipr1.core.rundir import RunDir, read_json, read_lines

# What str.splitlines takes for the end of a line, and JSON and files do not.
ENDS = "\u2028\u2029\u0085\v\f\x1c\x1d\x1e"
HOSTILE = {
    "deep list": ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
    "deep object": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 deep"),
    "a little deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than 100 deep"),
    "long integer": ('{"a": ' + "9" * 5000 + "}", "an integer of thousands of digits"),
    "half": ('{"a": "x\\ud800y"}', r"half of a character \('\\ud800'\)"),
    "other half": ('["\\uDFFF"]', r"half of a character \('\\udfff'\)"),
    "half in a key": ('{"\\ud83d": 1}', "half of a character"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "cut": ('{"a": ', "Expecting value"),
    "empty": ("", "Expecting value"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_nobody_can_go_on_with_is_refused_in_one_line(case):
    text, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message) as error:
        loads(text)
    assert "\n" not in str(error.value)
    if isinstance(text, str):
        with pytest.raises(ValueError, match=message):
            loads(text.encode())


def test_what_is_unusual_is_read():
    assert loads(b"\xef\xbb\xbf[1]") == [1]
    assert loads('"\\ud83d\\ude00"') == "\U0001f600"  # two halves are a whole
    assert loads('"\\\\ud800"') == "\\ud800"  # the letters, not the character
    assert loads("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert loads("[" + ",".join(["[]"] * 1000) + "]") == [[]] * 1000
    assert loads("9" * 4000) == int("9" * 4000)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_what_is_written_is_one_line_and_can_be_read(value):
    text = dumps(value)
    assert "\n" not in text and "\r" not in text
    text.encode()
    assert dumps(loads(text)) == text


def test_numbers_of_numpy_and_halves_of_characters():
    assert dumps({"a": np.float32(0.5), "b": np.arange(2), "c": float("nan")}) == (
        '{"a": 0.5, "b": [0, 1], "c": null}'
    )
    assert dumps({"path": "a\udcff.yaml", "text": "ä"}) == '{"path": "a?.yaml", "text": "ä"}'


@given(st.lists(st.text(), max_size=5))
def test_lines_of_a_file_end_at_line_feeds_alone(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(dumps(text) + "\n" for text in texts), encoding="utf-8")
    assert [loads(line) for line in lines(path)] == texts
    path.write_text(
        "".join(json.dumps({"x": t}, ensure_ascii=False) + "\r\n" for t in texts), newline=""
    )
    assert [loads(line)["x"] for line in lines(path)] == texts


def test_a_resumed_run_keeps_every_line_of_earlier_steps(tmp_path):
    """Whatever the answers hold: a line cut in two would be dropped as damaged."""
    recipe = Recipe()
    run = RunDir.open(recipe, tmp_path / "run")
    texts = [f"a{end}b" for end in ENDS] + ["\U0001f600", "ünï", "\\u2028"]
    for step in range(4):
        run.append_rollouts({"step": step, "texts": [text]} for text in texts)
        run.append_metrics({"step": step, "note": texts[step]})
    before = {n: (tmp_path / "run" / n).read_bytes() for n in ("metrics.jsonl", "rollouts.jsonl")}
    run.save_checkpoint(2, lambda folder: None)
    with (tmp_path / "run" / "rollouts.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "texts": ["cut sh')
    RunDir.open(recipe, tmp_path / "run")
    for name, rows in (("metrics.jsonl", 1), ("rollouts.jsonl", len(texts))):
        kept = b"".join(before[name].splitlines(keepends=True)[: 2 * rows])
        assert (tmp_path / "run" / name).read_bytes() == kept
    found = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert [row["texts"][0] for row in found] == texts * 2
    assert [row["note"] for row in read_lines(tmp_path / "run" / "metrics.jsonl")] == texts[:2]


@pytest.mark.parametrize("case", HOSTILE)
def test_files_of_a_run_are_refused_in_one_line(tmp_path, case):
    text = HOSTILE[case][0]
    path = tmp_path / "run.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=r"no readable JSON|a JSON object is expected"):
        read_json(path)
    path.write_bytes(path.read_bytes() + b'\n{"step": 1}\n')
    with pytest.raises(InputError, match=":1: not a JSON object; the file is damaged"):
        read_lines(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000])
def test_deep_yaml_is_one_line(text):
    with pytest.raises(InputError, match=r"recipe: not YAML|recipe:1: not YAML"):
        parse(text, "recipe")
    with pytest.raises(InputError, match=r"not YAML: .*digits"):
        parse("a: " + "9" * 5000, "recipe")


def test_nobody_reads_json_or_lines_in_another_way():
    """json.loads knows nothing of the limits above, and splitlines cuts texts. Named are those that read what zipr1
    itself or a library has made a moment before, and those that cut messages for people."""
    allowed = {
        "core/jsontext.py": {"loads"},
        "core/machine.py": {"splitlines"},
        "core/watch.py": {"loads", "splitlines"},
        "cli/export.py": {"splitlines"},
        "data/video.py": {"splitlines"},
        "models/loading.py": {"loads", "splitlines"},
        "models/random_weights.py": {"loads"},
        "evaluate/tasks/utils.py": {"loads"},
    }
    root = Path(zipr1.__file__).parent
    for path in root.rglob("*.py"):
        if path.is_relative_to(root / "assets"):
            continue
        found = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and (
                node.func.attr in ("splitlines", "readlines")
                or (
                    node.func.attr in ("load", "loads")
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == "json"
                )
            )
        }
        name = path.relative_to(root).as_posix()
        assert found <= allowed.get(name, set()), name
