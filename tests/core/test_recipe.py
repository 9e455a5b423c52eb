"""Recipes: what they read, and that every mistake is one clear line."""

import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zipr1.core import config, recipes
from zipr1.core.errors import InputError
from zipr1.core.load import OLD_NAMES, differences, load, load_written, validate
from zipr1.core.methods import METHODS, parse
from zipr1.core.recipe import Optim, Recipe
from zipr1.train.optim import learning_rate
from zipr1.train.validate import check

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, text: str) -> Path:
    """A recipe file; without text one that holds no keys."""
    path = tmp_path / "r.yaml"
    path.write_text(text or "{}")
    return path


def fail(*args: object) -> str:
    with pytest.raises(InputError) as caught:
        load(*args)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


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
        ("ppo: {kl_koef: 1.0}", [], "ppo.kl_koef: unknown key; did you mean ppo.kl_coef?"),
        # A name that is near an old one, or is one elsewhere, leads to the new one.
        (
            "train: {promts: 1}",
            [],
            "train.promts: unknown key; did you mean train.prompts_per_step?",
        ),
        ("emphasis: 3", [], "emphasis: unknown key; did you mean data.hard_kind_boost?"),
        (
            "sparse: {count: 3}",
            [],
            "sparse.count: unknown key; did you mean budgets.num_generations?",
        ),
        ("optim: {betas: [0.9]}", [], "optim.betas: got [0.9]; "),
        ("optim: {betas: [0.9, 1.0]}", [], "optim.betas.1: got 1.0; a number below 1 is allowed"),
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


def test_recipes_come_by_name_and_a_file_of_that_name_is_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(recipes.names()) == shipped and recipes.names()[:2] == ["tiny", "tiny_base"]
    for name in ("tiny", "tiny.yaml", "recipes/tiny.yaml"):
        assert load(name).sha256() == load(ROOT / "recipes/tiny.yaml").sha256()
    (tmp_path / "tiny").mkdir()  # such as an exported folder: not a recipe
    assert load("tiny", ["seed=7"]).train.steps == 660
    (tmp_path / "tiny.yaml").write_text("seed: 5")
    assert load("tiny.yaml").seed == 5 and load("tiny").seed == 0
    assert "this is a folder" in fail(tmp_path)


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fail("tinny") == (
        "tinny: no such file and no recipe of that name; did you mean tiny? give the path of a YAML file, "
        f"or one of: {', '.join(recipes.names())}"
    )
    assert "elsewhere/tiny.yaml: no such file" in fail("elsewhere/tiny.yaml")
    assert fail("seed=3").startswith(
        "seed=3: the recipe comes first, then values: zipr1 train tiny"
    )


def test_a_recipe_is_copied_but_never_over_a_file(tmp_path):
    copied = recipes.copy("recipes/tiny.yaml", tmp_path)
    assert copied.read_bytes() == (ROOT / "recipes/tiny.yaml").read_bytes()
    copied.write_text("mine")
    with pytest.raises(InputError, match=r"tiny\.yaml: is there already and is never overwritten"):
        recipes.copy("tiny", tmp_path)
    assert copied.read_text() == "mine"


def test_an_empty_file_is_no_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    for text in ("", "# only a comment\n"):
        path.write_text(text)
        assert "the file holds nothing; a recipe is a mapping" in fail(path)
    assert load(write(tmp_path, "{}")) == Recipe()


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


def test_a_target_needs_a_method_that_presses_and_a_boost_needs_greedy_answers():
    from zipr1.core.recipe import Data, Efficiency
    from zipr1.train.validate import check

    check(Recipe(efficiency=Efficiency(target=0.2), data=Data(hard_kind_boost=9.0)))
    with pytest.raises(InputError, match=r"target 0.2 needs .*method is answers; use pathwise"):
        check(Recipe(efficiency=Efficiency(method="answers", target=0.2)))
    with pytest.raises(InputError, match=r"sampling is grid; use stratified, or method answers"):
        check(Recipe(budgets={"sampling": "grid"}))
    for sampling in ("grid", "stratified"):
        with pytest.raises(
            InputError, match=rf"sampling is {sampling}.*use independent, or method"
        ):
            check(Recipe(efficiency={"method": "cut+pathwise"}, budgets={"sampling": sampling}))
    check(Recipe(efficiency={"method": "cut"}, budgets={"sampling": "independent"}))
    with pytest.raises(InputError, match=r"hard_kind_boost 9.0 needs .* or data.hard_kind_boost=0"):
        check(Recipe(efficiency=Efficiency(max_accuracy_drop=None), data=Data(hard_kind_boost=9.0)))


def test_what_several_ranks_cannot_do(monkeypatch):
    with pytest.raises(InputError, match=r"optim\.name muon works on whole matrices"):
        check(Recipe(train={"parallel": "fsdp"}, optim={"name": "muon"}))
    with pytest.raises(InputError, match=r"train\.param_dtype bfloat16 .*use parallel fsdp"):
        check(Recipe(train={"param_dtype": "bfloat16"}))
    check(Recipe(train={"prompts_per_step": 3}))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        InputError, match=r"train\.prompts_per_step 3 leaves some of 4 ranks without"
    ):
        check(Recipe(train={"prompts_per_step": 3}))
    check(Recipe(train={"stage": "supervised", "prompts_per_step": 3}))


# Each old name with a value under it, and what the recipe then holds.
OLD = {
    "budgets.count": ("3", 3),
    "data.emphasis": ("2.5", 2.5),
    "efficiency.reach": ("0.25", 0.25),
    "optim.schedule": ("constant", "constant_with_warmup"),
    "ppo.dense": ("0.5", 0.5),
    "ppo.kl": ("0.25", 0.25),
    "ppo.scale": ("std", "std"),
    "rewards.correct": ("choice", "choice"),
    "train.prompts": ("5", 5),
}


def value_of(recipe: Recipe, key: str):
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def as_file(key: str, value: str) -> str:
    section, name = key.split(".")
    return f"{section}: {{{name}: {value}}}"


def test_every_old_name_is_tried_here():
    assert set(OLD) == set(OLD_NAMES)


@pytest.mark.parametrize("key", OLD)
def test_an_old_name_works_in_a_file_and_on_the_command_line(tmp_path, caplog, key):
    (text, value), new = OLD[key], OLD_NAMES[key]
    found = load(write(tmp_path, as_file(key, text)))
    assert value_of(found, new) == value != value_of(Recipe(), new)
    (line,) = caplog.messages
    assert f"{tmp_path}/r.yaml: old names of recipe keys" in line and f"{key} -> {new}" in line
    assert caplog.records[0].levelname == "WARNING" and caplog.records[0].name == "zipr1"
    caplog.clear()
    assert load(write(tmp_path, ""), [f"{key}={text}"]) == found
    (line,) = caplog.messages
    assert f"{key} -> {new}" in line
    # The same hash, and the command line has the last word, whichever name each of them uses.
    assert found.sha256() == validate({new.split(".")[0]: {new.split(".")[1]: value}}).sha256()
    was = value_of(Recipe(), new)
    for below in (key, new):
        for above in (key, new):
            default = {"cosine": "one_cycle"}.get(was, was) if below == key else was
            path = write(tmp_path, as_file(below, default))
            on_top = text if above == key else value
            assert load(path, [f"{above}={on_top}"]) == found, (below, above)


@pytest.mark.parametrize("key", OLD)
def test_both_names_of_a_key_are_refused_in_one_line(tmp_path, key):
    (text, value), new = OLD[key], OLD_NAMES[key]
    section, name = key.split(".")
    both = f"{key} and {new} are the old and the new name of one key; keep the new one"
    file = f"{section}: {{{name}: {text}, {new.split('.')[1]}: {value}}}"
    assert fail(write(tmp_path, file)) == f"{tmp_path}/r.yaml: {both}"
    overrides = [f"{new}={value}", f"{key}={text}"]
    assert fail(write(tmp_path, ""), overrides) == f"command line: {both}"
    whole = f"{section}={{{name}: {text}, {new.split('.')[1]}: {value}}}"
    assert fail(write(tmp_path, ""), [whole]) == f"command line: {both}"


def test_all_old_names_are_told_in_one_line(tmp_path, caplog):
    text = "".join(f"{as_file(key, text)}\n" for key, (text, _) in OLD.items() if key != "ppo.kl")
    text = text.replace("ppo: {dense: 0.5}\nppo: {scale: std}", "ppo: {dense: 0.5, scale: std}")
    load(write(tmp_path, text), ["ppo={kl: 2.0, kl_estimator: k2}"])
    (line,) = caplog.messages
    assert "\n" not in line
    told = [f"{old} -> {new}" for old, new in OLD_NAMES.items()]
    # The command line replaced the section `ppo` as a whole, the file had its keys all the same.
    assert all(pair in line for pair in told)
    caplog.clear()
    load(write(tmp_path, "ppo: {kl_coef: 1.0}"), ["train.prompts_per_step=3"])
    assert not caplog.messages


def test_a_run_that_was_written_with_old_names_is_read_without_a_word(tmp_path, caplog):
    """A run's recipe.yaml names every key. The program reads it back: nothing is said, and nothing differs."""
    new = Recipe().model_dump(mode="json")
    old = {section: dict(part) if isinstance(part, dict) else part for section, part in new.items()}
    for key, today in OLD_NAMES.items():
        section, name = key.split(".")
        old[section][name] = old[section].pop(today.split(".")[1])
    old["optim"]["schedule"] = "one_cycle"
    for later in ("betas", "min_lr_ratio"):
        del old["optim"][later]
    del old["efficiency"]["controller"]
    path = write(tmp_path, yaml.safe_dump(old))
    assert differences(load_written(path), Recipe()) == []
    assert load_written(path).sha256() == Recipe().sha256()
    assert not caplog.messages
    load(path)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("old", "new", "rates"),
    [
        # 8 steps, 2 of warm-up, then (1 + cos(pi (i + 0.5) / 6)) / 2 of what is above the floor.
        ("one_cycle", "cosine", {0: 0.5, 1: 1.0, 2: 0.982963, 4: 0.629410, 7: 0.017037}),
        ("cosine", "cosine_with_min_lr", {1: 1.0, 2: 0.984667, 4: 0.666469, 7: 0.115333}),
        ("constant", "constant_with_warmup", {0: 0.5, 1: 1.0, 2: 1.0, 7: 1.0}),
    ],
)
def test_schedules_by_hand_under_both_names(tmp_path, old, new, rates):
    settings = load(write(tmp_path, f"optim: {{schedule: {old}, lr: 2.0, warmup: 0.25}}")).optim
    assert settings == Optim(lr_scheduler_type=new, lr=2.0, warmup=0.25)
    assert load(write(tmp_path, ""), [f"optim.schedule='{old}'"]).optim.lr_scheduler_type == new
    for step, share in rates.items():
        assert learning_rate(settings, step, 8) == pytest.approx(2 * share, abs=1e-5)


def test_the_floor_of_the_schedule_is_a_key():
    settings = Optim(lr_scheduler_type="cosine_with_min_lr", min_lr_ratio=0.4, lr=1.0, warmup=0.0)
    assert learning_rate(settings, 999_999, 1_000_000) == pytest.approx(0.4)
    assert learning_rate(settings, 0, 1_000_000) == pytest.approx(1.0)


def test_a_value_that_the_old_schedule_did_not_have_is_refused(tmp_path):
    message = fail(write(tmp_path, "optim: {schedule: linear}"))
    assert "optim.lr_scheduler_type: got 'linear'; allowed: 'cosine', 'cosine_with" in message


def test_a_bad_value_under_an_old_name_is_blamed_on_who_gave_it(tmp_path):
    path = write(tmp_path, "")
    message = fail(path, ["train.prompts=0"])
    assert message == "command line: train.prompts_per_step: got 0; 1 or more is allowed"
    assert fail(write(tmp_path, "ppo: {kl: x}")).startswith(f"{path}: ppo.kl_coef: got 'x'; ")


def test_names_of_efficiency_methods():
    assert parse("pathwise") == {"pathwise"}
    assert parse("cut + pathwise") == {"cut", "pathwise"}
    assert parse("+".join(METHODS)) == set(METHODS)
    with pytest.raises(InputError, match=r"no method 'pathwize'; did you mean 'pathwise'\?"):
        parse("cut+pathwize")
    with pytest.raises(InputError, match="Allowed: answers, cut, pathwise, through"):
        parse("")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: &a [*a]", "seed: got a list that cannot be shown; a whole number is allowed"),
        ("rewards: {check: 0x" + "f" * 5000 + "}", "check: got an int that cannot be shown; text is"),
        ("rewards: {check: " + "9" * 5000 + "}", "not YAML: Exceeds the limit"),
        ("seed: {2020-01-01: 1}", "seed: got a dict that cannot be shown; a whole number is allowed"),
        ("[" * 200 + "]" * 200, "the file holds [[["),
    ],
    ids=["itself", "hexadecimal", "digits", "date", "deep"],
)  # fmt: skip
def test_a_value_that_cannot_be_shown_is_one_line(tmp_path, text, said):
    assert said in fail(write(tmp_path, text))


def bomb(line: str) -> str:
    """Each line says the one before twice: 2^60 values."""
    lines = ["a0: &a0 {k: 1}", *(line.format(i=i, b=i - 1) for i in range(1, 60))]
    return "\n".join([*lines, "seed: *a59"])


@pytest.mark.parametrize(
    "line",
    ["a{i}: &a{i} [*a{b}, *a{b}]", "a{i}: &a{i} {{x: *a{b}, y: *a{b}}}", "a{i}: &a{i} {{<<: [*a{b}, *a{b}]}}"],
    ids=["lists", "mappings", "merged"],
)  # fmt: skip
def test_aliases_of_aliases_are_not_written_out(tmp_path, line):
    said = "not YAML: its aliases stand for more than 100,000 values"
    assert said in fail(write(tmp_path, bomb(line)))
    # On the command line.
    assert said in fail("tiny", ["model.config={" + bomb(line).replace("\n", ", ") + "}"])


def test_aliases_are_allowed_as_far_as_they_are_written_out(tmp_path, monkeypatch):
    text = "data: {columns: &x {a: b}}\nmodel: {config: {<<: *x, c: *x}}\n"
    recipe = load(write(tmp_path, text))
    assert recipe.model.config == {"a": "b", "c": {"a": "b"}}
    monkeypatch.setattr(config, "MOST", 10)
    for more in (8, 9):  # with the list itself and the first: ten values, and eleven
        text = "[" + ", ".join(["&a 1", *["*a"] * more]) + "]"
        if more == 8:
            assert config.parse(text, "x") == [1] * 9
        else:
            with pytest.raises(InputError, match="x:1: not YAML: its aliases stand for more than"):
                config.parse(text, "x")


@pytest.mark.parametrize(
    "value", ["a/b.jsonl", "a b's", "1", "true", "rows.json:[:-5]", "a: b", "#x", "", "[x", True]
)
def test_an_assignment_is_typed_as_it_is_read(value):
    (word,) = shlex.split(config.assignment("data.source", value))
    values: dict[str, object] = {}
    config.override(values, word)
    assert values == {"data": {"source": value}}


def test_a_run_of_before_opens_as_it_was(tmp_path):
    """Its recipe.yaml has keys that are gone, and lacks some that a new run has; a recipe of one's own may not."""
    written = yaml.safe_load(Recipe(seed=7).dump())
    written["efficiency"] |= {"step": 1.0, "max_multiplier": 10.0}
    written["efficiency"]["controller"]["task_ema_rate"] = 0.01
    del written["efficiency"]["guard"], written["train"]["average"], written["ppo"]["loss_per"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    found = load_written(path)
    assert differences(Recipe(seed=7), found) == [
        "ppo.loss_per: 'token' -> 'answer'",
        "train.average: 0.98 -> 0.0",
    ]
    with pytest.raises(InputError, match=r"efficiency\.step: unknown key"):
        load(path)
