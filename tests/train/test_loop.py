"""Whole runs on a tiny random model: files, resume after SIGKILL, repeatability, what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tinymodels
import torch
from rich.console import Console
from safetensors.torch import load_file
from tinyruns import start, steps, write

from zipr1.core import activity, checksums, distributed, signals
from zipr1.core.errors import InputError, RunError
from zipr1.core.load import load
from zipr1.core.recipe import Efficiency, Recipe
from zipr1.train import loggers, loop
from zipr1.train.dry_run import dry_run

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


def test_a_run_leaves_what_the_contract_names(tmp_path, model):
    out = tmp_path / "run"
    summary = start(write(tmp_path / "r.yaml", model), out)
    names = {p.name for p in out.iterdir()}
    wanted = (
        "recipe.yaml run.json metrics.jsonl rollouts.jsonl summary.json checkpoints last curves.png "
        "before.json after.json report.html"
    )
    assert set(wanted.split()) <= names
    assert {"kept-digits.png", "kept-moving_digits.png", "kept-hard_digits.png"} <= names
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for block in (summary, *summary["by_task"].values()):
        for moment in ("before", "after"):
            assert set(block[moment]) >= {"accuracy", "accuracy_ci", "token_ratio", "n"}
        assert {"dense_accuracy", "dense_accuracy_ci", "difference_ci"} <= set(block)
    assert summary["rollouts"] == 3 * 3 * 3 and summary["steps"] == 3 and summary["p"] == 0.975
    assert summary["recipe_sha256"] == load(out / "recipe.yaml").sha256()
    assert [row["step"] for row in steps(out)] == [0, 1, 2]
    row = steps(out)[0]
    assert len(row["token_ratio_by_budget"]) == 3 and len(row["token_ratio_by_layer"]) == 3
    shown = "reward rewards reward_std gate token_ratio kl clip_fraction lr efficiency_weight guard allowed"
    assert {*shown.split(), "heldout_mass", "accuracy", "dense_accuracy"} <= set(row)
    rollout = json.loads((out / "rollouts.jsonl").read_text().splitlines()[0])
    assert set(rollout) >= {"step", "question", "answer", "budgets", "texts", "rewards", "kept"}
    assert len(rollout["texts"]) == len(rollout["budgets"]) == 3
    assert (
        not list(out.rglob("*.bin"))
        and not list(out.rglob("*.pt"))
        and not list(out.rglob("*.pkl"))
    )


def test_the_same_seed_gives_the_same_numbers(tmp_path, model):
    drawn = {"sampling": "independent"}
    recipe = write(tmp_path / "r.yaml", model, efficiency={"method": "cut+pathwise"}, budgets=drawn)
    one, two, other = (tmp_path / n for n in "abc")
    start(recipe, one)
    start(recipe, two)
    start(recipe, other, "seed=1")
    assert steps(one) == steps(two)
    assert steps(one) != steps(other)


def interrupted(name, step, recipe, output):
    """A run in a process of its own that gets a signal when it has written the numbers of its step `step`."""
    program = f"""
import os, signal
from zipr1.core.rundir import RunDir
real, seen = RunDir.append_metrics, []
def append(*arguments):
    real(*arguments)
    seen.append(1)
    if len(seen) == {step}:
        os.kill(os.getpid(), signal.{name})
RunDir.append_metrics = append
from zipr1.cli import main; main()
"""
    command = [
        sys.executable,
        "-c",
        program,
        "train",
        recipe,
        "--output",
        output,
        "--device",
        "cpu",
    ]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["full", "lora", "supervised"])
def test_a_killed_run_goes_on_as_if_nothing_happened(tmp_path, model, kind):
    changes: dict = {"train": {"steps": 6, "save_every": 2}}
    if kind == "lora":
        changes["model"] = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    if kind == "supervised":
        changes["train"]["stage"] = "supervised"
        changes["supervised"] = {"questions": 3, "advance_at": 0.01}
        changes["optim"] = {"name": "muon", "lr": 1e-3}
    recipe = write(tmp_path / "r.yaml", model, **changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = start(recipe, whole)
    done = interrupted("SIGKILL", 3, recipe, broken)
    assert done.returncode == -signal.SIGKILL
    assert not (broken / "summary.json").exists()
    resumed = start(recipe, broken)
    assert steps(broken) == steps(whole)
    timed = {"seconds": 0, "costs": 0}
    assert {**resumed, **timed} == {**summary, **timed}
    assert json.loads((broken / "run.json").read_text())["resumed"]


def test_sigterm_saves_and_the_run_goes_on(tmp_path, model):
    recipe = write(tmp_path / "r.yaml", model, train={"steps": 12, "save_every": 0})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(recipe, whole)
    process = interrupted("SIGTERM", 2, recipe, broken)
    said = process.stderr
    assert process.returncode == 143
    done = int((broken / "last").resolve().name.removeprefix("step-"))
    assert 2 <= done < 12
    assert " ".join(said.split()).endswith(
        f"stopped by SIGTERM; step {done} is saved; go on with --resume {broken}"
    )
    assert len(steps(broken)) == done and not (broken / "summary.json").exists()
    start(recipe, broken)
    assert steps(broken) == steps(whole)
    assert json.loads((broken / "run.json").read_text())["resumed"][0]["from_step"] == done


@pytest.mark.parametrize("moment", ["looking", "stepping"])
def test_a_signal_in_the_middle_of_a_step_saves_a_true_state(tmp_path, model, monkeypatch, moment):
    """While a step looks, the state before it is saved; once weights change, the state after it. Ctrl-C again, while
    that is written and while the run cleans up, changes nothing."""
    recipe = write(tmp_path / "r.yaml", model, train={"steps": 4, "save_every": 0})
    start(recipe, tmp_path / "whole")
    name = "update" if moment == "looking" else "step_metrics"
    calls, original = [], getattr(loop, name)

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signals.handle(signal.SIGTERM)
        return original(*arguments)

    def again(function):
        def called(*arguments):
            if len(calls) >= 3:
                signals.handle(signal.SIGINT)
            return function(*arguments)

        return called

    monkeypatch.setattr(loop, name, interrupted)
    monkeypatch.setattr(loop, "save", again(loop.save))
    monkeypatch.setattr(distributed.Parallel, "close", again(distributed.Parallel.close))
    with pytest.raises(signals.Stopped) as stop:
        start(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert stop.value.number == signal.SIGTERM and not (tmp_path / "run" / ".lock").exists()
    done = 2 if moment == "looking" else 3
    assert f"step {done} is saved" in stop.value.note
    assert (tmp_path / "run" / "last").resolve().name == f"step-{done:06d}"
    start(recipe, tmp_path / "run")
    assert steps(tmp_path / "run") == steps(tmp_path / "whole")


@pytest.mark.parametrize("end", ["well", "error", "signal"])
def test_a_run_leaves_the_signals_as_it_found_them(tmp_path, model, monkeypatch, end):
    """In a program of someone else's, twice: the handlers are theirs, and no signal waits for a step to end."""
    recipe = write(
        tmp_path / "r.yaml", model, train={"steps": 1}, evaluation={"before": False, "after": False}
    )
    original = loop.step_metrics

    def stops(*arguments):
        if end == "error":
            raise RunError("the disk is full")
        if end == "signal":
            signals.handle(signal.SIGTERM)  # after the step of the optimizer: it waits
        return original(*arguments)

    monkeypatch.setattr(loop, "step_metrics", stops)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for turn in "ab":
        if end == "well":
            start(recipe, tmp_path / turn)
        else:
            with pytest.raises(RunError if end == "error" else signals.Stopped):
                start(recipe, tmp_path / turn)
        assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        with pytest.raises(signals.Stopped):
            signals.handle(signal.SIGTERM)
        signals.check(lambda number: [number])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_refused_for_whole_models(tmp_path, model, dtype):
    recipe = write(tmp_path / "r.yaml", model, model={"dtype": dtype}, optim={"lr": 2e-6})
    match = rf"{dtype} cannot be trained in full.*optim\.lr 2e-06 .*use float32 or auto, or .*lora"
    with pytest.raises(InputError, match=match):
        start(recipe, tmp_path / "run")
    with pytest.raises(InputError, match=match):
        dry_run(load(recipe), "cpu", QUIET)
    assert not (tmp_path / "run").exists()


def test_steps_of_adapters_land_though_the_base_is_bfloat16(tmp_path, model):
    """A third step of AdamW at 1e-6 moves every weight by about that: in bfloat16 it would round to nothing."""
    settings = {"dtype": "bfloat16", "lora": {"rank": 4, "alpha": 8}}
    recipe = write(
        tmp_path / "r.yaml", model, model=settings,
        optim={"lr": 1e-6, "lr_scheduler_type": "constant_with_warmup", "warmup": 0.0, "weight_decay": 0.0},
        train={"save_total_limit": 3}, evaluation={"before": False, "after": False},
    )  # fmt: skip
    start(recipe, tmp_path / "run")
    two, three = (
        load_file(
            tmp_path
            / "run"
            / f"checkpoints/step-{step:06d}/model/adapter/adapter_model.safetensors"
        )
        for step in (2, 3)
    )
    moved = torch.cat([(three[name] - two[name]).abs().flatten() for name in two])
    assert {value.dtype for value in three.values()} == {torch.float32}
    assert (moved > 0).float().mean() > 0.9 and 2e-7 < moved.median() < 2e-6
    halves = [torch.equal(three[n].bfloat16(), two[n].bfloat16()) for n in two if "lora_A" in n]
    assert sum(halves) > 0.5 * len(halves)


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(tmp_path, model):
    """A limit on the size of files stands for the disk: the write fails in the middle of the weights."""
    recipe = write(tmp_path / "r.yaml", model, evaluation={"before": False})
    program = """
import resource, signal
from zipr1.train import loop
save = loop.save
def full(folder, policy, optimizer, named, state, step):
    if step == 2:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(folder, policy, optimizer, named, state, step)
loop.save = full
from zipr1.cli import main; main()
"""
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, "train", str(recipe), "--output", str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step-000002: cannot be written" in " ".join(done.stderr.split())
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert (out / "last").resolve().name == "step-000001"
    start(recipe, out)
    assert len(steps(out)) == 3


def test_run_json_names_recipe_data_and_commit(tmp_path, model):
    recipe = write(tmp_path / "r.yaml", model, train={"steps": 1}, evaluation={"before": False})
    found = []
    for name, override in (("a", "seed=0"), ("b", "seed=0"), ("c", "data.prompts=12")):
        start(recipe, tmp_path / name, override)
        found.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert found[0]["recipe_sha256"] == load(tmp_path / "a" / "recipe.yaml").sha256()
    assert all(len(digest) == 64 for digest in found[0]["data"].values())
    assert found[0]["data"] == found[1]["data"]
    assert found[0]["data"]["train"] != found[2]["data"]["train"]
    assert found[0]["data"]["heldout"] == found[2]["data"]["heldout"]
    assert {"versions", "git", "hardware", "seed", "command"} <= set(found[0])


def test_prompts_too_short_to_be_sparse_are_refused(tmp_path, model):
    path = write(tmp_path / "r.yaml", model, sparse={"dense_below": 5000})
    with pytest.raises(InputError, match=r"the first 16 prompts have \d+ tokens at most .* = 5000"):
        start(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"set sparse\.dense_below=0"):
        dry_run(load(path, []), "cpu", QUIET)


def test_dry_run_writes_nothing(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load(write(tmp_path / "r.yaml", model))
    console = Console(record=True, width=80, file=open(os.devnull, "w"))  # noqa: SIM115
    plan = dry_run(recipe, "cpu", console)
    text = console.export_text()
    assert text.count("<|im_start|>assistant") >= 2 and "visual" in text and "memory, peak" in text
    assert plan["visual_tokens"]["min"] >= 64 and plan["rollout_rows"] == 9
    policy = tinymodels.shared()
    trainable = sum(p.numel() for n, p in policy.trainable())
    assert plan["memory"]["optimizer"] == 2 * 4 * trainable
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_what_a_run_refuses(tmp_path, model, monkeypatch):
    recipe = write(tmp_path / "r.yaml", model)
    with pytest.raises(InputError, match=r"rl needs a trained model"):
        start(recipe, tmp_path / "a", "model.path=scratch")
    with pytest.raises(InputError, match=r"differentiates top_p"):
        start(recipe, tmp_path / "b", "sparse.rule=random")
    with pytest.raises(InputError, match=r"'pathwize'.*'pathwise'"):
        start(recipe, tmp_path / "c", "efficiency.method=pathwize")
    out = tmp_path / "d"
    start(recipe, out)
    with pytest.raises(InputError, match=r"optim.lr"):
        start(recipe, out, "optim.lr=0.5")
    # Another model's weights in the checkpoint: refused, not half-loaded.
    from safetensors.torch import save_file

    weights = next((out / "last").resolve().glob("model/*.safetensors"))
    save_file({"strange": torch.zeros(1)}, weights, metadata={"format": "pt"})
    checksums.write((out / "last").resolve(), 3)
    with pytest.raises(
        InputError, match=r"its tensors are not those of the model: .* and \d+ more are missing"
    ):
        start(recipe, out)
    for name in "abc":
        assert not (tmp_path / name).exists()


def test_logits_that_overflow_before_anything_is_learned_are_not_blamed_on_the_rate(tmp_path):
    policy = tinymodels.make()
    policy.decoder.norm.weight.data.fill_(3e38)  # finite, its products are not
    policy.save(tmp_path / "model")
    recipe = write(
        tmp_path / "r.yaml", tmp_path / "model", train={"stage": "supervised", "steps": 2},
        evaluation={"before": False, "after": False},
    )  # fmt: skip
    with pytest.raises(RunError, match=r"first step's loss is nan.*logits.*model\.dtype") as told:
        start(recipe, tmp_path / "run")
    assert "optim.lr" not in str(told.value)


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path, model, monkeypatch):
    """The first step is sound, the second step's loss is infinite, as with weights that have grown without bound."""
    usual = torch.nn.functional.cross_entropy

    def grown(*args, **options):
        done = len(steps(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0
        return usual(*args, **options) * (float("inf") if done else 1.0)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", grown)
    recipe = write(
        tmp_path / "r.yaml", model, train={"stage": "supervised", "steps": 30, "save_every": 1}
    )
    with pytest.raises(RunError, match=r"the loss is inf .* optim\.lr"):
        start(recipe, tmp_path / "run")
    assert len(steps(tmp_path / "run")) == 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_can_be_the_model_of_another(tmp_path, model):
    for kind, changes in {"full": {}, "lora": {"lora": {"rank": 4, "alpha": 8}}}.items():
        first = tmp_path / kind
        recipe = write(tmp_path / f"{kind}.yaml", model, model=changes, train={"steps": 2})
        after = start(recipe, first)["after"]
        then = write(tmp_path / f"{kind}2.yaml", first, train={"steps": 1})
        before = start(then, tmp_path / f"{kind}-2")["before"]
        assert before["token_ratio"] == pytest.approx(after["token_ratio"], abs=2e-3)


def test_a_place_for_metrics_that_is_missing_is_said_before_anything_is_loaded(
    tmp_path, model, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(loop, "load_policy", lambda *_: pytest.fail("loaded"))
    recipe = write(tmp_path / "r.yaml", model, log={"to": ["tensorboard"]})
    with pytest.raises(InputError, match=r"which is not installed; pip install tensorboard"):
        start(recipe, tmp_path / "run")
    with pytest.raises(InputError, match=r"which is not installed; pip install tensorboard"):
        dry_run(load(recipe), "cpu", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_place_for_metrics_opens_before_the_first_measurement(tmp_path, model, monkeypatch):
    def refuse(*_):
        raise InputError("no key")

    monkeypatch.setitem(loggers.WRITERS, "tensorboard", refuse)
    monkeypatch.setattr(loop, "measure_before", lambda *_: pytest.fail("measured"))
    recipe = write(tmp_path / "r.yaml", model, log={"to": ["tensorboard"]})
    with pytest.raises(InputError, match="no key"):
        start(recipe, tmp_path / "run")


def test_what_lies_between_the_first_measurement_and_the_first_step_is_told(
    tmp_path, model, monkeypatch
):
    told = []
    monkeypatch.setattr(activity, "tell", lambda what, *_: told.append(what))

    def stop(*_):
        raise InputError(f"begins while {told[-1] or 'nothing'} is shown")

    monkeypatch.setattr(loop.RunPage, "begin", stop)
    with pytest.raises(InputError, match="begins while preparing to train is shown"):
        start(write(tmp_path / "r.yaml", model), tmp_path / "run")
    assert "held-out, before" in told


def test_tensorboard_holds_the_numbers_of_metrics_jsonl_and_those_of_a_resumed_run_once(
    tmp_path, model
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, out = write(tmp_path / "r.yaml", model, log={"to": ["tensorboard"]}), tmp_path / "run"
    start(recipe, out)
    # Killed after its third step, with a checkpoint of the first two: one step is done again.
    shutil.rmtree(out / "checkpoints" / "step-000003")
    (out / "last").unlink()
    time.sleep(1.1)  # files of events are ordered by their second
    start(recipe, out)
    assert len(list((out / "tensorboard").iterdir())) == 2
    shown = EventAccumulator(str(out / "tensorboard"))
    shown.Reload()
    rows = [dict(loggers.flat(row)) for row in steps(out)]
    assert len(rows) == 3 and {"loss", "lr", "token_ratio"} <= set(rows[0])
    for name in set().union(*rows) - {"step"}:
        found = [(event.step, event.value) for event in shown.Scalars(name)]
        wanted = [(i, row[name]) for i, row in enumerate(rows) if name in row]
        assert found == [(i, pytest.approx(value, rel=1e-6)) for i, value in wanted]
    assert {"seconds/rollout", "seconds/update"} <= set(shown.Tags()["scalars"])


@pytest.mark.parametrize(
    ("lost", "best"),
    [
        ([0.0, 0.0, 0.0], [True, True, True]),
        ([0.0, 0.5, 0.0], [True, False, True]),
        ([0.0, 0.5, 0.5], [True, False, False]),
        ([0.5, 0.5, 0.5], [True, True, True]),  # none holds: the newest
        ([0.5, 0.0, 0.5], [True, True, False]),
        ([None, None, None], [True, True, True]),  # nobody judges
    ],
)
def test_best_is_the_newest_checkpoint_that_holds(lost, best):
    from zipr1.train.checkpoints import is_best

    settings = Recipe(efficiency=Efficiency(max_accuracy_drop=0.005))
    state: dict = {"merit": {}, "pressure": {}}
    said = []
    for step, value in enumerate(lost, start=1):
        if value is not None:
            seen = {"weight": 1.0, "mean": value, "square": value**2, "count": 1e6}
            state["pressure"] = {"guard": {"a": {"lost": seen}}}
        said.append(is_best(settings, state, step))
    assert said == best
