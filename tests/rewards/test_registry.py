"""Who may name what as a reward, and what a reward of one's own may return."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Data, Recipe, Rewards
from zipr1.core.types import Prompt
from zipr1.data import sources
from zipr1.data.rows import load
from zipr1.rewards.registry import REWARDS, check_answers, examples, find, reward_of

ROOT = Path(__file__).parents[2]
EVIL = """
from pathlib import Path

Path(__file__).with_name("ran").touch()

def run(said, wanted):
    return 1.0
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder with rows that name a file beside them; `ran` appears there if the file is executed."""
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _rows(folder, **row):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"question": "q?", "answer": "a", **row}) + "\n")
    return path


R1 = {
    "problem": "q?",
    "problem_type": "numerical",
    "path": "a.png",
    "data_type": "image",
    "solution": "<answer>4</answer>",
}


@pytest.mark.parametrize("name", ["evil.py:run", "./evil.py:run", "{}/evil.py:run"])
@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": [{"role": "user", "content": "q?"}], "reward_model": {"ground_truth": "4"}},
        {"conversations": [{"from": "human", "value": "q?"}]},
        R1,
    ],
    ids=["question", "verl", "ShareGPT", "Video-R1"],
)
def test_a_row_runs_no_file(evil, name, row):
    path = _rows(evil, **row, reward=name.format(evil))
    with pytest.raises(
        InputError,
        match=r"row 1: reward '.*evil\.py:run': a row cannot name a file.*allowed: exact, choice.*in the recipe",
    ):
        load(path, Data(check="exists"))
    assert not (evil / "ran").exists()


def test_a_renamed_column_runs_no_file_either(evil):
    path = _rows(evil, judge="evil.py:run")
    with pytest.raises(InputError, match="a row cannot name a file"):
        load(path, Data(columns={"reward": "judge"}))
    assert not (evil / "ran").exists()


def test_skipped_rows_run_no_file(evil):
    path = _rows(evil, reward="evil.py:run")
    path.write_text(path.read_text() + json.dumps({"question": "q?", "answer": "b"}) + "\n")
    assert [p.answer for p in load(path, Data(on_bad_row="skip"))] == ["b"]
    assert not (evil / "ran").exists()


def test_a_dry_run_runs_no_file_of_a_row(evil):
    path = _rows(evil, reward="evil.py:run")
    command = ["train", f"{ROOT}/recipes/tiny.yaml", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "zipr1", *command, f"data.source={path}", f"data.heldout={path}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "a row cannot name a file" in " ".join((done.stdout + done.stderr).split())
    assert not (evil / "ran").exists()


def test_a_prompt_runs_no_file_and_a_recipe_does(evil):
    prompt = Prompt("1", [], (), "a", "t", "k", "p", reward="evil.py:run")
    with pytest.raises(InputError, match="a row cannot name a file"):
        reward_of(prompt, Recipe())
    assert not (evil / "ran").exists()
    prompt = Prompt("1", [], (), "a", "t", "k", "p")
    assert reward_of(prompt, Recipe(rewards=Rewards(check="evil.py:run")))("x", "y") == 1.0
    assert (evil / "ran").exists()


def test_a_misspelt_reward_of_a_row_is_not_told_of_files():
    with pytest.raises(InputError) as error:
        find("numbr", "reward", files=False)
    assert "did you mean 'number'" in str(error.value)
    assert "path.py" not in str(error.value)


RETURNS = {
    "True": 1.0,
    "False": 0.0,
    "1": 1.0,
    "0.25": 0.25,
    "np.float32(0.5)": 0.5,
    "np.float64(0.5)": 0.5,
    "np.float16(0.5)": 0.5,
    "np.int64(1)": 1.0,
    "np.bool_(True)": 1.0,
    "np.array(0.5)": 0.5,
    "np.mean([0, 1])": 0.5,
    "torch.tensor(0.5)": 0.5,
    "torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)": 0.5,
    "torch.tensor(True)": 1.0,
    "None": None,
    "'1'": None,
    "2": None,
    "-0.1": None,
    "float('nan')": None,
    "float('inf')": None,
    "np.float32('nan')": None,
    "np.float32(1.5)": None,
    "np.array([0.5])": None,
    "np.array(['1'])[0]": None,
    "np.array(0.5j)": None,
    "torch.tensor([0.5, 0.5])": None,
    "torch.tensor(float('nan'))": None,
    "[1.0]": None,
}


@pytest.mark.parametrize(("written", "value"), RETURNS.items())
def test_what_a_reward_of_ones_own_may_return(written, value, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"import numpy as np\nimport torch\ndef f(said, wanted): return {written}\n")
    reward = find(f"{path}:f")
    if value is None:
        with pytest.raises(InputError, match="allowed: a number from 0 to 1"):
            reward("x", "y")
    else:
        got = reward("x", "y")
        assert got == value
        assert type(got) is float


def _asked(*answers, reward=None):
    return [
        Prompt(str(i), [], (), answer, "t", "k", "p", reward=reward, row=f"x.jsonl: row {i}")
        for i, answer in enumerate(answers, 1)
    ]


def test_a_right_answer_that_nobody_can_earn_is_an_error_by_its_row(caplog):
    recipe = Recipe(rewards=Rewards(check="choice"))
    fine = _asked("A", "b", "A, C", "AC", "(D) dog")
    assert check_answers(fine, recipe) == fine
    with pytest.raises(
        InputError,
        match=r"^x\.jsonl: row 2: choice gives 'cat' no full reward when it is said word for word, nor 1 more of 4 "
        r"right answers; .*name another \(rewards\.check, or `reward` in the row\) \(data\.on_bad_row=skip",
    ):
        check_answers(_asked("A", "cat", "dog", "B"), recipe)
    # A row's own reward is the one that counts, and one right answer that can be earned is enough.
    check_answers(_asked("cat", "dog", reward="exact"), recipe)
    (several,) = _asked("cat")
    check_answers([replace(several, accepted=("dog", "B"))], recipe)
    with pytest.raises(InputError, match="row 1"):
        check_answers([replace(several, accepted=("dog",))], recipe)
    assert not caplog.records


def test_rows_that_nobody_can_earn_are_left_out_where_bad_rows_are(caplog):
    recipe = Recipe(rewards=Rewards(check="choice"), data=Data(on_bad_row="skip"))
    kept = check_answers(_asked("A", "cat", "dog", "B"), recipe)
    assert [prompt.answer for prompt in kept] == ["A", "B"]
    (said,) = caplog.messages
    assert "row 2: choice gives 'cat'" in said and said.endswith("these rows are left out")
    with pytest.raises(InputError, match=r"row 1: choice gives 'cat' .* nor 1 more of 2"):
        check_answers(_asked("cat", "dog"), recipe)


# What each check cannot read of what a row may hold; `chartqa` and `ocr` compare texts of any kind.
UNREAD = {
    "exact": "<answer></answer>", "choice": "cat", "number": "", "relaxed": "", "regression": "", "rouge": "?",
    "anls": "",
}  # fmt: skip


@pytest.mark.parametrize("name", REWARDS)
def test_every_check_is_asked_for_every_row(name):
    """The last of 30,000 rows is the bad one."""
    recipe = Recipe(rewards=Rewards(check=name))
    good = _asked("C" if name == "choice" else "a word") * 29_999
    assert len(check_answers(good, recipe)) == 29_999
    if name in UNREAD:
        (bad,) = [replace(p, row="x.jsonl: row 30000") for p in _asked(UNREAD[name])]
        with pytest.raises(InputError, match=f"row 30000: {name} gives"):
            check_answers([*good, bad], recipe)


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.json", "rows.parquet", "saved", "folder"])
def test_every_source_names_the_row_that_nobody_can_earn(tmp_path, kind):
    rows = [{"question": "q?", "answer": answer} for answer in ("A", "cat")]
    path = tmp_path / kind
    if kind == "rows.json":
        path.write_text(json.dumps(rows))
    elif kind == "rows.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "saved":
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(path))
    else:
        if kind == "folder":
            path.mkdir()
        file = path / "train.jsonl" if kind == "folder" else path
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"rewards": {"check": "choice"}, "data": {"source": str(path), "heldout": str(path)}}
    recipe = validate(asked)
    with pytest.raises(InputError, match=r"row 2: choice gives 'cat'"):
        check_answers(sources.load(recipe.data, "train", 0), recipe)


def test_a_reward_of_ones_own_is_not_called_before_the_run(evil):
    (evil / "evil.py").write_text("def run(said, wanted): raise RuntimeError")
    check_answers(_asked("cat"), Recipe(rewards=Rewards(check="evil.py:run")))


def test_a_dry_run_tells_of_answers_that_nobody_can_earn(tmp_path):
    path = _rows(tmp_path, answer="cat")
    command = ["train", f"{ROOT}/recipes/tiny.yaml", "--dry-run", "rewards.check=choice"]
    done = subprocess.run(
        [sys.executable, "-m", "zipr1", *command, f"data.source={path}", f"data.heldout={path}"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "choice gives 'cat' no full reward" in " ".join((done.stdout + done.stderr).split())


def test_each_check_is_shown_with_what_it_makes_of_an_answer(evil):
    """Three checks of five questions; a user's own is not called, for it may be slow or cost money."""
    (evil / "evil.py").write_text("def run(said, wanted): raise RuntimeError")
    asked = [*_asked("AC", "B", reward="choice"), *_asked("3", reward="number"), *_asked("x", "y")]
    assert examples(asked, Recipe(rewards=Rewards(check="evil.py:run"))) == [
        "reward choice: checks 2 questions; 'AC', said word for word, earns 1",
        "reward number: checks 1 questions; '3', said word for word, earns 1",
        "reward evil.py:run: checks 2 questions",
    ]
    assert examples(_asked("cat", reward="choice"), Recipe())[0].endswith("earns 0")


# The same number as people and tables write it; and what looks like it and is another.
SAME = [
    ("3.0", "3"), ("3", "3.0"), ("-2.0", "-2"), ("1,000", "1000"), ("1000", "1,000.0"), ("12,345,678", "12345678"),
    ("1 000", "1000"), ("-5", "\u22125"), ("\u22125", "-5"), ("\u20135", "-5"), ("- 5", "-5"),
    ("\u22121,000.0", "-1000"), ("$1,000.00", "$1000"), ("3.0 %", "3%"),
]  # fmt: skip
OTHER = [
    ("5", "-5"),
    ("1,000", "1"),
    ("3.05", "3.5"),
    ("30", "3.0"),
    ("10", "1.0"),
    ("1000", "1,00"),
]


@pytest.mark.parametrize("name", ["exact", "number", "relaxed", "regression"])
def test_one_number_written_in_many_ways(name):
    check = find(name)
    for said, wanted in SAME:
        assert check(said, wanted) == 1.0, (said, wanted)
    for said, wanted in OTHER:
        assert check(said, wanted) < 1.0, (said, wanted)


@pytest.mark.parametrize("name", REWARDS)
def test_a_whole_number_of_a_table_is_earned_under_every_check(tmp_path, name):
    """JSON of a column with an empty cell says 3.0 where 3 was meant."""
    path = tmp_path / "rows.jsonl"
    answer = "A" if name == "choice" else 3.0
    path.write_text(json.dumps({"question": "q", "answer": answer}) + "\n")
    (prompt,) = load(path, Data())
    assert find(name)("A" if name == "choice" else "3", prompt.answer) == 1.0
