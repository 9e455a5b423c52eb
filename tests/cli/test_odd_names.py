"""Every command in a folder whose name would be markup and emoji to the terminal: it is shown as it is, and works."""

import contextlib
import shlex
from pathlib import Path

import pytest
import tinymodels
import tinyruns
from commands import call

ODD = Path("a[b]/[/red] :boom: [bold]")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder of all that follows: a model, a recipe that names it, and a run of that."""
    root = tmp_path_factory.mktemp("odd")
    with contextlib.chdir(root):
        ODD.mkdir(parents=True)
        tinymodels.make().save(ODD / "model")
        train = {"steps": 1, "prompts_per_step": 2}
        tinyruns.write(ODD / "small.yaml", ODD / "model", train=train)
        yield call("train", ODD / "small.yaml", "-o", ODD / "run", "--device", "cpu")


def test_train(odd):
    code, said = odd
    assert code == 0, said
    assert f"run: {ODD}/run" in said and f"report: {ODD}/run/report.html" in said
    assert (
        f"zipr1 export {shlex.quote(f'{ODD}/run')} --to DIR" in said
    )  # brackets mean more to a shell
    assert f"{ODD}/model, 1 steps" in said  # the title of the table
    assert f"{ODD}/model: pictures of" in said  # the log


def test_train_says_what_is_wrong_with_them(odd):
    code, said = call("train", ODD / "none.yaml")
    assert code == 2 and said.startswith(f"error: {ODD}/none.yaml: no such file")
    code, said = call("train", "--resume", ODD)
    assert code == 2 and f"{ODD}: not a run directory" in said
    code, said = call("train", ODD / "small.yaml", "-o", ODD / "small.yaml")
    assert code == 2 and f"{ODD}/small.yaml: this is a file" in said
    code, said = call("train", ODD / "small.yaml", f"model.[red]={ODD}")
    assert code == 2 and f"`model.[red]={ODD}`" in said


def test_a_terminal(odd, monkeypatch):
    """With its live display."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, said = call(
        "train", ODD / "small.yaml", "-o", ODD / "shown", "train.steps=1", "--device", "cpu"
    )
    assert code == 0, said
    assert f"run: {ODD}/shown" in said and f"{ODD}/model, 1 steps" in said


def test_dry_run(odd):
    code, said = call("train", ODD / "small.yaml", "--dry-run", "--device", "cpu")
    assert code == 0, said
    assert f"model {ODD}/model" in said and "[bold]memory" not in said and "peak" in said


def test_eval(odd):
    pytest.importorskip("lmms_eval")
    code, said = call(
        "eval", "--model", ODD / "run", "--tasks", "digits", "--limit", 1, "-o", ODD / "eval",
        "--no-base", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, said
    assert f"{ODD}/run: sparsity of {ODD}/run/recipe.yaml" in said
    assert f"results in {ODD}/eval" in said and f"report: {ODD}/eval/report.html" in said
    assert f"{ODD}/run: float32" in said  # the title of the table
    code, said = call(
        "eval", "--model", ODD / "run", "--tasks", "moving_digits", "-o", ODD / "eval",
        "--limit", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 2 and f"{ODD}/eval: holds another evaluation" in said


def test_profile(odd):
    code, said = call(
        "profile", "--model", ODD / "run", "--lengths", 32, "--seconds", 0, "-o", ODD / "profile",
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0, said
    assert f"report: {ODD}/profile/report.html" in said and f"{ODD}/run, 3 of 3 layers" in said
    code, said = call("profile", "--model", f"{ODD}/none")
    assert code == 2 and f"{ODD}/none" in said


def test_export(odd):
    code, said = call("export", ODD / "run", "--to", ODD / "out", "--device", "cpu")
    assert code == 0, said
    assert f"{ODD}/out: merged, float32" in said and f'zipr1.load("{ODD}/out")' in said
    code, said = call("export", ODD / "run", "--to", ODD / "out")
    assert code == 2 and f"--to {ODD}/out: is there already" in said


def test_compare(odd):
    code, said = call("compare", ODD / "run", ODD / "run", "-o", ODD / "page")
    assert code == 0, said
    assert f"report: {ODD}/page/report.html" in said and f"A: {ODD}/run; B: {ODD}/run" in said
    code, said = call("compare", ODD / "run", ODD)
    assert code == 2 and f"{ODD}: neither a run nor an evaluation" in said


def test_lists(odd):
    assert "paper13:" in call("eval", "--tasks", "list")[1]
    assert "the embedded model, for practice" in call("train")[1]
