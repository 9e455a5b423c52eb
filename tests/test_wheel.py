"""What a user has who installed the wheel and has no checkout: all four commands, and the recipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools leaves a folder build/ where it works."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("zipr1", "kernels", "recipes"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    out = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_the_recipes_and_no_scripts(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {Path(n).name for n in names if n.startswith("zipr1/assets/recipes/")}
    assert shipped == {p.name for p in (ROOT / "recipes").glob("*.yaml")} >= {"tiny.yaml"}
    for folder in ("configs", "templates", "tiny"):
        there = {p.name for p in (ROOT / "zipr1/assets" / folder).iterdir()}
        assert {Path(n).name for n in names if n.startswith(f"zipr1/assets/{folder}/")} == there
    assert "zipr1/assets/digits.npz" in names
    tasks = [p.name for p in (ROOT / "zipr1/evaluate/tasks").iterdir() if p.is_file()]
    assert {f"zipr1/evaluate/tasks/{name}" for name in tasks} <= set(names)


@pytest.mark.slow
def test_all_commands_run_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    """A fresh environment that has the installed libraries of this one, and zipr1 from the wheel alone."""
    env = tmp_path / "env"
    venv.create(env, with_pip=False, symlinks=True)
    libraries = sysconfig.get_paths()["purelib"]
    site = Path(sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)}))
    python, zipr1 = env / "bin/python", env / "bin/zipr1"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    clean |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}
    folder = tmp_path / "empty"
    folder.mkdir()

    def call(*command):
        done = subprocess.run(
            [str(c) for c in command], cwd=folder, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    options = ("install", "-q", "--no-deps", "--no-index", "--no-compile")
    call(sys.executable, "-m", "pip", "--python", python, *options, wheel)
    (site / "libraries.pth").write_text(f"{libraries}\n")  # its own .pth files are not read
    assert str(site) in call(python, "-c", "import zipr1; print(zipr1.__file__)")
    assert "tiny_base" in call(zipr1, "train")
    assert call(zipr1, "train", "recipes/tiny.yaml", "--copy").startswith("tiny.yaml: edit it")
    small = "data.prompts=32 data.heldout_prompts=4 train.steps=2 train.prompts_per_step=4"
    # One process for the four: most of the time of each is importing torch.
    program = (
        "import sys\nfrom zipr1.cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = line.split()\n"
        "    try: main()\n"
        "    except SystemExit as left: assert not left.code, line\n"
    )
    said = call(
        python, "-c", program,
        f"zipr1 train tiny {small} -o runs/mine --json",
        "zipr1 eval --model runs/mine --tasks digits --limit 4 --json",
        "zipr1 profile --model runs/mine --seconds 0 --json",
        "zipr1 export runs/mine --to plain --json",
    )  # fmt: skip
    results = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    summary, evaluation, _, export = results
    assert summary["steps"] == 2 and evaluation["rows"][0]["n"] == 4 and export["step"] == 2
    assert (folder / "plain/model.safetensors").is_file()
