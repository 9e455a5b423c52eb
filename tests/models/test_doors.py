"""One value through every door: what belongs to a model reaches train, eval, profile, export, load and lmms-eval alike.

A door is a command's own way to a model, stopped where the model is open. No value here is a default.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinyruns
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import zipr1
from zipr1.core import checksums
from zipr1.core.errors import InputError
from zipr1.core.load import validate
from zipr1.core.recipe import Lora, Model
from zipr1.export.session import export
from zipr1.models import loading
from zipr1.models.open import find_source, open_model, resolve, stored_dtype
from zipr1.models.policy import load_policy
from zipr1.profiling import subject
from zipr1.train import loop

QUIET = Console(file=io.StringIO())
LORA = {"rank": 4, "alpha": 8}
# The embedded model's tokens have 16 pixels a side, its patches 8.
BOUNDS = {"min_pixels": 64 * 64, "max_pixels": 80 * 80, "max_frame_pixels": 48 * 48}
# What is looked at, and the grid of patches that follows by hand: a picture of 32 x 32 grows to 64 x 64, one of 160 x
# 160 shrinks to 80 x 80, and the frames of a clip of two pairs to 48 x 48.
SEEN = {
    "min_pixels": ("image", (32, 32, 3), (1, 8, 8)),
    "max_pixels": ("image", (160, 160, 3), (1, 10, 10)),
    "max_frame_pixels": ("video", (4, 160, 160, 3), (2, 6, 6)),
}


class Stop(Exception):
    """A door is open."""


def opened(command: Any, monkeypatch: Any, call: Any) -> Any:
    """The policy that a command's module opens; what comes after is of no interest."""

    def stopped(*arguments: Any, **options: Any) -> None:
        found.append(load_policy(*arguments, **options))
        raise Stop

    found: list[Any] = []
    monkeypatch.setattr(command, "load_policy", stopped)
    with pytest.raises(Stop):
        call()
    return found[0]


def train(path: str, monkeypatch: Any, tmp_path: Path, **model: Any) -> Any:
    """The policy that `zipr1 train` makes of a recipe that names `path`."""
    recipe = tinyruns.recipe(model={"path": path, **model})
    run = (recipe, tmp_path / "run", "never", "cpu", ["zipr1"], QUIET)
    return opened(loop, monkeypatch, lambda: loop.run(*run))


def evaluate(path: str, monkeypatch: Any, tmp_path: Path, **model: Any) -> Any:
    pytest.importorskip("lmms_eval")
    from zipr1.evaluate import session

    changes = [f"model.{key}={value}" for key, value in model.items()]
    request = session.EvalRequest(
        path, ["digits"], [0.9], 1, tmp_path / "out", None, "cpu", changes, base=False
    )
    return opened(session, monkeypatch, lambda: session.run(request, ["zipr1"], QUIET))


def profile(path: str, monkeypatch: Any, tmp_path: Path, dtype: str = "auto") -> Any:
    return subject.load(path, None, "cpu", dtype, None).policy


def adapter(path: str, monkeypatch: Any, tmp_path: Path) -> Any:
    pytest.importorskip("lmms_eval")
    from zipr1.evaluate.adapter import Adapter

    return Adapter(pretrained=path, device="cpu").store.answerer.policy


class Loaded:
    """What `zipr1.load` gives, with the names that a policy has."""

    def __init__(self, path: str, **options: Any) -> None:
        self.model, self.chat = zipr1.load(path, device="cpu", **options)
        self.processor = self.chat.inner


def load(path: str, monkeypatch: Any, tmp_path: Path, **options: Any) -> Any:
    return Loaded(path, **options)


def exported(path: str, monkeypatch: Any, tmp_path: Path, **options: Any) -> Any:
    """An export of a run, opened where neither the run nor its base is known by its recipe."""
    export(path, tmp_path / "out", device="cpu", **options)
    (tmp_path / "out" / "recipe.yaml").unlink()
    return Loaded(str(tmp_path / "out"))


DOORS = {
    "train": train,
    "eval": evaluate,
    "profile": profile,
    "export": exported,
    "load": load,
    "adapter": adapter,
}
doors = pytest.mark.parametrize("door", DOORS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def paths(root):
    """Paths by what they are; all of them belong to runs with BOUNDS, and say so in different places."""

    @cache
    def made(kind: str) -> str:
        if kind in ("whole", "lora"):
            model = {"path": "tiny", "lora": LORA if kind == "lora" else None, **BOUNDS}
            return str(tinyruns.make_run(root / kind, model=model))
        if kind == "checkpoint":
            return str(Path(made("whole")) / "checkpoints" / "step-000007" / "model")
        if kind == "by last":
            return str(Path(made("lora")) / "last" / "model")
        if kind in ("whole on lora", "lora on whole"):  # whose recipes set no bounds
            first, last = kind.split(" on ")
            model = {"path": made(last), "lora": LORA if first == "lora" else None}
            return str(tinyruns.make_run(root / kind, model=model))
        if kind == "older":  # clips had the pictures' bounds, whatever the recipe said
            shutil.copytree(made("whole"), root / kind, symlinks=True)
            for path in (root / kind).glob("checkpoints/*/model/*processor_config.json"):
                values = json.loads(path.read_text())
                size = values.get("image_processor", values)["size"]
                values.get("video_processor", values)["size"] = {**size, "longest_edge": 80 * 80}
                path.write_text(json.dumps(values))
            complete(root / kind)
            return str(root / kind)
        format = kind.split()[1]
        source = made("whole" if format == "merged" else "lora")
        export(source, root / kind, format, device="cpu")
        return str(root / kind)

    return made


def complete(run: Path) -> None:
    """A checkpoint whose files were changed is complete again."""
    last = run / "last"
    checksums.write(last.resolve(), tinyruns.read(last / "complete.json")["step"])


KINDS = (
    "whole", "lora", "checkpoint", "by last", "whole on lora", "lora on whole", "older", "exported merged",
    "exported adapter",
)  # fmt: skip


def grid(processor: Any, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of patches, counted and made."""
    visual = processor.visual(kind, np.zeros(shape, np.uint8), 4.0 if kind == "video" else None)
    frames, height, width = shape[:3] if kind == "video" else (1, *shape[:2])
    assert processor.planned(kind, frames, height, width, 4.0).grid == visual.grid
    assert visual.tokens == int(np.prod(visual.grid)) // 4 == len(visual.patches) // 4
    return visual.grid


RUNS = ("whole", "lora", "whole on lora", "lora on whole", "older")


@pytest.mark.parametrize(
    ("kind", "door"), [(k, d) for k in KINDS for d in DOORS if d != "export" or k in RUNS]
)
def test_pictures_and_clips_have_their_bounds(paths, monkeypatch, tmp_path, kind, door):
    processor = DOORS[door](paths(kind), monkeypatch, tmp_path).processor
    for name, (seen, shape, wanted) in SEEN.items():
        assert grid(processor, seen, shape) == wanted, name


@pytest.mark.parametrize("door", ["train", "eval", "load"])
@pytest.mark.parametrize("name", BOUNDS)
def test_what_the_caller_sets_wins(paths, monkeypatch, tmp_path, name, door):
    """The bound that is set changes its own picture; the others stay the run's."""
    changed = {
        "min_pixels": (72 * 72, (1, 10, 10)),  # sides of 16: 72 goes up to 80
        "max_pixels": (64 * 64, (1, 8, 8)),
        "max_frame_pixels": (32 * 32, (2, 4, 4)),
    }
    value, result = changed[name]
    processor = DOORS[door](paths("lora"), monkeypatch, tmp_path, **{name: value}).processor
    for other, (seen, shape, wanted) in SEEN.items():
        assert grid(processor, seen, shape) == (result if other == name else wanted), other


@pytest.mark.parametrize("format", ["merged", "adapter"])
def test_exports_write_the_bounds_where_they_belong(paths, tmp_path, format):
    export(paths("lora"), tmp_path / "out", format, device="cpu")

    def sizes(name: str, part: str | None = None) -> list[int]:
        values = tinyruns.read(tmp_path / "out" / name)
        size = (values[part] if part else values)["size"]
        return [size["shortest_edge"], size["longest_edge"]]

    pictures, frames = [64 * 64, 80 * 80], [48 * 48, 48 * 48]
    assert sizes("preprocessor_config.json") == pictures
    assert sizes("processor_config.json", "image_processor") == pictures
    assert sizes("video_preprocessor_config.json") == frames
    assert sizes("processor_config.json", "video_processor") == frames


def test_the_bounds_of_a_real_run_reach_its_export_and_load(tmp_path):
    """Trained for a step through the loop itself, then exported and loaded; no file was made by a test."""
    sections = {
        "model": {"path": "tiny", "lora": LORA, **BOUNDS},
        "data": {"prompts": 4, "heldout_prompts": 2, "max_frames": 4},
        "budgets": {"num_generations": 2},
        "train": {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 2},
    }
    recipe = tinyruns.recipe(**sections)
    loop.run(recipe, tmp_path / "run", "never", "cpu", ["zipr1"], QUIET)
    export(tmp_path / "run", tmp_path / "out", device="cpu")
    (tmp_path / "out" / "recipe.yaml").unlink()
    clip = np.zeros((4, 160, 160, 3), np.uint8)
    content = [{"type": "video", "video": clip}, {"type": "text", "text": "which?"}]
    for path in (tmp_path / "run", tmp_path / "run" / "best", tmp_path / "out"):
        if not path.exists():  # a run that never got better has no best
            continue
        loaded = Loaded(str(path))
        for name, (seen, shape, wanted) in SEEN.items():
            assert grid(loaded.processor, seen, shape) == wanted, (path.name, name)
        inputs = loaded.chat.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True
        )
        assert inputs["video_grid_thw"].tolist() == [list(SEEN["max_frame_pixels"][2])]


def test_frames_of_a_clip_are_those_of_the_run(monkeypatch, tmp_path):
    run = tinyruns.make_run(tmp_path / "run", data={"max_frames": 6, "fps": 2.5})
    inside = str(run / "checkpoints" / "step-000007" / "model")
    export(run, tmp_path / "out", device="cpu")
    for path in (str(run), inside, str(tmp_path / "out")):
        chat = Loaded(path).chat
        assert (chat.max_frames, chat.fps) == (6, 2.5)
        data = subject.load(path, None, "cpu", "auto", None).data
        assert (data.max_frames, data.fps) == (6, 2.5)
        assert find_source(path).sparse == tinyruns.recipe().sparse


@doors
def test_weights_are_in_the_dtype_that_was_asked_for(paths, monkeypatch, tmp_path, door):
    if door == "adapter":  # has no argument for it: float32 on a CPU
        assert DOORS[door](paths("lora"), monkeypatch, tmp_path).model.dtype == torch.float32
        return
    lora = {"lora": LORA} if door == "train" else {}
    found = DOORS[door](paths("lora"), monkeypatch, tmp_path, dtype="bfloat16", **lora)
    if door == "export":  # `load` takes float32 on a CPU; on disk they are what was asked for
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert {t.dtype for t in weights.values()} == {torch.bfloat16}
        assert stored_dtype(str(tmp_path / "out")) == "bfloat16"
        return
    weights = {n: p.dtype for n, p in found.model.named_parameters() if "lora_" not in n}
    assert set(weights.values()) == {torch.bfloat16}


# --- what an adapter was trained on


def weight(model: Any, name: str = "model.language_model.layers.1.mlp.up_proj.weight") -> Any:
    return dict(model.named_parameters())[name].detach()


def delta(run: str) -> torch.Tensor:
    """What a run's adapter adds to the weight above, from its file: scale * B A."""
    tensors = load_file(Path(run) / "last" / "model" / "adapter" / "adapter_model.safetensors")
    a, b = (
        next(t for n, t in tensors.items() if f"layers.1.mlp.up_proj.lora_{part}" in n)
        for part in "AB"
    )
    return LORA["alpha"] / LORA["rank"] * b @ a


@doors
def test_an_adapter_on_an_adapter_has_both(paths, root, monkeypatch, tmp_path, door):
    first, second = paths("lora"), str(root / "lora on lora")
    if not Path(second).exists():
        tinyruns.make_run(Path(second), model={"path": first, "lora": LORA})
    plain = weight(load_policy(Model(path="tiny"), "cpu").model)
    wanted = plain + delta(first) + delta(second)
    for part in (delta(first), delta(second)):
        assert part.abs().max() > 0.05
    options = {"dtype": "float32"} if door == "export" else {}  # else as the base is on disk
    found = weight(DOORS[door](second, monkeypatch, tmp_path, **options).model)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    if door == "export":
        with pytest.raises(InputError, match=r"trained on another run's.* use --format merged"):
            export(second, tmp_path / "x", "adapter", device="cpu")


@pytest.fixture
def hub(monkeypatch):
    """`owner/name` as if it had been downloaded: the embedded model. Gives (class, revision, trust) of each call."""
    asked: list[tuple[str, str | None, Any]] = []

    def stand_in(kind: Any) -> Any:
        real = kind.from_pretrained

        def recorded(place: Any, *arguments: Any, **options: Any) -> Any:
            if str(place) != "owner/name":
                return real(place, *arguments, **options)
            trust = options.get("trust_remote_code", "not said")
            asked.append((kind.__name__, options.get("revision"), trust))
            found = real(resolve("tiny"), *arguments, **options)
            model = found[0] if isinstance(found, tuple) else found  # with what it found
            if hasattr(model, "name_or_path") and hasattr(model, "config"):
                model.name_or_path = model.config.name_or_path = "owner/name"
            return found

        return recorded

    for kind in (loading.AutoConfig, loading.AutoTokenizer, loading.AutoModelForImageTextToText):
        monkeypatch.setattr(kind, "from_pretrained", stand_in(kind))

    def cached(name: str, file: str, revision: str | None = None, **rest: Any) -> Any:
        asked.append(("settings", revision, False))
        path = Path(resolve("tiny")) / file
        return str(path) if path.is_file() else None

    monkeypatch.setattr("zipr1.models.beside.cached_file", cached)
    return asked


CLASSES = {"AutoConfig", "AutoTokenizer", "AutoModelForImageTextToText", "settings"}


@pytest.fixture
def hub_run(hub, tmp_path):
    """A run of adapters on `owner/name` in revision v2."""
    model = {"path": "owner/name", "revision": "v2", "lora": LORA}
    run = tinyruns.make_run(tmp_path / "hub", model=model)
    hub.clear()
    return run


@doors
@pytest.mark.parametrize("older", [False, True], ids=["in the adapter", "in the recipe alone"])
def test_the_base_comes_in_the_revision_that_was_trained_on(
    hub, hub_run, monkeypatch, tmp_path, door, older
):
    written = hub_run / "last" / "model" / "adapter" / "adapter_config.json"
    values = tinyruns.read(written)
    assert (values["base_model_name_or_path"], values["revision"]) == ("owner/name", "v2")
    if older:
        written.write_text(json.dumps({**values, "revision": None}))
        complete(hub_run)
    options: dict[str, Any] = {"format": "adapter"} if door == "export" and not older else {}
    DOORS[door](str(hub_run), monkeypatch, tmp_path, **options)
    assert {kind for kind, _, _ in hub} >= (CLASSES - {"settings"})
    assert {revision for _, revision, _ in hub} == {"v2"}
    if door == "export":
        about = tinyruns.read(tmp_path / "out" / "zipr1.json")
        assert about["base"] == {"path": "owner/name", "revision": "v2"}
        assert "owner/name), revision v2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("door", ["train", "eval", "load"])
def test_a_revision_of_the_callers_wins(hub, hub_run, monkeypatch, tmp_path, door):
    for path in ("owner/name", str(hub_run)):
        hub.clear()
        DOORS[door](path, monkeypatch, tmp_path / path.replace("/", "-"), revision="v3")
        assert {kind for kind, _, _ in hub} >= CLASSES
        assert {revision for _, revision, _ in hub} == {"v3"}


def test_the_first_revision_is_followed_through_runs(hub, hub_run, tmp_path):
    second = tinyruns.make_run(tmp_path / "second", model={"path": str(hub_run)})
    export(second, tmp_path / "out", device="cpu")
    assert tinyruns.read(tmp_path / "out" / "zipr1.json")["base"]["revision"] == "v2"


# --- the code of a folder


EVIL = """
from pathlib import Path
from transformers import Qwen2_5_VLConfig
Path({mark!r}).touch()
class Evil(Qwen2_5_VLConfig):
    pass
"""


@doors
def test_no_file_of_a_run_makes_its_code_run(paths, monkeypatch, tmp_path, door):
    """A run from somewhere else: its recipe trusts, its model folder brings a module."""
    run, mark = tmp_path / "theirs", tmp_path / "ran"
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds that folder to it
    shutil.copytree(paths("whole"), run, symlinks=True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["trust_remote_code"] = True
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = run / "last" / "model"
    (model / "evil.py").write_text(EVIL.format(mark=str(mark)))
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        values = tinyruns.read(model / name)
        values["auto_map"] = {key: "evil.Evil" if key == "AutoConfig" else ["evil.Evil", None]}
        (model / name).write_text(json.dumps(values))
    complete(run)
    DOORS[door](str(run), monkeypatch, tmp_path)
    assert not mark.exists()
    if door in ("load", "eval", "train"):  # the caller may
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with contextlib.suppress(InputError, AttributeError, ValueError):
            DOORS[door](str(run), monkeypatch, tmp_path / "again", trust_remote_code=True)
        assert mark.exists()


@pytest.mark.parametrize("door", ["train", "eval", "load"])
def test_trust_is_for_what_the_caller_named(hub, hub_run, monkeypatch, tmp_path, door):
    """Not for the base that an adapter names."""
    for path, trusted in (("owner/name", True), (str(hub_run), False)):
        hub.clear()
        to = tmp_path / path.replace("/", "-")
        DOORS[door](path, monkeypatch, to, trust_remote_code=True)
        assert {trust for kind, _, trust in hub if kind != "settings"} == {trusted}


def test_a_base_that_needs_code_is_refused(hub_run, monkeypatch, tmp_path):
    mark, base = tmp_path / "ran", tmp_path / "base"
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    shutil.copytree(resolve("tiny"), base)
    (base / "evil.py").write_text(EVIL.format(mark=str(mark)))
    values = tinyruns.read(base / "config.json")
    values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (base / "config.json").write_text(json.dumps(values))
    written = hub_run / "last" / "model" / "adapter" / "adapter_config.json"
    theirs = {**tinyruns.read(written), "base_model_name_or_path": str(base), "revision": None}
    written.write_text(json.dumps(theirs))
    complete(hub_run)
    with pytest.raises(InputError) as caught:
        load_policy(Model(path=str(hub_run), trust_remote_code=True), "cpu")
    said = str(caught.value)
    assert f"model.trust_remote_code is for {hub_run} alone, and its base {base}" in said
    assert "\n" not in said and not mark.exists()


def test_trust_is_not_for_the_base_that_is_measured_beside(paths, monkeypatch):
    from zipr1.evaluate import session

    run, asked = paths("whole"), []
    monkeypatch.setattr(session, "load_policy", lambda settings, device: asked.append(settings))
    request = session.EvalRequest(str(run), ["digits"], [0.9], base=True)
    recipe = tinyruns.recipe(model={"path": str(run), "trust_remote_code": True})
    session._base(request, find_source(str(run)), recipe, torch.device("cpu"))
    assert [(s.path, s.trust_remote_code) for s in asked] == [("tiny", False)]


def test_a_recipe_of_something_else_beside_a_model_is_not_read(tmp_path):
    shutil.copytree(resolve("tiny"), tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text("flour: 500\n")
    assert find_source(str(tmp_path / "model")).recipe is None
    assert open_model(Model(path=str(tmp_path / "model")), "cpu").settings.max_pixels is None


def test_load_names_a_wrong_setting():
    with pytest.raises(InputError, match=r"zipr1\.load: model\.max_pixels: got -1"):
        zipr1.load("tiny", device="cpu", max_pixels=-1)
    assert validate({}).model.trust_remote_code is False and Lora().rank


def test_every_end_token_of_the_generation_config_ends_an_answer(paths, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve(paths("whole")), folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    usual = settings["eos_token_id"]
    settings["eos_token_id"] = [*([usual] if isinstance(usual, int) else usual), 300]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert 300 in open_model(Model(path=str(folder)), "cpu").processor.end_ids
    model, processor = zipr1.load(str(folder), device="cpu")
    assert 300 in model.generation_config.eos_token_id
    assert processor.inner.decode([40, 300, 41]) == processor.inner.decode([40])
