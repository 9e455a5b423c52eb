"""Nothing in a folder that came from somewhere else runs code, whichever command opens it: each way to bring some is
tried with a module that leaves a mark when it is run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_doors import DOORS

from zipr1.core import checksums
from zipr1.core.errors import ZipError

EVIL = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
class Evil: pass
def reward(*a, **b): return 1.0
def generate(*a, **b): return None
"""
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch %s') }}"


def entries(name: str, **values: Any) -> Any:
    """Puts values into a JSON file of the model folder."""

    def change(model: Path, mark: Path) -> None:
        path = next(model.rglob(name))
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def template(model: Path, mark: Path) -> None:
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        text = ESCAPE % mark
        if name.endswith("json"):
            old = json.loads((model / name).read_text()) if (model / name).exists() else {}
            text = json.dumps({**old, "chat_template": text})
        (model / name).write_text(text)


def custom_generate(model: Path, mark: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(EVIL.format(mark=str(mark)))
    entries("generation_config.json", custom_generate="evil", trust_remote_code=True)(model, mark)


def nested(model: Path, mark: Path) -> None:
    values = json.loads((model / "config.json").read_text())
    values["text_config"]["_attn_implementation"] = "kernels-community/flash-attn2"
    (model / "config.json").write_text(json.dumps(values))


CLASSES = (
    "AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor",
    "AutoVideoProcessor", "AutoFeatureExtractor",
)  # fmt: skip
AUTO = {**dict.fromkeys(CLASSES, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# What is planted, and what is said of it where the folder is refused for it.
WAYS: dict[str, tuple[Any, str]] = {
    "auto_map": (entries("config.json", auto_map=AUTO, trust_remote_code=True), ""),
    "tokenizer": (entries("tokenizer_config.json", auto_map=AUTO, trust_remote_code=True,
                          tokenizer_class="evil.Evil"), ""),
    "pixels": (entries("preprocessor_config.json", auto_map=AUTO, image_processor_type="evil.Evil"), ""),
    "processor": (entries("processor_config.json", auto_map=AUTO, processor_class="evil.Evil"), ""),
    "custom_generate": (custom_generate, ""),
    "template": (template, ""),
    "kernel": (entries("config.json", attn_implementation="kernels-community/flash-attn2"), "a kernel of the hub"),
    "kernel inside": (nested, "text_config._attn_implementation: 'kernels-community/flash-attn2', a kernel of the hub"),
    "experts": (entries("config.json", experts_implementation="kernels-community/flash-attn2"), "a kernel of the hub"),
    "quantised": (entries("config.json", quantization_config=QUANTISED), "its weights are quantised"),
    "megatron": (entries("adapter_config.json", megatron_config={"a": 1}, megatron_core="evil"), "evil"),
    "auto_mapping": (entries("adapter_config.json", auto_mapping={
        "base_model_class": "Evil", "parent_library": "evil"}), ""),
}  # fmt: skip


@pytest.fixture
def theirs(monkeypatch, tmp_path):
    """Makes a run with one way planted; modules called evil are where Python finds them, too."""
    mark = tmp_path / "ran"
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (tmp_path / "importable").mkdir()
    (tmp_path / "importable" / "evil.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "importable"), *sys.path])
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    fetched: list[Any] = []
    monkeypatch.setattr(
        "transformers.integrations.hub_kernels.get_kernel", lambda *a, **b: fetched.append(a)
    )

    def make(run: Path, plant: Any) -> tuple[Path, Path, list[Any]]:
        root = Path(shutil.copytree(run, tmp_path / "theirs", symlinks=True))
        model = (root / "last" / "model").resolve()
        for folder in {path.parent for path in model.rglob("*.json")}:
            (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
        plant(model, mark)
        checksums.write((root / "last").resolve(), 7)
        return root, mark, fetched

    return make


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("way", WAYS)
def test_no_file_beside_weights_runs_code(runs, theirs, monkeypatch, tmp_path, way, door):
    plant, said = WAYS[way]
    adapter = way in ("megatron", "auto_mapping")
    root, mark, fetched = theirs(runs["lora" if adapter else "whole"], plant)
    told = ""
    try:
        opened = DOORS[door](str(root), monkeypatch, tmp_path)
        ask(opened)
    except ZipError as error:
        told = str(error)
    assert not mark.exists() and not fetched and "evil" not in sys.modules
    assert said in told and "\n" not in told
    assert bool(said) <= bool(told)


def ask(opened: Any) -> None:
    """The chat template is used."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]
    opened.processor.text(messages)


def test_planted_code_would_be_found(theirs, runs, tmp_path):
    """The traps of the tests above: the module leaves its mark when it is imported."""
    _, mark, _ = theirs(runs["whole"], lambda *a: None)
    __import__("evil")
    assert mark.exists()
    del sys.modules["evil"]


def test_what_a_runs_recipe_names_outside_of_it_is_neither_run_nor_opened(
    runs, theirs, monkeypatch, tmp_path
):
    """A downloaded run: its reward is a file of code, its questions are rows of this machine. Every command that only
    opens it reads neither; `train --resume` of such a run asks for the user's own recipe or word (test_cli.py)."""
    root, mark, _ = theirs(runs["whole"], lambda *a: None)
    path, evil = root / "recipe.yaml", tmp_path / "importable" / "evil.py"
    private = tmp_path / "private"
    private.mkdir()
    row = {"image": "a.png", "question": "q", "answer": "a"}
    (private / "rows.jsonl").write_text(json.dumps(row) + "\n")
    recipe = yaml.safe_load(path.read_text())
    recipe["rewards"]["check"] = f"{evil}:reward"
    rows = str(private / "rows.jsonl")
    recipe["data"] |= {"source": rows, "heldout": rows, "media_root": str(private)}
    path.write_text(yaml.safe_dump(recipe))
    opened: list[str] = []
    _opens.append(opened.append)
    try:
        for door in DOORS:
            DOORS[door](str(root), monkeypatch, tmp_path / door)
        assert not mark.exists() and str(path) in opened
        assert not [name for name in opened if str(private) in name or name == str(evil)]
        (private / "rows.jsonl").read_text()
        assert rows in opened  # the trap works
    finally:
        _opens.pop()


# What hears of files and folders that Python opens, if anything does; a hook of audits cannot be taken off.
_opens: list[Any] = []


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if _opens and event in ("open", "os.listdir", "os.scandir"):
        name = arguments[0]
        _opens[-1](os.fsdecode(name) if isinstance(name, bytes) else str(name))


sys.addaudithook(_heard)
