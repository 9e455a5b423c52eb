"""A machine that lends a GPU for minutes lacks some packages: what is run there needs them for clips alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Imports every module of ours, and the GPU script's parts, where neither reader of clips can be imported.
ALL = """
import importlib, importlib.abc, pkgutil, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("av", "decord"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import zipr1, zipr1.cli, zipr1_kernels

def leave(name):
    return name.endswith("__main__") or ".serving.vllm" in name

found = ["gpu", "gpu_parts", "gpu_times", "gpu_whole", "resources"]
for package in (zipr1, zipr1_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not leave(module.name):
            found.append(module.name)
for name in found:
    importlib.import_module(name)
for name in ("av", "decord"):
    assert name not in sys.modules
from zipr1.data import video
assert video.reader()[0] == "pyav"
print(len(found))
"""


def test_all_modules_are_imported_without_a_reader_of_clips():
    places = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "kernels" / "bench")]
    code = f"import sys; sys.path[:0] = {places!r}\n{ALL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100, "modules of every room"
