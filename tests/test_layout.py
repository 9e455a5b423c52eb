"""What the tree must look like for imports, installs and readers."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["kernels", "tests", "tests/kernels"])
def test_no_package_named_kernels(folder):
    """`kernels` is also Hugging Face's kernel hub client, which transformers imports."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_files_stay_readable():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in ROOT.glob("zipr1/**/*.py")
    }
    assert len(lengths) > 5
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", p)] == []
    assert {
        "torch==2.13.0",
        "transformers==5.23.0",
        "triton==3.9.0",
        "peft==0.21.2",
        "lmms-eval==0.7.3",
    } <= set(pins)


def test_no_registry_or_link_decides_what_is_installed():
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not re.search(
            r"https?://|git\+|file://|--index-url|--extra-index-url|--find-links", text
        ), name


def test_every_dependency_is_pinned():
    """Those of the core and of what `make install` adds to it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["data"], *extras["eval"], *extras["dev"]]
    names = {re.match(r"[A-Za-z0-9_.-]+", d)[0].lower() for d in wanted}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names - pinned == set()


def test_scripts_can_be_run():
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_text_is_never_markup():
    """Names and answers hold brackets and colons: core/terminal.py makes the consoles, which read no markup."""
    made = re.compile(r"\bConsole\(|rich\.markup|from_markup|\brich\.print|markup=True|emoji=True")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in ROOT.glob("zipr1/**/*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if made.search(line.split("(`")[0]) and path.name != "terminal.py"
    ]
    assert found == []


def test_x_is_times_faster_and_written_in_one_place():
    """`text.times`, which takes a speed-up."""
    written = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.glob("zipr1/**/*.py")
        if re.search(r"\{[^{}]*\}x\b", path.read_text(encoding="utf-8"))
    }
    assert written == {"zipr1/core/text.py"}


def test_core_is_light():
    """Every command imports core: it loads torch and its like when a function needs them. distributed.py is torch's."""
    names = [p.stem for p in (ROOT / "zipr1/core").glob("*.py") if p.stem != "distributed"]
    assert len(names) > 10
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(f'zipr1.core.{{name}}')\n"
        "print(*{'torch', 'transformers', 'matplotlib', 'datasets', 'av', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
