"""Recipes: what they read, and that every mistake is one clear line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe, differences, load, validate
from zipr1.train.validate import check


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def fail(*args: object) -> str:
    with pytest.raises(InputError) as caught:
        load(*args)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_empty_file_is_the_default(tmp_path):
    assert load(write(tmp_path, "")) == Recipe()


def test_scientific_notation_without_a_dot(tmp_path):
    recipe = load(write(tmp_path, "optim: {lr: 1e-4}"), ["optim.weight_decay=2e-2"])
    assert recipe.optim.lr == 1e-4
    assert recipe.optim.weight_decay == 0.02
    assert load(write(tmp_path, "model: {config: {eps: -1E-6}}")).model.config == {"eps": -1e-6}


def test_overrides_reach_any_depth(tmp_path):
    path = write(tmp_path, "train: {steps: 5}\nefficiency:\n")
    overrides = [
        "train.steps=7",
        "sparse.probes.recent=3",
        "efficiency.max_accuracy_drop=null",
        "model.lora.rank=4",
        "data.mix={digits: 1}",
    ]
    recipe = load(path, overrides)
    assert recipe.train.steps == 7
    assert recipe.sparse.probes.recent == 3
    assert recipe.efficiency.max_accuracy_drop is None
    assert recipe.model.lora is not None
    assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (4, 32)
    assert recipe.data.mix == {"digits": 1.0}


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("- 1", [], "the file holds [1]; a recipe is a mapping of keys such as `seed: 0`"),
        ("seed: 0\ntrain: [1\n", [], "r.yaml:3: not YAML"),
        ("seed: 0\nseed: 1\n", [], "r.yaml:2: not YAML: key `seed` is written twice; keep one"),
        ("day: 2026-99-99", [], "put the value in quotes"),
        ("trian: {}", [], "trian: unknown key; did you mean train?"),
        ("train: {stepz: 1}", [], "train.stepz: unknown key; did you mean train.steps?"),
        ("lr: 1.0", [], "lr: unknown key; did you mean optim.lr?"),
        ("sparse: {probes: {recnt: 1}}", [], "did you mean sparse.probes.recent?"),
        ("model: {lora: {rnk: 1}}", [], "did you mean model.lora.rank?"),
        ("ppo: {zzzzqqqq: 1}", [], "allowed here: policy_gradient, clip, epochs"),
        ("train: {steps: many}", [], "train.steps: got 'many'; a whole number is allowed"),
        ("train: {steps: true}", [], "train.steps: got true; a whole number is allowed"),
        ("train: {steps: 0}", [], "train.steps: got 0; 1 or more is allowed"),
        ("optim: {lr: '1e-4'}", [], "optim.lr: got '1e-4'; a number is allowed"),
        ("optim: {lr: .nan}", [], "optim.lr: got NaN"),
        ("sparse: {p: 0}", [], "sparse.p: got 0; a number above 0 is allowed"),
        ("sparse: {p: 1.5}", [], "sparse.p: got 1.5; 1 or less is allowed"),
        ("sparse: {rule: top}", [], "got 'top'; allowed: 'top_p', 'top_k', 'threshold' or"),
        ("supervised: {curriculum: 3}", [], "supervised.curriculum: got 3; a list is allowed"),
        ("supervised: {curriculum: [1, x]}", [], "supervised.curriculum.1: got 'x'; a whole"),
        ("train: 3", [], "train: got 3; a mapping of keys is allowed"),
        ("data: {mix: {digits: x}}", [], "data.mix.digits: got 'x'; a number is allowed"),
        (
            "budgets: {low: 0.9, high: 0.8}",
            [],
            "budgets.low (0.9) must be below budgets.high (0.8)",
        ),
        ("", ["train.steps"], "`train.steps`: an override is written key=value"),
        ("", ["=3"], "an override is written key=value"),
        ("", ["seed.a=3", "train.steps=x"], "command line: seed: got {"),
        ("seed: 3", ["seed.a=3"], "seed is 3, which has no keys of its own"),
        ("", ["train.steps=[1"], "command line: `train.steps=[1`:1: not YAML"),
        ("", ["train.stepz=1"], "command line: train.stepz: unknown key"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, text, overrides, expected):
    assert expected in fail(write(tmp_path, text), overrides)


def test_all_problems_are_listed_at_once(tmp_path):
    path = write(tmp_path, "train: {steps: 0, prompts: x}\nnope: 1")
    message = fail(path, [])
    assert message.count(f"{path}: ") == 3
    assert message.count("; ") == 5


def test_missing_file_lists_the_recipes_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no recipe in ./recipes" in fail("tiny.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").touch()
    assert fail("tiny.yaml") == (
        "tiny.yaml: no such file; recipes here: recipes/tiny.yaml; give the path of a recipe"
    )
    assert "this is a folder" in fail("recipes")


def test_binary_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in fail(path)


@given(
    lr=st.floats(1e-12, 10),
    steps=st.integers(1, 10**9),
    path=st.text(max_size=30),
    config=st.dictionaries(
        st.text(max_size=5),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(-1e9, 1e9)),
    ),
)
def test_dump_reads_back_to_the_same_hash(tmp_path_factory, lr, steps, path, config):
    recipe = validate(
        {"optim": {"lr": lr}, "train": {"steps": steps}, "model": {"path": path, "config": config}}
    )
    file = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    file.write_text(recipe.dump(), encoding="utf-8")
    assert load(file).sha256() == recipe.sha256()


def test_hash_depends_on_values_not_on_spelling(tmp_path):
    a = load(write(tmp_path, "seed: 1\noptim: {lr: 1e-4}"))
    b = load(write(tmp_path, "optim:\n  lr: 0.0001\nseed: 1"))
    assert a.sha256() == b.sha256() != Recipe().sha256()
    assert differences(Recipe(), a) == ["seed: 0 -> 1", "optim.lr: 1e-05 -> 0.0001"]


def test_every_shipped_recipe_is_valid():
    for path in Path(__file__).parents[2].glob("recipes/*.yaml"):
        load(path)


def test_a_target_needs_a_method_that_presses_and_emphasis_needs_greedy_answers():
    from zipr1.core.recipe import Data, Efficiency
    from zipr1.train.validate import check

    check(Recipe(efficiency=Efficiency(target=0.2), data=Data(emphasis=9.0)))
    with pytest.raises(InputError, match=r"target 0.2 needs .*method is answers; use pathwise"):
        check(Recipe(efficiency=Efficiency(method="answers", target=0.2)))
    with pytest.raises(InputError, match=r"sampling is grid; use stratified, or method answers"):
        check(Recipe(budgets={"sampling": "grid"}))
    with pytest.raises(InputError, match=r"emphasis 9.0 needs .* or data.emphasis=0"):
        check(Recipe(efficiency=Efficiency(max_accuracy_drop=None), data=Data(emphasis=9.0)))


def test_what_several_ranks_cannot_do(monkeypatch):
    with pytest.raises(InputError, match=r"optim\.name muon works on whole matrices"):
        check(Recipe(train={"parallel": "fsdp"}, optim={"name": "muon"}))
    with pytest.raises(InputError, match=r"train\.param_dtype bfloat16 .*use parallel fsdp"):
        check(Recipe(train={"param_dtype": "bfloat16"}))
    check(Recipe(train={"prompts": 3}))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"train\.prompts 3 leaves some of 4 ranks without"):
        check(Recipe(train={"prompts": 3}))
    check(Recipe(train={"stage": "supervised", "prompts": 3}))
