"""The command line: thin, quick to start, and one clear line for whatever goes wrong."""

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console

import zipr1
import zipr1.train
from zipr1.cli import main
from zipr1.cli.log import show_log
from zipr1.core import recipes, signals
from zipr1.core.errors import InputError, RunError
from zipr1.core.folders import claimed
from zipr1.core.load import load
from zipr1.core.rundir import RunDir


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("train: {steps: 3}")
    return path


def stand_in(monkeypatch, fake):
    """`fake` in place of the modules that the command imports when it runs."""
    for name in ("loop", "dry_run"):
        monkeypatch.setitem(sys.modules, f"zipr1.train.{name}", fake)
        monkeypatch.setattr(zipr1.train, name, fake, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the loop and the dry run; what they were called with."""
    seen = []
    fake = types.ModuleType("zipr1.train.loop")

    def run(recipe, output, resume, device, command, console, name):
        seen.append((recipe, output, resume, device, command, name))
        console.print("training")
        return {"after": {"accuracy": 0.5}, "loss": float("nan")}

    def dry_run(recipe, device, console):
        seen.append((recipe, device))
        return {"dry": True}

    fake.run, fake.dry_run = run, dry_run
    stand_in(monkeypatch, fake)
    return seen


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs `zipr1 ARGUMENTS` in an empty folder; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["zipr1", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        out = capsys.readouterr()
        return left.value.code or 0, out.out, out.err

    return call


def failing(monkeypatch, error):
    fake = types.ModuleType("zipr1.train.loop")

    def run(*arguments):
        raise error

    fake.run = fake.dry_run = run
    stand_in(monkeypatch, fake)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train"],
        ["eval", "--help"],
        ["eval", "--tasks", "list"],
        ["eval", "--tasks", "list", "--json"],
        ["profile", "--help"],
        ["compare", "--help"],
        ["export", "--help"],
        ["--version"],
    ],
)
def test_help_loads_no_torch(arguments):
    code = (
        "import sys; from zipr1.cli import main; sys.argv = ['zipr1', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'zipr1.core.recipe'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr
    assert "zipr1" in done.stdout + done.stderr


def test_importing_the_package_loads_no_torch():
    code = "import sys, zipr1; assert zipr1.load and zipr1.sparse and zipr1.stats; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=3000)


def test_version(cli):
    assert cli("--version") == (0, f"zipr1 {zipr1.__version__}\n", "")


def test_train_passes_everything_on(cli, calls, recipe):
    code, out, _ = cli(
        "train",
        recipe,
        "seed=4",
        "--output",
        "o",
        "--device",
        "cpu",
        "optim.lr=1e-3",
        "--dtype",
        "float32",
    )
    assert (code, out) == (0, "training\n")
    ((got, output, resume, device, command, name),) = calls
    assert (got.seed, got.train.steps, got.optim.lr, got.model.dtype) == (4, 3, 1e-3, "float32")
    assert (str(output), resume, device) == ("o", "auto", "cpu")
    assert (command[:2], name) == (["zipr1", "train"], Path(recipe).stem)


def test_train_alone_lists_the_recipes_on_one_line_each(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli("train")
    assert (code, err) == (0, "") and "…" not in out
    rows = [line for line in out.splitlines() if line.split(" ")[0] in recipes.names()]
    assert len(rows) == len(recipes.names())
    assert re.match(r"tiny +the embedded model.* 2 CPU cores +10 min *$", rows[0])
    code, out, err = cli("train", "--json")
    assert [one["name"] for one in json.loads(out)] == recipes.names()


def test_a_recipe_to_edit(cli, tmp_path):
    assert cli("train", "tiny", "--copy") == (
        0, "tiny.yaml: edit it, then: zipr1 train tiny.yaml\n", ""
    )  # fmt: skip
    code, out, err = cli("train", "tiny", "--copy")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_recipe_by_name_gives_the_run_its_name(cli, calls):
    cli("train", "tiny", "seed=3")
    ((recipe, output, *_, name),) = calls
    assert (output, name) == (None, "tiny") and recipe.seed == 3


def test_without_output_a_new_folder_is_named_after_the_recipe(cli, calls, recipe):
    cli("train", recipe)
    assert (calls[0][1], calls[0][-1]) == (None, "small")
    with claimed(*calls[0][1:3], calls[0][-1]) as folder:
        assert str(folder).startswith("runs/small-") and folder.is_dir()


def test_resume_of_a_folder_leaves_output_to_it(cli, calls, recipe):
    RunDir.open(load(recipe), Path("runs/x"))
    cli("train", recipe, "--resume", "runs/x")
    assert calls[0][1:3] == (None, "runs/x")
    cli("train", "--resume", "runs/x", "train.steps=5")  # the recipe is the run's
    assert calls[1][1:3] == (None, "runs/x") and calls[1][0].train.steps == 5


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        ("rewards.check=evil.py:f", "rewards={check: 'evil.py:f'}"),
        ("model.trust_remote_code=true", "model.trust_remote_code=true"),
        ("rewards.check=evil.py:f", "rewards.correct=evil.py:f"),  # its old name
        ("data.source=./rows.json", "data={source: ./rows.json}"),
        ("data.heldout=rows.json:[5:]", "data.heldout=rows.json:[5:]"),
        ("data.media_root=pictures", "data.media_root=pictures"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_resumed_run_names_no_code_and_no_files_that_the_user_does_not(
    cli, calls, recipe, code, asked, options
):
    """The run may have come from somewhere else, and its recipe with it."""
    ran = recipe.parent / "ran"
    program = f"open({str(ran)!r}, 'w').close()\ndef f(prediction, reference): return 1.0\n"
    (recipe.parent / "evil.py").write_text(program)
    (recipe.parent / "rows.json").write_text("[]")
    RunDir.open(load(recipe, [code]), Path("runs/x"))
    key, _, value = code.partition("=")
    for more in ((), ("train.steps=5",)):
        status, _, err = cli("train", "--resume", "runs/x", *options, *more)
        assert status == 2 and not calls and err.count("\n") == 1
        assert f"runs/x/recipe.yaml: {key}: " in err and value in err
        assert "zipr1 train RECIPE --resume DIR" in err and f"{key}=" in err and not ran.exists()
    assert cli("train", "--resume", "runs/x", *options, asked)[0] == 0
    assert cli("train", recipe, code, "--resume", "runs/x", *options)[0] == 0
    assert [call[0].model_dump() for call in calls] == [load(recipe, [code]).model_dump()] * 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "tiny", "--resume", "nosuch"], "nosuch: not a run directory"),
        (["train", "tiny", "-o", "small.yaml"], "small.yaml: this is a file"),
        (["eval", "--budget", "2.0"], "--budget 2.0: outside (0, 1]"),
        (["eval", "-o", "small.yaml/x"], "small.yaml is a file"),
        (["eval", "--checkpoint", "best"], "--checkpoint best: no run in runs/"),
        (["profile", "--model", "nosuch"], "--model nosuch: neither a model folder, nor a run"),
        (["profile", "--device", "nosuch"], "--device nosuch: give cpu, cuda"),
        (["train", "small.yaml", "--device", "cuda:x"], "--device cuda:x: give cpu, cuda"),
        (["eval", "--model", "nosuch"], "--model nosuch: does not exist"),
        (["eval", "--model", "./no/such"], "--model ./no/such: does not exist"),
        (["eval", "sparse.skp=1"], "did you mean sparse.skip?"),
        (["eval", "train.steps=3"], "`train.steps`: not read by zipr1 eval"),
        (["eval", "--data-root", "nosuch"], "--data-root nosuch: no such folder"),
        (["eval", "--tasks", "nosuch"], "--tasks nosuch: unknown; allowed: digits,"),
        (
            ["eval", "--tasks", "digits,video_mme"],
            "--tasks video_mme: unknown; did you mean videomme?",
        ),
        (["eval", "--tasks", ","], "--tasks: names no benchmark"),
        (["eval", "--tasks", "ai2d", "--data-root", "."], "--data-root .: not read for ai2d"),
        (["compare", "nosuch", "small.yaml"], "nosuch: neither a run nor an evaluation"),
        (["compare", "x", "y", "-o", "small.yaml"], "small.yaml: this is a file"),
        (["profile", "--keep", "2"], "--keep 2: outside (0, 1]"),
        (["profile", "--lengths", "0"], "--lengths 0: give 1 or more"),
        (["profile", "--card", "-o", "x"], "leave out --output"),
        (["profile", "-o", "small.yaml"], "small.yaml: this is a file"),
        (["profile", "--layers", "0"], "Invalid value for '--layers'"),
        (["profile", "--model", "tiny", "--layers", "2"], "--layers is for a bundled config"),
        (["profile", "--model", "qwen2.5-vl-3b", "--layers", "99"], "--layers 99 is outside 1..36"),
        (
            ["profile", "--model", "qwen2.5-vl-3b", "--lengths", "9,999999"],
            "--lengths 999999 is outside",
        ),
        (
            ["profile", "--model", "qwen2.5-vl-3b", "--image", "small.yaml"],
            "have no tokenizer for --image",
        ),
        (["train", "tiny", "data.mix={nosuch: 1}"], "nosuch"),
        (["train", "tiny", "efficiency.method=pathwize"], "did you mean 'pathwise'?"),
        (["train", "tiny", "rewards.check=exakt"], "did you mean 'exact'?"),
        (["train", "tiny", "model.path=nosuch", "--dry-run"], "model.path: nosuch does not exist"),
        (["train", "tiny", "data.source=no.jsonl"], "no.jsonl: no such data file"),
        (
            ["train", "tiny", "data.heldout=nosuch"],
            "data source 'nosuch': unknown; allowed: digits,",
        ),
        (
            ["train", "tiny", "train.prompts_per_step=65536", "budgets.num_generations=99"],
            "answers a step",
        ),
        (["export", "nosuch", "-o", "x"], "nosuch: not a run directory (there is no such folder)"),
        (["export", "small.yaml", "-o", "x"], "small.yaml: not a run directory (this is a file)"),
        (["export", ".", "-o", "x"], ".: not a run directory (it has no recipe.yaml and run.json)"),
        (
            ["export", "{run}", "-o", "x", "--checkpoint", "nosuch"],
            "--checkpoint nosuch: give best, last",
        ),
        (["export", "{run}", "-o", "x", "--checkpoint", "99"], "--checkpoint 99: not in "),
        (
            ["export", "{run}", "-o", "x", "--push", "mine"],
            "--push mine: give the repository as OWNER/NAME",
        ),
        (
            ["export", "{run}", "-o", "x", "--push", "me/mine"],
            "--push: nobody is logged in to the hub",
        ),
        (["export", ".", "--to", "x", "--format", "gguf"], "--format gguf: unknown"),
    ],
)
def test_arguments_are_judged_before_anything_heavy_is_loaded(recipe, run, arguments, expected):
    code = (
        "import sys; from zipr1.cli import main; sys.argv = ['zipr1', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: assert not {'torch', 'lmms_eval'} & set(sys.modules), 'torch or lmms-eval was loaded'"
    )
    arguments = [word.replace("{run}", str(run)) for word in arguments]
    hub = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_TOKEN_PATH": str(recipe.parent / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json"],
        capture_output=True, text=True, timeout=3000, cwd=recipe.parent, env=os.environ | hub,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert expected in done.stderr
    told = json.loads(done.stdout)  # one line, on failure too
    assert told == {"error": done.stderr.removeprefix("error: ").strip(), "exit_code": 2}
    assert [p.name for p in recipe.parent.iterdir()] == ["small.yaml"]


def test_every_command_has_an_example_and_output_as_o(cli):
    for name in ("train", "eval", "profile", "export", "compare", "env"):
        code, out, _ = cli(name, "--help")
        assert code == 0 and f"For example: zipr1 {name}" in " ".join(out.split())
        assert name == "env" or re.search(r"--output +-o ", out)
        usage = next(line for line in out.splitlines() if "Usage:" in line)
        given = {"export": " RUN", "compare": " A B"}.get(name, "")
        assert "<" not in out  # no types of Python: `--json <bool>` would ask for a value
        assert "{" not in usage and f"zipr1 {name} [OPTIONS]{given}" in usage


def test_versions_for_a_bug_report(cli):
    assert cli("-V") == cli("--version")
    code, out, _ = cli("env", "--json")
    found = json.loads(out)
    assert code == 0 and found["zipr1"] == zipr1.__version__
    assert {"torch", "transformers", "cpu", "memory", "kernels"} <= set(found)


def test_a_message_is_one_line_in_a_file_and_whole_words_in_a_terminal():
    words = " ".join(f"[b]word{n}[/b]" for n in range(30))
    for terminal in (False, True):
        console = Console(
            file=io.StringIO(), width=40, force_terminal=terminal, color_system=None, markup=False
        )
        show_log(console)
        logging.getLogger("zipr1.data").info("%s", words)
        said = console.file.getvalue().splitlines()
        if not terminal:
            assert said == [words]
        else:
            assert max(map(len, said)) <= 40 < len(words)
            assert [word for line in said for word in line.split()] == words.split()


def test_recipes_are_completed_by_the_shell():
    from zipr1.cli.train import _names

    assert _names("tiny") == ["tiny", "tiny_base", "tiny_rl"] and _names("x") == []


def test_json_is_the_last_line_and_the_only_one(cli, calls, recipe):
    code, out, err = cli("train", recipe, "--json")
    assert code == 0
    assert json.loads(out) == {"after": {"accuracy": 0.5}, "loss": None}
    assert out.count("\n") == 1
    assert "training" in err


def test_benchmarks_are_listed_for_a_program_too(cli):
    code, out, err = cli("eval", "--tasks", "list", "--json")
    assert (code, out.count("\n")) == (0, 1) and "paper13:" in err
    told = json.loads(out)
    suites = {suite["name"]: suite for suite in told["suites"]}
    assert set(suites["mmbench"]) == {
        "name", "kind", "tasks", "metric", "range", "max_new_tokens", "frames", "login",
    }  # fmt: skip
    assert suites["mmbench"]["kind"] == "image" and suites["mmbench"]["frames"] is None
    assert suites["videomme"]["kind"] == "video" and suites["videomme"]["frames"] > 0
    assert len(told["groups"]["paper13"]) == 13 and set(told["groups"]["paper13"]) <= set(suites)


def test_dry_run_writes_nothing(cli, calls, recipe, tmp_path):
    code, out, _ = cli("train", recipe, "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {"dry": True})
    assert list(tmp_path.iterdir()) == [recipe]


def test_export_says_what_was_checked_and_how_to_use_it(cli, run, tmp_path):
    code, out, err = cli("export", run, "--to", "out", "--json", "--device", "cpu")
    assert code == 0 and out.count("\n") == 1
    result = json.loads(out)
    assert result["check"]["n"] == result["check"]["same_text"] == 4
    assert "same answers on 4 of 4" in " ".join(err.split()) and 'zipr1.load("out")' in err
    assert sorted(result["files"]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    code, out, err = cli("export", run, "--to", "out")
    assert (code, out) == (2, "")
    assert err == (
        "error: --to out: is there already and is never overwritten; name a new folder, or remove that one\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("data.source: got 'x';\nallowed: [b]"), 2, "error: data.source: got 'x'; allowed: [b]\n"),
        (RunError("loss is NaN"), 1, "error: loss is NaN\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "d" * 500), 2,
         f"error: {'d' * 400}: File name too long; give a shorter path\n"),
        (OSError(errno.ENOSPC, "No space left", "/d"), 1, "error: /d: No space left; free some space, then resume\n"),
        (MemoryError(), 1, "error: out of memory; use a smaller train.micro_batch, evaluation.batch or model.lora\n"),
    ],
)  # fmt: skip
def test_failures_are_one_line(cli, recipe, monkeypatch, error, code, line):
    failing(monkeypatch, error)
    assert cli("train", recipe) == (code, "", line)


@pytest.mark.parametrize("where", ["device", "cpu"])
def test_out_of_memory(cli, recipe, monkeypatch, where):
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    if where == "cpu":  # the allocator's own error, whatever its class and words are
        with pytest.raises(RuntimeError) as refused:
            torch.empty(2**60, dtype=torch.uint8)
        error = refused.value
    failing(monkeypatch, error)
    code, _, err = cli("train", recipe)
    assert (code, err.count("\n")) == (1, 1)
    assert "train.micro_batch" in err


def test_a_bug_keeps_its_traceback(recipe, monkeypatch, tmp_path):
    failing(monkeypatch, FileNotFoundError(errno.ENOENT, "missing"))
    monkeypatch.setattr(sys, "argv", ["zipr1", "train", str(recipe)])
    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "none.yaml"], "none.yaml: no such file and no recipe of that name"),
        (["train", "small.yaml", "train.stepz=3"], "did you mean train.steps?"),
        (["train", "small.yaml", "--dtype", "int8"], "model.dtype: got 'int8'; allowed: 'auto', 'float32'"),
        (["train", "small.yaml", "--nope"], "No such option"),
        (["fly"], "No such command"),
    ],
)  # fmt: skip
def test_wrong_input_exits_with_2(cli, recipe, arguments, expected):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert expected in " ".join(err.split())


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_stopped_export_leaves_nothing(run, tmp_path, number, code, word):
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time; from zipr1.export import session\n"
        "def compare(*a): print('ready', flush=True); time.sleep(60)\n"
        "session.compare = compare\n"
        "from zipr1.cli import main; sys.argv = ['zipr1', 'export', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", program, run, "--to", tmp_path / "out", "--device", "cpu"]
    with subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert "ready\n" in iter(process.stdout.readline, "")
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
    assert process.returncode == code and not list(tmp_path.iterdir())
    assert err == f"error: {word}; nothing was written: the folder is made whole or not at all\n"


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
def test_signals_end_with_one_line(recipe, number, code, word):
    program = (
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time, types, zipr1.train; fake = types.ModuleType('zipr1.train.loop')\n"
        "def run(*a): print('ready', flush=True); time.sleep(60)\n"
        "fake.run = run; sys.modules['zipr1.train.loop'] = zipr1.train.loop = fake\n"
        "from zipr1.cli import main; sys.argv = ['zipr1', 'train', sys.argv[1]]; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (code, "")
    assert err == f"error: {word}; saved checkpoints are complete: go on with --resume DIR\n"


def test_old_names_of_recipe_keys_are_one_line_of_the_first_process(tmp_path):
    (tmp_path / "r.yaml").write_text("budgets: {count: 4}\ntrain: {steps: 0}\n")
    command = [sys.executable, "-c", "from zipr1.cli import main; main()", "train"]
    said = []
    for rank in "01":
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": rank}
        done = subprocess.run(
            [*command, str(tmp_path / "r.yaml"), "ppo.kl=1.0"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2 and "train.steps: got 0" in done.stderr
        said.append([line for line in done.stderr.splitlines() if "old names" in line])
    ((line,), nothing) = said
    assert "budgets.count -> budgets.num_generations, ppo.kl -> ppo.kl_coef" in line
    assert not nothing


@pytest.mark.parametrize(
    ("options", "left"), [((), "go on with --resume"), (("--dry-run",), "nothing")]
)
def test_a_stopped_dry_run_left_nothing_behind(options, left, cli, recipe, monkeypatch):
    failing(monkeypatch, signals.Stopped(signal.SIGINT))
    code, _, err = cli("train", recipe, *options)
    assert code == 130 and f"interrupted; {'saved' if not options else left}" in err and left in err
