"""`zipr1 eval` on the embedded benchmarks: exactness of answers, the folder, resuming, several processes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tinyruns
import torch
from PIL import Image
from rich.console import Console

pytest.importorskip("lmms_eval")

import zipr1
from zipr1.cli.log import console_of
from zipr1.core import activity
from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Model
from zipr1.data.digits.tasks import prompts
from zipr1.data.embedded import HELDOUT_SEED, draw
from zipr1.evaluate import session
from zipr1.evaluate.answers import BASE, DIFFERING, UNTRAINED, Answerer, Conditions, cut
from zipr1.evaluate.session import EvalRequest
from zipr1.evaluate.suites import LMMS_EVAL, SUITES
from zipr1.evaluate.units import Units, paired
from zipr1.models.manifest import TINY
from zipr1.models.open import resolve
from zipr1.models.policy import load_policy

QUIET = Console(file=io.StringIO())
CONDITIONS = Conditions(max_new_tokens=6, frames=16, fps=None)


@pytest.fixture(scope="module")
def policy():
    return load_policy(Model())


@pytest.fixture(scope="module")
def questions():
    return [
        p for task in ("digits", "moving_digits") for p in prompts("test", task, 2, 4, HELDOUT_SEED)
    ]


def texts(answered, variant):
    return [a.answers[variant].text for a in answered]


def ask(policy, questions, p_values, batch=16, shown=0):
    asked = [lambda p=p: p for p in questions]
    return Answerer(policy, TINY, p_values, batch, shown).answer(asked, CONDITIONS)


def test_dense_budget_is_transformers_own_generate(policy, questions):
    """Sample by sample, against the stock class that knows nothing of zipr1."""
    from transformers import AutoModelForImageTextToText

    from zipr1.data.media import load_media

    stock = AutoModelForImageTextToText.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
    said = texts(ask(policy, questions, [1.0, 0.9]), 0)
    assert len(set(said)) > 5
    for prompt, ours in zip(questions, said, strict=True):
        encoded = policy.encode(prompt, [load_media(m, 16) for m in prompt.media], 4096)
        visual = encoded.visuals[0]
        image = visual.kind == "image"
        ids = encoded.ids[None]
        types = (ids == policy.processor.placeholder[visual.kind]).int() * (1 if image else 2)
        media = {
            ("pixel_values" if image else "pixel_values_videos"): visual.patches,
            ("image_grid_thw" if image else "video_grid_thw"): torch.tensor([visual.grid]),
        }
        if not image:
            media["second_per_grid_ts"] = torch.tensor([visual.seconds])
        with torch.no_grad():
            out = stock.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **media,
                max_new_tokens=6, do_sample=False, eos_token_id=policy.processor.end_ids,
                pad_token_id=policy.processor.end_id,
            )  # fmt: skip
        assert policy.processor.decode(out[0, ids.shape[1] :]) == ours, prompt.id


def test_batches_and_shared_passes_change_nothing(policy, questions):
    """Batch 4 answers as batch 1; three budgets in one pass as three passes; each picture is seen once."""
    p_values = [1.0, 0.975, 0.9]
    before = policy.vision_calls
    together = ask(policy, questions, p_values, batch=4)
    assert policy.vision_calls - before == 4  # pictures: 2 images and 2 clips, 4 questions each
    alone = ask(policy, questions, p_values, batch=1)
    for variant, p in enumerate(p_values):
        assert texts(together, variant) == texts(alone, variant)
        single = ask(policy, questions, [p], batch=4)
        assert texts(single, 0) == texts(together, variant)
        ratios = [a.answers[variant].layer_ratios for a in together]
        assert [a.answers[0].layer_ratios for a in single] == ratios
        assert [a.answers[variant].layer_ratios for a in alone] == ratios
        assert (np.mean(ratios) < 1) == (p < 1)


def test_bytes_are_those_of_the_cache(policy, questions):
    from zipr1.data.media import load_media
    from zipr1.models.sparse.request import Request

    answered = ask(policy, questions[:2], [1.0, 0.9])
    for prompt, one in zip(questions[:2], answered, strict=True):
        encoded = policy.encode(prompt, [load_media(m, 16) for m in prompt.media], 4096)
        features = policy.encode_vision([encoded])
        for p, answer in zip((None, 0.9), one.answers, strict=True):
            request = None if p is None else Request(TINY.model_copy(update={"p": p}))
            kept = policy.generate([encoded], features, request, 1)
            assert answer.kv_bytes == kept.kv_bytes  # of one row: no padding


def test_pictures_are_drawn_of_different_questions_and_where_answers_differ(policy, questions):
    answered = ask(policy, questions, [1.0, 0.3], shown=3)
    assert [i for i, a in enumerate(answered) if a.first] == [0, 4, 8]
    differ = [
        i for i, a in enumerate(answered) if a.answers[0].text != a.answers[1].text and not a.first
    ]
    assert len(differ) > 2 and len(questions) > len(differ) + 3  # of both sorts there are some
    drawn = [i for i, a in enumerate(answered) if a.pictures and not a.first]
    assert drawn == differ[:DIFFERING]
    assert all(set(a.pictures) == {"plain", "0.3"} for a in answered if a.pictures)
    assert not any(a.pictures for a in ask(policy, questions, [1.0, 0.3], shown=0))
    assert not any(a.pictures for a in ask(policy, questions, [1.0], shown=3))


def test_the_base_answers_dense_and_at_the_highest_p(policy, questions):
    """A base of the same weights says and keeps what the model itself does; its pictures are drawn beside."""
    answerer = Answerer(policy, TINY, [1.0, 0.9, 0.5], base=policy, shown=1)
    assert [v.name for v in answerer.variants] == ["1", "0.9", "0.5", BASE, UNTRAINED]
    one = answerer.answer([lambda: questions[0]], CONDITIONS)[0]
    dense, sparse, _, base, untrained = one.answers
    assert (base.text, base.kv_bytes) == (dense.text, dense.kv_bytes)
    assert untrained.layer_ratios == sparse.layer_ratios and untrained.token_ratio < 1
    assert set(one.pictures) == {"plain", "0.9", UNTRAINED}
    assert one.pictures["0.9"] == one.pictures[UNTRAINED] != one.pictures["plain"]
    assert all(0 < a.prefill_seconds < a.seconds for a in one.answers)


def test_progress_is_seen_while_lmms_eval_is_silenced(policy, questions):
    """Before the first batch and after each; and on the terminal, although what lmms-eval prints is swallowed."""
    done = []
    asked = [lambda p=p: p for p in questions]
    Answerer(policy, TINY, [1.0], 4, 0).answer(asked, CONDITIONS, done.append)
    assert done == [0, 4, 8, 12, 16]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    with (
        contextlib.redirect_stdout(terminal),
        activity.shown(console_of(False)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        activity.tell("digits: question", 12, 16)
        end = time.monotonic() + 20  # the line draws itself ten times a second
        while "question 12 of 16" not in terminal.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        seen = terminal.getvalue()
    assert "question 12 of 16" in seen


@pytest.mark.parametrize("p", [0.0, -1.0, 1.5])
def test_budgets_outside_the_range_are_refused(policy, p):
    with pytest.raises(InputError, match="outside"):
        Answerer(policy, TINY, [p])


def test_stops():
    assert (
        cut("red\n\nand more", ["\n\n"]) == "red\n\nand more"
    )  # lmms-eval's implicit stop is ignored
    assert cut("red ASSISTANT: blue", ["ASSISTANT:", "X"]) == "red"


def test_paired_difference_by_hand():
    """Four units of weight 25 in clusters of two: differences 25, 0, -25, -25, so the total is -25; the mean is
    -6.25, cluster sums about it 37.5 and -37.5, V = 2 * 2 * 37.5^2."""
    weight, names = np.full(4, 25.0), list("abcd")
    a = Units(np.array([1.0, 1, 0, 0]), weight, [0, 0, 1, 1], names)
    b = Units(np.array([0.0, 1, 1, 1]), weight, [0, 0, 1, 1], names)
    total, interval = paired(a, b, 1000)
    assert total == -25
    assert interval == pytest.approx([-25 - 1.959963984540054 * 75, -25 + 1.959963984540054 * 75])
    assert paired(a, b, 100)[1] == [-100, 100]  # never outside the range
    same = paired(a, a, 100)
    assert same[0] == 0 and same[1][1] == pytest.approx(100 * 1.96**2 / (4 + 1.96**2), rel=1e-3)
    # Units that weigh 3 and 1 count as (3 + 1)^2 / (9 + 1) = 1.6 equal ones.
    uneven = Units(np.ones(2), np.array([75.0, 25.0]), [0, 1], ["a", "b"])
    assert paired(uneven, uneven, 100)[1][1] == pytest.approx(
        100 * 1.96**2 / (1.6 + 1.96**2), rel=1e-3
    )


def request_for(tmp, **more):
    values = {
        "tasks": ["digits", "moving_digits"],
        "p_values": [1.0, 0.975, 0.94],
        "limit": 8,
    } | more
    return EvalRequest("tiny", output=tmp, **values)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation in which one benchmark has no data: its folder, what was printed, and the error."""
    folder = tmp_path_factory.mktemp("evaluated") / "eval"
    out = io.StringIO()
    with pytest.raises(RunError) as error:
        session.run(
            request_for(folder, tasks=["digits", "mmstar", "moving_digits"]),
            ["zipr1", "eval"],
            Console(file=out, width=140),
        )
    return folder, out.getvalue(), str(error.value)


def test_one_missing_benchmark_does_not_lose_the_others(evaluated):
    folder, printed, error = evaluated
    assert "1 of 3 benchmarks have no result (mmstar)" in error
    results = json.loads((folder / "results.json").read_text())
    assert [(row["task"], row["p"]) for row in results["rows"]] == [
        (task, p) for task in ("digits", "moving_digits") for p in (1.0, 0.975, 0.94)
    ]
    assert [e["task"] for e in results["errors"]] == ["mmstar"]
    assert "hf download --repo-type dataset Lin-Chen/MMStar" in results["errors"][0]["error"]
    assert "hf download" in printed


def test_printed_numbers_are_those_of_the_file(evaluated):
    folder, printed, _ = evaluated
    results = json.loads((folder / "results.json").read_text())
    lines = [line for line in printed.splitlines() if re.search(r"\d%", line)]
    assert len(lines) == len(results["rows"]) + len(results["averages"])
    for row, line in zip(results["rows"], lines, strict=False):
        words = line.split()
        assert f"{row['p']:g}" in words and f"{row['sparse']:.2f}" in words
        assert f"{row['token_ratio']:.1%}" in words and f"{row['difference']:+.2f}" in words
        assert {"task", "metric", "dense", "sparse", "difference", "difference_ci", "token_ratio", "kv_bytes",
                "seconds", "p", "n"} <= set(row)  # fmt: skip
        assert row["difference"] == pytest.approx(row["sparse"] - row["dense"])
    dense = [row for row in results["rows"] if row["p"] == 1]
    assert all(
        r["difference"] == 0 and r["same_answers"] == 1 and r["token_ratio"] == 1 for r in dense
    )
    # Of dense and itself nothing is uncertain, however few the questions; of eight others much is.
    assert all(r["difference_ci"] == [0, 0] for r in dense)
    assert all(r["difference_ci"][1] > 5 for r in results["rows"] if r["p"] < 1)


def test_report_files(evaluated):
    folder, _, _ = evaluated
    results = json.loads((folder / "results.json").read_text())
    page = (folder / "report.html").read_text()
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    # Plain and kept, of the first pictures of two benchmarks and of at most three examples of each sort.
    assert page.index("What is kept") < page.index("Scores") < page.index("Score over tokens kept")
    assert page.count("<img") >= 2 * 2 * 2 and page.count("<img") % 2 == 0
    text = (folder / "report.md").read_text()
    for row in results["rows"]:
        assert f"{row['token_ratio']:.1%}" in text and f"{row['token_ratio']:.1%}" in page
    assert "hf download" in text and "hf download" in page
    # Two benchmarks are two rows of scores over tokens and time, and a row of layers: 4.6 x 3 inches at 130 dots each.
    for name, height in (("pareto.png", 780), ("layers.png", 390)):
        with Image.open(folder / name) as figure:
            assert figure.size == (1196, height)
            assert (31, 119, 180) in set(figure.convert("RGB").getdata())  # a line was drawn


def test_samples_are_kept(evaluated):
    """Every question's answers lie in the benchmark's file, dense ones equal to those of transformers above."""
    folder, _, _ = evaluated
    samples = json.loads((folder / "benchmarks/digits.json").read_text())["samples"]
    questions = prompts("test", "digits", 2, 4, HELDOUT_SEED)
    assert [s["target"] for s in samples] == [p.answer for p in questions]
    assert all(set(s["said"]) == {"1", "0.975", "0.94"} for s in samples)


def test_a_rerun_measures_only_what_is_missing(evaluated, monkeypatch):
    folder, _, _ = evaluated
    before = (folder / "benchmarks/digits.json").stat().st_mtime_ns
    rows = json.loads((folder / "results.json").read_text())["rows"]
    from zipr1.evaluate import harness

    measured = []
    monkeypatch.setattr(harness, "measure", lambda suite, *a: measured.append(suite.name) or 1 / 0)
    result = session.run(request_for(folder), [], QUIET)
    assert measured == [] and result["rows"] == rows
    assert (folder / "benchmarks/digits.json").stat().st_mtime_ns == before


def test_results_name_the_installed_lmms_eval(evaluated, tmp_path, monkeypatch):
    """That of each measurement: a benchmark that was finished under another version keeps its own."""
    folder, printed, _ = evaluated
    tested = importlib.metadata.version("lmms-eval")
    assert json.loads((folder / "results.json").read_text())["lmms_eval"] == tested == LMMS_EVAL
    assert "is installed" not in printed
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "benchmarks/digits.json").unlink()
    real, out = importlib.metadata.version, io.StringIO()
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.9.1" if name == "lmms-eval" else real(name)
    )
    result = session.run(request_for(copy), [], Console(file=out, width=200))
    line = f"lmms-eval 0.9.1 is installed; benchmarks and scores were tested with {LMMS_EVAL}\n"
    assert out.getvalue().count(line) == 1
    assert result["lmms_eval"] == f"0.9.1, {tested}"  # digits, and moving_digits from before
    assert f"lmms-eval 0.9.1, {tested}" in (copy / "report.html").read_text()
    assert f"lmms-eval 0.9.1, {tested}" in (copy / "report.md").read_text()


def test_a_failure_is_printed_as_it_is(tmp_path, monkeypatch):
    """Brackets are the terminal's markup, and part of many a message."""
    from zipr1.evaluate import harness

    def fail(*arguments):
        raise RunError("digits: no split\n[/data] of ['test']")

    monkeypatch.setattr(harness, "measure", fail)
    out = io.StringIO()
    with pytest.raises(RunError, match="1 of 1 benchmarks have no result"):
        session.run(request_for(tmp_path / "x [a]", tasks=["digits"]), [], Console(file=out))
    assert "failed: digits: no split [/data] of ['test']\n" in out.getvalue()
    assert "x [a]\n" in out.getvalue()


def test_a_folder_of_something_else_is_left_alone(evaluated, tmp_path):
    folder, _, _ = evaluated
    with pytest.raises(InputError, match="limit differ; limit was 8 and is 4"):
        session.run(request_for(folder, limit=4), [], QUIET)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no evaluation"):
        session.run(request_for(tmp_path), [], QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tasks": ["mmbnch"]}, "did you mean mmbench"),
        ({"p_values": [1.2]}, "outside"),
        ({"changes": ["train.steps=3"]}, "not read by zipr1 eval"),
        ({"changes": ["sparse.p=0.5"]}, "use --budget"),
        ({"changes": ["sparse.skp=layer"]}, "did you mean sparse.skip"),
        ({"data_root": Path("/nowhere")}, "no such folder"),
        ({"data_root": Path("."), "tasks": ["mme", "ai2d"]}, "not read for ai2d; it serves mme, "),
    ],
)
def test_wrong_input_is_one_line(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        session.run(request_for(tmp_path / "x", **more), [], QUIET)
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def folder_evaluated(exported, tmp_path_factory):
    """An exported folder, moved to where its run's own base is not: what came out, and the folder."""
    root = tmp_path_factory.mktemp("moved")
    folder = shutil.copytree(exported, root / "model")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("path: tiny", "path: runs/of-elsewhere"))
    asked = request_for(root / "eval", p_values=[0.9, 0.4], limit=6)
    return session.run(replace(asked, model=str(folder)), [], QUIET), root


def test_the_base_of_an_exported_folder_is_measured(folder_evaluated):
    results, root = folder_evaluated
    assert (
        results["base"] == "tiny" and "path: tiny" not in (root / "model/recipe.yaml").read_text()
    )
    for task in ("digits", "moving_digits"):
        asked = prompts("test", task, 2, 4, HELDOUT_SEED)[:6]
        said = texts(ask(load_policy(Model()), asked, [1.0]), 0)
        samples = json.loads((root / f"eval/benchmarks/{task}.json").read_text())["samples"]
        assert [s["said"]["base"] for s in samples] == said


@pytest.mark.parametrize("task", ["digits", "moving_digits"])
def test_the_python_api_answers_as_the_evaluation(folder_evaluated, task):
    """zipr1.load and zipr1.sparse, with transformers' own generate: the same words from the same share of tokens."""
    _, root = folder_evaluated
    samples = json.loads((root / f"eval/benchmarks/{task}.json").read_text())["samples"]
    chats = [tinyruns.chat(p) for p in prompts("test", task, 2, 4, HELDOUT_SEED)[:6]]

    def same(model, processor, p):
        suite = SUITES[task]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, max_frames=suite.frames, fps=suite.fps
        )
        out = model.generate(**inputs, max_new_tokens=suite.max_new_tokens, do_sample=False)
        words = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert [w.strip() for w in words] == [s["said"][f"{p:g}"] for s in samples]
        stats = zipr1.stats(model)
        shares = (stats.kept / stats.lengths[:, None]).mean(1)
        assert shares.tolist() == pytest.approx([s["token_ratio"][f"{p:g}"] for s in samples])

    for p in (0.9, 0.4):
        same(*zipr1.load(root / "model", budget=p, device="cpu"), p)
    dense, processor = zipr1.load(root / "model", budget=1.0, device="cpu")
    for p in (0.9, 0.4):
        with zipr1.sparse(dense, budget=p):
            same(dense, processor, p)
    said = [tuple(s["said"][name] for name in ("1", "0.9", "0.4")) for s in samples]
    assert any(len(set(words)) > 1 for words in said)  # the budget matters here


def test_pages_are_asked_through_lmms_eval(tmp_path, policy):
    """The held-out questions of the second family, in the same words and with the same pictures and clips."""
    names = ["pages", "page_clips", "page_totals"]
    asked = request_for(tmp_path / "eval", tasks=names, p_values=[1.0], limit=3, base=False)
    session.run(asked, [], QUIET)
    for task in names:
        direct = draw("test", task, 3, HELDOUT_SEED)
        said = texts(ask(policy, direct, [1.0]), 0)
        path = tmp_path / "eval" / "benchmarks" / f"{task}.json"
        samples = json.loads(path.read_text())["samples"]
        assert [s["said"]["1"] for s in samples] == said


def test_lmms_eval_finds_the_model():
    from lmms_eval.models import get_model

    from zipr1.evaluate.adapter import Adapter

    assert get_model("zipr1") is Adapter


LIMIT = 30  # two batches for one process, one for each of two
COMMAND = f"eval --model tiny --tasks digits,moving_digits --budget 0.975 --limit {LIMIT}".split()


def start(folder, *launcher):
    call = [*(launcher or [sys.executable, "-m", "zipr1"]), *COMMAND, "--output", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of COMMAND, run by one process to its end."""
    folder = tmp_path_factory.mktemp("whole") / "one"
    session.run(request_for(folder, p_values=[0.975], limit=LIMIT), [], QUIET)
    return folder


def measured(folder):
    """What does not depend on the clock: rows, and every answer."""
    timed = ("seconds", "dense_seconds", "speedup", "first_token_ms", "dense_first_token_ms")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    samples = [
        json.loads((folder / f"benchmarks/{name}.json").read_text())["samples"]
        for name in ("digits", "moving_digits")
    ]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows], samples


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(tmp_path, whole):
    """SIGINT and SIGKILL while the second benchmark is measured: the first is kept, and the end is the same."""
    folders = {number: tmp_path / str(number.value) for number in (signal.SIGINT, signal.SIGKILL)}
    running = {number: start(folder) for number, folder in folders.items()}
    waiting = dict(running)
    while waiting:
        for number, one in list(waiting.items()):
            if (folders[number] / "benchmarks/digits.json").exists() or one.poll() is not None:
                one.send_signal(number)
                del waiting[number]
        time.sleep(0.01)
    for number, folder in folders.items():
        said, _ = running[number].communicate(timeout=120)
        assert running[number].returncode == (130 if number == signal.SIGINT else -9), said
        assert not (folder / "results.json").exists()
        if number == signal.SIGINT:
            assert "finished benchmarks are kept" in said and "Traceback" not in said
        first, out = folder / "benchmarks/digits.json", io.StringIO()
        stamp = first.stat().st_mtime_ns
        session.run(request_for(folder, p_values=[0.975], limit=LIMIT), [], Console(file=out))
        assert "digits: finished before" in out.getvalue() and first.stat().st_mtime_ns == stamp
        assert measured(folder) == measured(whole)


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path, whole):
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "zipr1"]
    two = start(tmp_path / "two", sys.executable, "-m", *launcher)
    said, _ = two.communicate(timeout=300)
    assert two.returncode == 0, said
    assert measured(tmp_path / "two") == measured(whole)
    assert len(measured(whole)[0]) == 2
