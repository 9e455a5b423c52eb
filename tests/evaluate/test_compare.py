"""Two folders side by side: numbers worked out by hand, paired where the questions are the same."""

import json
import re

import numpy as np
import pytest

from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe, Sparse
from zipr1.evaluate import compare, compared
from zipr1.evaluate.units import Units, matched, question_name

NAME = "<b>which</b> [red]one[/red]?"


def run(root, right, ratio, said="red", first=10.0, metrics=True, ids=None):
    """A finished run with held-out questions of one task, two to a picture."""
    root.mkdir()
    count = len(right)
    (root / "recipe.yaml").write_text(Recipe(sparse=Sparse(p=0.9)).dump())
    after = {
        "ids": ids or [f"q{i}" for i in range(count)], "correct": right, "layer_ratios": [[ratio, ratio]] * count,
        "said": [said] * count, "heldout": 1.0, "picture": [f"p{i // 2}" for i in range(count)],
        "task": ["digits"] * count, "question": [NAME] * count, "answer": ["red"] * count, "first_token_ms": first,
        "kv_bytes": 4096.0 * ratio, "kept": {},
    }  # fmt: skip
    (root / "after.json").write_text(json.dumps({"after": after}))
    if metrics:
        lines = [{"step": i, "token_ratio": ratio, "accuracy": 0.5} for i in range(3)]
        (root / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return root


def evaluation(root, scores, weight=None, names=None, p=(1.0, 0.9)):
    """An evaluation of one benchmark. scores: by p, of each question in [0, 1]."""
    (root / "benchmarks").mkdir(parents=True)
    (root / "eval.json").write_text("{}")
    count = len(next(iter(scores.values())))
    weight = weight or [100.0 / count] * count
    names = names or [f"q{i}" for i in range(count)]
    rows = [
        {"task": "digits", "p": value, "n": count, "top": 100.0, "sparse": float(np.dot(scores[value], weight)),
         "token_ratio": value / 2, "kv_bytes": 1024.0, "first_token_ms": 5.0}
        for value in p
    ]  # fmt: skip
    samples = [
        {"name": names[i], "question": NAME, "target": "red", "said": {f"{v:g}": "x" for v in p},
         "right": {f"{v:g}": scores[v][i] for v in p}}
        for i in range(count)
    ]  # fmt: skip
    units = {
        "name": names,
        "weight": weight,
        "cluster": names,
        "score": {f"{v:g}": scores[v] for v in p},
    }
    record = {"task": "digits", "rows": rows, "samples": samples, "units": units}
    (root / "benchmarks" / "digits.json").write_text(json.dumps(record))
    (root / "results.json").write_text(json.dumps({"rows": rows}))
    return root


def both(a, b):
    one, other = compare.read(a), compare.read(b)
    return one, other, compare.compare(one, other)


def test_two_runs_are_paired_question_by_question(tmp_path):
    """Differences 1, 1, 0, -1 of weight 25 in two pictures: 25 points. About the mean 6.25 the pictures' sums are 37.5
    and -37.5, so V = 2 * 2 * 37.5^2 and half the interval 1.96 * 75, cut at the range of scores."""
    a, b, pairs = both(
        run(tmp_path / "a", [0, 0, 1, 1], 0.5), run(tmp_path / "b", [1, 1, 1, 0], 0.25, first=8.0)
    )
    (pair,) = pairs
    assert (pair.gap, pair.interval, pair.paired) == (25.0, [-100, 100], 4)
    told = compared.as_json(a, b, pairs)
    (row,) = told["rows"]
    assert (row["a"]["score"], row["b"]["score"], row["difference"]) == (50.0, 75.0, 25.0)
    assert (row["a_alone"], row["b_alone"]) == (1, 2) and row["speedup"] == 1.25  # 10 ms over 8
    page = compared.page(a, b, pairs)
    assert "<h1>50.0% → 25.0% of the tokens, +25.00 points</h1>" in page
    assert "Right in A, wrong in B: 1" in page and "Right in B, wrong in A: 2" in page
    assert (
        page.index("Right in A")
        < page.index("Right in B")
        < page.index("Scores")
        < page.index("Curves")
    )
    assert (
        "1.25x faster than A" in page
        and page.count("<svg") == 2
        and "<b>which" not in page
        and "<script" not in page
    )
    cells = re.findall(r">([^<>]*)</td>", page)
    assert cells == [
        "digits",
        "0.9",
        "50.00",
        "75.00",
        "+25.00 ± 125.00",
        "50.0%",
        "25.0%",
        "4",
        "1.25x",
    ]


def test_evaluations_at_every_p_that_both_have(tmp_path):
    few = {1.0: [1, 1, 1, 1], 0.9: [1, 0, 1, 1], 0.8: [0, 0, 0, 1]}
    more = {1.0: [1, 1, 1, 1], 0.9: [1, 1, 1, 1]}
    one = evaluation(tmp_path / "a", few, p=(1.0, 0.9, 0.8))
    a, b, pairs = both(one, evaluation(tmp_path / "b", more))
    assert [(p.a.p, p.b.p, p.gap, p.paired) for p in pairs] == [(0.9, 0.9, 25.0, 4)]
    assert compared.page(a, b, pairs).count("<svg") == 1  # one side was swept
    other = evaluation(tmp_path / "c", {1.0: [1, 1, 1, 1], 0.7: [1, 1, 1, 0]}, p=(1.0, 0.7))
    _, _, pairs = both(one, other)
    assert [(p.a.p, p.b.p) for p in pairs] == [(0.9, 0.7)]  # none in common: each its own highest


def test_questions_in_common_are_paired_and_no_others(tmp_path):
    """Of q0 to q3 and q2 to q5 two are in common: 1 and 0 against 1 and 1 is half of a hundred points."""
    a = evaluation(tmp_path / "a", {1.0: [1] * 4, 0.9: [1, 1, 1, 0]})
    b = evaluation(
        tmp_path / "b", {1.0: [1] * 4, 0.9: [1, 1, 0, 0]}, names=["q2", "q3", "q4", "q5"]
    )
    _, _, (pair,) = both(a, b)
    assert (pair.gap, pair.paired) == (50.0, 2)
    apart = evaluation(tmp_path / "c", {1.0: [1] * 4, 0.9: [1, 0, 0, 0]}, names=list("wxyz"))
    one, other, pairs = both(a, apart)
    assert (pairs[0].gap, pairs[0].interval, pairs[0].paired) == (-50.0, None, 0)
    page = compared.page(one, other, pairs)
    assert "not paired: other questions" in page and "none of 4, 4" in page


def test_weights_that_differ_are_paired_whole_or_not_at_all():
    def units(names, weight):
        return Units(np.ones(len(names)), np.array(weight), list(names), list(names))

    even, uneven = units("ab", [50.0, 50.0]), units("ab", [75.0, 25.0])
    assert matched(uneven, units("ab", [75.0, 25.0])) is not None
    assert matched(uneven, units("abc", [50.0, 25.0, 25.0])) is None
    cut, _ = matched(even, units("bc", [50.0, 50.0]))
    assert (cut.name, cut.weight.tolist()) == (["b"], [100.0])
    assert matched(units("aab", [1.0] * 3), units("ab", [1.0] * 2)) is None  # which a is it?
    assert matched(even, Units(None, np.ones(2), list("ab"), list("ab"))) is None
    assert question_name(1, "a", "b") != question_name(1, "a", "c")


def test_means_count_benchmarks_alike():
    """Half intervals 3 and 4 of two benchmarks: sqrt(9 + 16) / 2; gaps 1 of 100 and 20 of 1000 are 1 and 2 points."""
    line = compare.Line(0.9, 4, 1.0, 100.0, 0.5, None, None, None, {})
    big = compare.Line(0.9, 4, 1.0, 1000.0, 0.5, None, None, None, {})
    pairs = [
        compare.Pair("a", line, line, 1.0, [-2.0, 4.0], 4),
        compare.Pair("b", big, big, 20.0, [-20.0, 60.0], 4),
    ]
    assert compare.mean_gap(pairs) == (1.5, 2.5)
    pairs[0].interval = None
    assert compare.mean_gap(pairs) == (1.5, None)


def test_wrong_folders_are_one_line(tmp_path):
    a, e = run(tmp_path / "a", [0, 1], 0.5), evaluation(tmp_path / "e", {1.0: [1], 0.9: [1]})
    with pytest.raises(InputError, match="neither a run nor an evaluation"):
        compare.read(tmp_path)
    with pytest.raises(InputError, match="give two of the same kind"):
        both(a, e)
    (a / "after.json").unlink()
    with pytest.raises(InputError, match="its training has not ended"):
        compare.read(a)
    (e / "benchmarks" / "digits.json").write_text('{"rows": [{"p": 1}]}')
    with pytest.raises(InputError, match="not written by this version of zipr1"):
        compare.read(e)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rows", 0, "sparse"), "x"),
        (("rows", 0, "top"), 0),
        (("rows", 0, "token_ratio"), None),
        (("rows", 0, "kv_bytes"), 10**30),
        (("samples", 0, "right", "0.9"), "x"),
        (("units", "cluster"), ["q0"]),
    ],
)
def test_an_edited_benchmark_is_one_line(tmp_path, place, value):
    e = evaluation(tmp_path / "e", {1.0: [1, 0], 0.9: [1, 0]})
    path = e / "benchmarks" / "digits.json"
    values = json.loads(path.read_text())
    part = values
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"not written by this version.*digits\.json: ") as told:
        compare.read(e)
    assert str(place[-1]).rpartition(".")[2] in str(told.value) or place[0] == "units"


def test_an_edited_run_is_one_line(tmp_path):
    a = run(tmp_path / "a", [0, "x"], 0.5)
    with pytest.raises(InputError, match=r"after\.json: after\.correct\.1: got 'x'; a number is"):
        compare.read(a)
    b = run(tmp_path / "b", [0, 1], 0.5)
    rows = [{"step": step, "token_ratio": 0.5, "accuracy": 0.5} for step in ("x", None, 10**400)]
    (b / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<svg" in compared.page(*both(b, b))


def test_the_command(tmp_path, monkeypatch, capsys):
    from zipr1.cli import main

    a, b = run(tmp_path / "a", [0, 1], 0.5), run(tmp_path / "b", [1, 1], 0.25)
    arguments = ["zipr1", "compare", str(a), str(b), "-o", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert not end.value.code and "report: " in printed.err
    assert json.loads(printed.out) == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
