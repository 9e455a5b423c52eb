"""The comparison: p is chosen on validation questions alone, runs are made once and go on where they stopped, and the
table comes from the rows alone. Training is a stub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import compare
from fair import front, rows, table
from fair.methods import LOWER_ENDS, METHODS, TRIES
from fair.models import RECIPE

from zipr1.core.errors import InputError
from zipr1.core.load import load
from zipr1.core.recipe import Model
from zipr1.core.statistics import Z
from zipr1.models.policy import load_policy
from zipr1.train.validate import check


def test_p_is_interpolated():
    kept = {0.2: 0.1, 0.6: 0.3, 0.8: 0.5}
    assert front.p_for(kept, 0.2) == pytest.approx(0.4)  # half of the way from 0.1 to 0.3
    assert front.p_for(kept, 0.45) == pytest.approx(0.75)
    assert [front.p_for(kept, share) for share in (0.1, 0.3, 0.5)] == pytest.approx([0.2, 0.6, 0.8])
    assert front.p_for(kept, 0.09) is None and front.p_for(kept, 0.51) is None
    assert front.p_for(dict(reversed(kept.items())), 0.2) == pytest.approx(0.4)
    # A fall is noise: what was kept before holds on, and the first p that keeps so much is taken.
    assert front.p_for({0.2: 0.1, 0.4: 0.3, 0.6: 0.28, 0.8: 0.5}, 0.3) == pytest.approx(0.4)
    assert front.p_for({0.2: 0.1, 0.4: 0.3, 0.6: 0.28, 0.8: 0.5}, 0.4) == pytest.approx(0.7)


def test_p_is_looked_for_between_the_grid():
    """Of a curve that no straight line follows, p^4, two looks are enough for half a percent of the tokens."""
    looked: dict[float, float] = {}

    def more(values):
        looked.update({p: p**4 for p in values})
        return looked

    found = front.choose(more, (0.3, 0.6, 0.9))
    assert list(found) == [0.1, 0.15, 0.2, 0.25, 0.3, 0.4]
    assert all(abs(p**4 - share) < 0.005 for share, p in found.items())
    looked.clear()
    # What no p of the grid keeps is left out, and nothing is looked at twice as far.
    assert list(front.choose(more, (0.7, 0.75))) == [0.25, 0.3]
    looked.clear()
    assert front.choose(more, (0.05, 0.1)) == {}


def test_validation_chooses_and_the_test_is_read_once(monkeypatch):
    """By the real model: which questions are asked at which p."""
    asked: list[tuple[str, str, int, tuple[float | None, ...]]] = []
    evaluate = front.heldout.evaluate

    def noted(policy, recipe, prompts, settings):
        split = prompts[0].id.split("/")[1]
        points = tuple(None if s is None else s.p for s in settings)
        asked.append((prompts[0].task, split, len(prompts), points))
        return evaluate(policy, recipe, prompts, settings)

    monkeypatch.setattr(front.heldout, "evaluate", noted)
    monkeypatch.setattr(front, "TASKS", {"digits": "images"})
    monkeypatch.setitem(front.GRIDS, "top_p", (0.3, 0.7))
    method = METHODS["top_p"]
    found = front.read(
        load_policy(Model(path="tiny"), "cpu"), method.recipe(0), method.sparse(), 0.9, 8, 4
    )
    (task, split, number, points), *others = reversed(asked)
    assert (task, split, number) == ("digits", "test", 8)
    assert {(split, number) for _, split, number, _ in others} == {("validation", 4)}
    by_split = {s: [row for row in found if row["split"] == s] for s in ("validation", "test")}
    chosen = {row["at"]: row["p"] for row in by_split["validation"]}
    assert chosen and all(0.3 <= float(p) <= 0.7 for p in chosen.values())
    assert {row["at"]: row["p"] for row in by_split["test"]} == chosen | {
        "own": "0.9",
        "dense": "1",
    }
    assert points == (*(float(p) for p in chosen.values()), 0.9, None)
    assert all((row["right"] == "") == (row["split"] == "validation") for row in found)
    for row in by_split["test"]:
        right = rows.unpack(row["right"], 8)
        assert float(row["correct"]) == pytest.approx(100 * right.mean(), abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_recipes(name):
    method = METHODS[name]
    check(method.recipe(3))
    own, seedless = method.hashes(3)
    assert method.hashes(0) == ((own, own) if method.rule else (seedless, seedless))
    assert (own == seedless) == (method.rule is not None)
    assert method.sparse().rule == (method.rule or "top_p")


def test_ours_is_the_recipe_as_it_is():
    assert METHODS["ours"].recipe(2) == load(RECIPE, ["seed=2"])
    settings = METHODS["paper-attention-no-pg-0.3"].recipe(0)
    assert settings.efficiency.target is settings.efficiency.max_accuracy_drop is None
    assert (settings.budgets.low, settings.budgets.low_end) == (0.3, None)
    assert (settings.sparse.skip, settings.ppo.policy_gradient) == ("attention", 0)
    assert len({method.hashes(0)[0] for method in METHODS.values()}) == len(METHODS)


def point(task, at, right, **others):
    """A row as front.py gives it, of questions that are the same for all methods."""
    known = {
        "split": "test",
        "task": task,
        "at": at,
        "p": "0.5",
        "kept": "20.000",
        "n": str(len(right)),
    }
    known |= {"correct": f"{100 * np.mean(right):.3f}", "questions": f"q-{task}"}
    known |= {"right": rows.pack(np.array(right, float))} | others
    return known if known["split"] == "test" else known | {"right": ""}


ALL = [1.0] * 8


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """No process is started: `trained` and `read` list what would have been; the base is right on all questions, a
    method of seed s is wrong on the first s + 1, and of the tries the one from 0.3 is best on validation questions."""
    monkeypatch.setattr(compare, "RECORD", tmp_path / "docs" / "compare.csv")
    monkeypatch.setattr(compare, "FIGURE", tmp_path / "pareto.png")
    log: dict[str, list[str]] = {"trained": [], "read": []}
    fails: set[str] = set()

    def run(command, path):
        if "train" in command:
            name = path.name[: -len(".log")]
            log["trained"].append(name)
            if name in fails:
                raise compare.RunError(f"{name}: failed")
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir(parents=True)
            method, _, seed = name.rpartition("-")
            sha = METHODS[method].recipe(int(seed)).sha256()
            (folder / "summary.json").write_text(json.dumps({"recipe_sha256": sha}))
            return
        name = path.name[: -len(".read.log")]
        log["read"].append(name)
        method, _, seed = name.rpartition("-")
        wrong = 0 if METHODS[method].rule else int(seed) + 1
        right = [0.0] * wrong + [1.0] * (8 - wrong)
        found = []
        for task in table.TASKS:
            for at in ("0.2", "0.3"):
                found.append(point(task, at, right))
                correct = "85.000" if method == "paper-0.3" else "80.000"
                found.append(point(task, at, right, split="validation", correct=correct))
            found += [point(task, "own", right)] if not METHODS[method].rule else []
            found.append(point(task, "dense", ALL))
        Path(command[5]).write_text(json.dumps(found))

    monkeypatch.setattr(compare, "_run", run)
    log["fails"] = fails  # type: ignore[assignment]
    log["arguments"] = ["--out", str(tmp_path / "runs"), "--jobs", "1", "--seeds", "0", "1"]
    return log


def call(stubbed, *arguments: str) -> int:
    try:
        compare.main([*stubbed["arguments"], *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_runs_are_made_once(stubbed, capsys):
    assert call(stubbed, "--methods", "ours", "top_k") == 0
    assert stubbed["trained"] == ["ours-0", "ours-1"]
    assert stubbed["read"] == ["top_p-0", "ours-0", "ours-1", "top_k-0"]
    assert call(stubbed, "--methods", "ours", "top_k") == 0
    assert len(stubbed["trained"]) == 2 and len(stubbed["read"]) == 4
    # Another seed alone; a run that was trained and not read is read.
    record = rows.read(compare.RECORD, table.COLUMNS)
    kept = [row for row in record if (row["method"], row["seed"]) != ("ours", "1")]
    compare.RECORD.unlink()
    rows.append(compare.RECORD, table.COLUMNS, kept)
    stubbed["read"].clear()
    assert call(stubbed, "--methods", "ours", "--seeds", "0", "1", "2") == 0
    assert stubbed["trained"] == ["ours-0", "ours-1", "ours-2"]
    assert stubbed["read"] == ["ours-1", "ours-2"]


def test_an_error_keeps_what_is_done(stubbed, capsys):
    stubbed["fails"].add("cut-1")
    assert call(stubbed, "--methods", "cut", "top_p") == 1
    assert "compare: cut-1: failed" in capsys.readouterr().err
    record = rows.read(compare.RECORD, table.COLUMNS)
    assert {(row["method"], row["seed"]) for row in record} == {("top_p", "0"), ("cut", "0")}
    stubbed["fails"].clear()
    assert call(stubbed, "--methods", "cut", "top_p") == 0
    assert stubbed["trained"] == ["cut-0", "cut-1", "cut-1"]


def test_another_recipe_in_the_folder_is_refused(stubbed, tmp_path, capsys):
    folder = tmp_path / "runs" / "ours-0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"recipe_sha256": "abcdef123"}')
    assert call(stubbed, "--methods", "ours") == 2
    told = capsys.readouterr().err
    assert "holds a run of another recipe (abcdef12); rename it" in told and not stubbed["trained"]


def test_the_lower_end_is_chosen_on_validation_questions(stubbed, capsys):
    assert call(stubbed, "--methods", "paper", "paper-no-pg") == 0
    assert stubbed["trained"] == [
        "paper-0.15-0",
        "paper-0.3-0",
        "paper-0.5-0",
        "paper-0.3-1",
        "paper-no-pg-0.3-0",
        "paper-no-pg-0.3-1",
    ]
    record = rows.read(compare.RECORD, table.COLUMNS)
    assert table.lower_end(record) == 0.3
    assert set(table.shown(record)) == {"top_p", "paper-0.3", "paper-no-pg-0.3"}
    # Only where all three reach a ratio does it count.
    for row in record:
        if row["method"] == "paper-0.5" and row["at"] == "0.2":
            row["correct"] = "100.000"
    assert table.lower_end(record) == 0.5
    for row in record:
        if row["method"] == "paper-0.15" and row["at"] == "0.2":
            row["at"] = "0.1"
    assert table.lower_end(record) == 0.3
    assert table.lower_end([row for row in record if row["method"] != TRIES[0]]) is None
    assert LOWER_ENDS[1] == 0.3


def test_the_plan_does_nothing(stubbed, capsys):
    assert call(stubbed, "--plan", "--methods", "ours", "paper") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["top_p, seed 0", "paper-0.15, seed 0"] and told[-2] == "ours, seed 1"
    assert not stubbed["trained"] and not stubbed["read"] and not compare.RECORD.exists()


def test_the_table_comes_from_the_rows_alone(stubbed, tmp_path, capsys):
    assert call(stubbed, "--methods", "ours", "no-kl", "top_k", "--control-seeds", "0") == 0
    first = (tmp_path / "runs" / "table.md").read_text()
    for path in (tmp_path / "runs").glob("*-*"):
        for file in [*path.glob("*")] if path.is_dir() else []:
            file.unlink()
    read = len(stubbed["read"])
    assert call(stubbed, "--only-table") == 0
    assert (tmp_path / "runs" / "table.md").read_text() == first and len(stubbed["read"]) == read
    assert compare.FIGURE.stat().st_size > 0
    # Seeds lose 1/8 and 2/8: mean 18.75; s = 8.839, over sqrt(2) 6.25. Questions: losses 1, 1/2 of the first picture,
    # residuals 3/4 and -3/4: V = 2 * 2 * 9/16 / 64, 18.75 points.
    line = next(line for line in first.splitlines() if line.startswith("| ours | 2 |"))
    assert line == "| ours | 2 |  |  | -18.75 ± 6.25 ± 18.75 |  | -18.75 ± 6.25 ± 18.75 |  |"
    # One seed has no error of seeds: 1/8; residuals 1/2 and -1/2, V = 2 * 1/2 / 64.
    line = next(line for line in first.splitlines() if line.startswith("| ours, no KL | 1 |"))
    assert line == "| ours, no KL | 1 |  |  | -12.50 ± 12.50 |  | -12.50 ± 12.50 |  |"
    # Less ours it is +6.25: question 1 alone differs, by 1/2, which every picture's residual is 1/4 of.
    half = 100 * Z * (2 * 2 * (1 / 4) ** 2 / 64) ** 0.5
    line = [line for line in first.splitlines() if line.startswith("| ours, no KL | 1 |")][1]
    assert f"| +6.25 ± {half:.2f} |" in line
    # Untrained it is right on all: -(-18.75), of which the error is ours.
    line = [line for line in first.splitlines() if line.startswith("| no training, top-k |")][1]
    assert "| +18.75 ± " in line
    assert "20.0 %: -18.75" in first and "n = 8, base, dense: 100.0 % correct" in first


def test_an_older_recipes_rows_do_not_count(stubbed):
    assert call(stubbed, "--methods", "ours") == 0
    record = rows.read(compare.RECORD, table.COLUMNS)
    older = [row | {"recipe": "older", "seed": "9"} for row in record if row["method"] == "ours"]
    found = table.readings([*older, *record])
    assert found["ours", "digits", "0.2"].seeds == ["0", "1"]
    assert table.readings([*record, *older])["ours", "digits", "0.2"].seeds == ["9", "9"]
    # Other questions than the seed before it.
    other = record[-1] | {"questions": "others", "seed": "2"}
    with pytest.raises(InputError, match="seed 2 was asked other questions"):
        table.readings([*record, other])
    # And where the base was asked others, there is nothing to compare.
    others = [row | {"questions": "others"} if row["method"] == "ours" else row for row in record]
    assert table.against_base(table.readings(others), "ours", "digits", "0.2") is None


def test_rows_say_how_they_compare(stubbed):
    assert call(stubbed, "--methods", "ours") == 0
    record = rows.read(compare.RECORD, table.COLUMNS)
    wanted = {"method": "ours", "seed": "0", "task": "digits", "at": "0.2", "split": "test"}
    (row,) = [row for row in record if wanted.items() <= row.items()]
    found = [row[key] for key in ("base", "difference", "correct", "n")]
    assert found == ["100.000", "-12.500", "87.500", "8"]
    assert float(row["low"]) == pytest.approx(-12.5 - 100 * Z / 8, abs=1e-3)
    assert (row["recipe_sha256"], row["recipe"]) == METHODS["ours"].hashes(0)
    assert {r["difference"] for r in record if r["split"] == "validation"} == {""}


def test_nothing_yet(stubbed, capsys):
    assert call(stubbed, "--only-table") == 0
    assert "The untouched base was not read yet." in capsys.readouterr().out
