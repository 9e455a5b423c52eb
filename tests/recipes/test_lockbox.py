"""The lock-box: its questions are nobody else's, weights are asked once, and what is found is written down and summed
up as worked out by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import lockbox
from fair import models, rows

from zipr1.core.errors import InputError
from zipr1.data import embedded
from zipr1.train.heldout import Result


@pytest.fixture
def record(tmp_path, monkeypatch):
    path = tmp_path / "docs" / "lockbox.csv"
    monkeypatch.setattr(lockbox, "RECORD", path)
    return path


@pytest.fixture
def answers(monkeypatch):
    """Stubs the models: `answers[path]` are the numbers of questions of a task answered wrong, dense and sparse; each
    list of models asked is kept."""
    known: dict[str, tuple[set[int], set[int]]] = {"tiny": (set(), set())}
    asked: list[str] = []

    def ask(path, recipe, prompts, settings):
        asked.append(path)
        tasks = [p.task for p in prompts]
        places = np.array([tasks[:i].count(task) for i, task in enumerate(tasks)])
        found = []
        for setting in settings:
            wrong = known[path][0 if setting is None else 1]
            right = np.array([float(place not in wrong) for place in places])
            ratio = np.full(len(prompts), 1.0 if setting is None else 0.25)
            found.append(Result(prompts, right, ratio, ratio[:, None], [""] * len(prompts)))
        return found

    monkeypatch.setattr(models, "ask", ask)
    known["asked"] = asked  # type: ignore[assignment]
    return known


def copy_of(run: Path, to: Path, seed: int = 0) -> Path:
    """A run of other weights: one number is changed, and with it the hashes."""
    from safetensors.torch import load_file, save_file

    from zipr1.core import checksums

    shutil.copytree(run, to, symlinks=True)
    written = to / "recipe.yaml"
    written.write_text(written.read_text().replace("seed: 0\n", f"seed: {seed}\n", 1))
    checkpoint = (to / "last").resolve()
    path = checkpoint / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1 + seed
    save_file(tensors, path, {"format": "pt"})
    checksums.write(checkpoint, 7)
    return to


def ask(*arguments: object) -> int:
    """The exit code of the command."""
    try:
        lockbox.main([str(a) for a in arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_its_questions_are_asked_nowhere_else():
    mine = embedded.draw_lockbox("digits", {"digits": 1.0, "pages": 0.0, "page_totals": 0.2}, 8)
    tasks = ["digits", "moving_digits", "hard_digits", "page_totals"]
    assert [p.task for p in mine] == [task for task in tasks for _ in range(8)]
    assert all(p.id.split("/")[1] == "test" for p in mine)
    for split in ("test", "validation"):
        heldout = embedded.draw_heldout("digits", {}, 8, split)
        pixels = {p.media[0].key for p in heldout}
        assert pixels.isdisjoint(p.media[0].key for p in mine)
    assert embedded.LOCKBOX_SEED != embedded.HELDOUT_SEED


def test_a_second_time_is_refused_from_any_folder(run, tmp_path, record, answers, capsys):
    answers[str(run)] = (set(), {0})
    assert ask(run, "--questions", 8) == 0
    before = record.read_text()
    # Another copy of the same weights, whose folder holds no result.
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    (other / "lockbox.json").unlink()
    answers[str(other)] = (set(), {0})
    capsys.readouterr()
    for path in (run, other):
        answers["asked"].clear()
        assert ask(path, "--questions", 8) == 2
        assert answers["asked"] == [] and record.read_text() == before
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "as tiny, and are asked once" in told and "--again" in told
    # The flag is written down, here and in the folder.
    assert ask(other, "--questions", 8, "--again") == 0
    assert [row["times"] for row in rows.read(record, lockbox.COLUMNS)] == ["1"] * 3 + ["2"] * 3
    assert json.loads((other / "lockbox.json").read_text())["again"] is True
    assert json.loads((run / "lockbox.json").read_text())["again"] is False
    (run / "lockbox.json").unlink()  # other tests share the run


def test_other_weights_are_another_run(run, tmp_path, record, answers):
    other = copy_of(run, tmp_path / "other")
    assert models.find(str(other)).weights != models.find(str(run)).weights
    answers[str(run)] = answers[str(other)] = (set(), set())
    assert ask(run, other, "--questions", 4) == 0
    assert ask(run, run, "--questions", 4, "--again") == 2  # the same weights, named twice
    (run / "lockbox.json").unlink()


def test_the_hash_is_of_tensors_not_of_files(tmp_path):
    import torch
    from safetensors.torch import save_file

    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(1, dtype=torch.bfloat16)
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
    save_file({"a": a, "b": b}, folders[0] / "model.safetensors", {"format": "pt"})
    save_file({"b": b}, folders[1] / "model-2.safetensors")
    save_file({"a": a}, folders[1] / "model-1.safetensors")
    save_file({"a": a.reshape(3, 2), "b": b}, folders[2] / "model.safetensors")
    save_file({"a": a, "b": b.float()}, folders[3] / "model.safetensors")
    hashes = [models.weights_hash(str(folder)) for folder in folders]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_two_seeds_by_hand(run, tmp_path, record, answers, capsys):
    """Eight questions about two pictures; the base is right on all of them, dense. Sparse the first seed is wrong on
    question 0, the second on 0, 1 and 4."""
    first, second = copy_of(run, tmp_path / "a"), copy_of(run, tmp_path / "b", seed=1)
    answers[str(first)], answers[str(second)] = (set(), {0}), ({7}, {0, 1, 4})
    assert ask(first, second, "--questions", 8) == 0
    found = rows.read(record, lockbox.COLUMNS)
    assert [row["task"] for row in found[:3]] == ["digits", "moving_digits", "hard_digits"]
    one = found[0]
    # Lost 1/8; residuals summed by picture are 1/2 and -1/2: V = 2 * 1/2 / 64, error 1/8.
    assert [one[f"sparse_{k}"] for k in ("lost", "error")] == ["12.500", "12.500"]
    assert [one[f"sparse_{k}"] for k in ("low", "high")] == ["-12.000", "37.000"]
    assert one["dense_lost"] == "0.000" and one["kept"] == "25.000" and one["p"] == "0.9"
    assert one["seed"] == "0" and found[3]["seed"] == "1"
    assert one["recipe"] == found[3]["recipe"] != found[3]["recipe_sha256"]
    assert np.array_equal(rows.unpack(found[3]["right_sparse"], 8), [0, 0, 1, 1, 0, 1, 1, 1])
    capsys.readouterr()
    assert ask("--table") == 0
    told = capsys.readouterr().out
    assert "seeds 0 1; 8 questions of each task" in told
    assert max(map(len, told.splitlines())) <= 80


def row_of(seed: int, wrong: set[int], kept: float, **others: str) -> dict[str, str]:
    """Four hundred questions about a hundred pictures, which the base answers all."""
    base = np.ones(400)
    right = np.array([float(i not in wrong) for i in range(400)])
    known = dict.fromkeys(lockbox.COLUMNS, "x") | {
        "run": f"a-{seed}", "seed": str(seed), "weights": f"w{seed}", "task": "digits", "n": "400", "times": "1",
        "kept": str(kept), "share": "0.75", "right_base": rows.pack(base), "right_sparse": rows.pack(right),
        "right_dense": rows.pack(base),
    }  # fmt: skip
    return known | lockbox.lost("sparse", base, right) | others


def test_sums_by_hand():
    """The first seed loses question 0, the second 0, 1 and 4."""
    first, second = row_of(0, {0}, 20.0), row_of(1, {0, 1, 4}, 24.0)
    # Of the first: 1/400; the pictures' residuals are 0.99 and 99 x -0.01: V = 100/99 * 0.99 / 400^2 = (1/400)^2.
    assert [first[f"sparse_{k}"] for k in ("lost", "error")] == ["0.250", "0.250"]
    assert [first[f"sparse_{k}"] for k in ("low", "high")] == ["-0.240", "0.740"]
    other = [row_of(s, set(), 40.0, task="hard_digits", share="0.25") for s in (0, 1)]
    # Asked again: the first time counts.
    again = row_of(0, set(range(300)), 1.0, times="2")
    told = lockbox.summed([first, second, *other, again])
    line = next(line for line in told if line.startswith("digits, sparse"))
    # Seeds: 1/400 and 3/400, s = sqrt(2)/400, over sqrt(2): 0.25 points, t(1) = 12.706. Questions: of the mean losses
    # 1, 1/2 and, at the next picture, 1/2 the pictures' residuals are 1.48, 0.48 and 98 x -0.02, squares 2.46:
    # V = 100/99 * 2.46 / 400^2, 0.394 points. Half: sqrt((12.706 * 0.25)^2 + (1.96 * 0.394)^2) = 3.269.
    assert line.split(maxsplit=7)[2:] == [
        "22.0%",
        "±",
        "2.0",
        "0.50",
        "0.25",
        "0.39  [-2.77, 3.77]",
    ]
    # 0.75 x 20 + 0.25 x 40 and 0.75 x 24 + 0.25 x 40.
    assert told[-1].split()[4:] == ["26.5%", "±", "1.5"]
    assert "seeds 0 1; 400 questions of each task" in told[4]
    assert max(map(len, told)) <= 80
    with pytest.raises(InputError, match="were asked other questions about digits"):
        lockbox.summed([first, second | {"questions": "y"}])


def test_lines_are_of_a_terminal(run, tmp_path, record, answers, capsys):
    answers[str(run)] = (set(range(5)), set(range(8)))
    assert ask(run, "--questions", 8) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "tiny: seed 0, top_p at 0.9, weights" in told and "asked once" in told
    assert re_line(told, "digits") == ["8", "100.0%", "25.0%", "100.00"]
    (run / "lockbox.json").unlink()


def re_line(told: str, task: str) -> list[str]:
    return next(line for line in told.splitlines() if line.startswith(f"{task} ")).split()[1:5]


def test_no_training(record, answers, capsys):
    answers["tiny"] = (set(), {0, 4})
    assert ask("tiny", "--rule", "top_k", "--p", 0.2, "--questions", 8) == 0
    (row, *_) = rows.read(record, lockbox.COLUMNS)
    assert (row["rule"], row["p"], row["skip"]) == ("top_k", "0.2", "attention")
    assert (row["sparse_lost"], row["dense_lost"], row["base"]) == ("25.000", "0.000", "tiny")
    assert answers["asked"] == ["tiny"]  # dense it is its own base
    assert "no training, top_k at 0.2" in capsys.readouterr().out
    assert ask("tiny", "--rule", "top_k", "--p", 0.2, "--questions", 8) == 2
    assert ask("tiny", "--rule", "top_k", "--p", 0.3, "--questions", 8) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a run to ask"),
        (["--table", "runs/x"], "name a run to ask"),
        (["tiny"], "`tiny` needs both"),
        (["tiny", "--rule", "top_p"], "`tiny` needs both"),
        (["runs/x", "--rule", "top_p", "--p", "0.5"], "--rule and --p belong to `tiny`"),
        (["tiny", "--rule", "top_p", "--p", "1.5"], "--p: got 1.5; more than 0 and at most 1"),
        (["runs/x", "--questions", "0"], "--questions: got 0; 4 or more are allowed"),
        (["./nothing"], "does not exist"),
    ],
)
def test_what_cannot_be_asked_is_told(arguments, told, record, answers, capsys):
    assert ask(*arguments) == 2
    assert told in capsys.readouterr().err and not record.exists()


def test_an_unfinished_run_is_refused(run, tmp_path, record, answers, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    (other / "summary.json").unlink()
    assert ask(other) == 2
    assert "this run was stopped before its end; finish it first" in capsys.readouterr().err


def test_a_record_that_was_changed_is_told(record, answers, capsys):
    record.parent.mkdir()
    record.write_text("date,run\n2026-01-01,x\n")
    assert ask("--table") == 2
    assert "has the columns date,run" in capsys.readouterr().err
    record.write_text(",".join(lockbox.COLUMNS) + "\n1,2\n")
    assert ask("--table") == 2
    assert "2 cells in a row of 30" in capsys.readouterr().err


def test_real_answers(run, record):
    """Four questions a task, asked in earnest: what is packed is what the model says."""
    assert ask(run, "--questions", 4) == 0
    found = rows.read(record, lockbox.COLUMNS)
    subject = models.find(str(run))
    prompts = embedded.draw("test", "digits", 4, embedded.LOCKBOX_SEED)
    sparse, dense = models.ask(str(run), subject.recipe, prompts, [subject.sparse, None])
    assert np.array_equal(rows.unpack(found[0]["right_sparse"], 4), sparse.correct)
    assert np.array_equal(rows.unpack(found[0]["right_dense"], 4), dense.correct)
    assert found[0]["kept"] == f"{100 * sparse.token_ratio.mean():.3f}"
    (run / "lockbox.json").unlink()
