"""What is counted before a run: parameters against transformers' own models, memory against a measured peak."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tinymodels
import torch
import transformers
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

import zipr1
from zipr1.core import machine
from zipr1.core.errors import InputError
from zipr1.core.load import load
from zipr1.core.recipe import Budgets, Efficiency, Lora, Model, Ppo, Recipe, Sparse, Train
from zipr1.data.digits import tasks
from zipr1.models import memory
from zipr1.models.cost import Shape, bundled, shape_of
from zipr1.models.encoder import MediaEncoder
from zipr1.models.loading import add_lora
from zipr1.models.planned import bundled_shape
from zipr1.models.token_budget import token_budget
from zipr1.profiling import session as profiling
from zipr1.train import dry_run as plan
from zipr1.train.controller import EfficiencyController
from zipr1.train.dry_run import dry_run
from zipr1.train.minibatch import flatten
from zipr1.train.rollout import roll_out
from zipr1.train.update import backward

CONFIGS = Path(zipr1.__file__).parent / "assets" / "configs"


def on_meta(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    kind = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(kind)


@pytest.mark.parametrize("name", bundled())
def test_parameters_are_those_of_transformers(name):
    model, counts = on_meta(name), memory.parameters(shape_of(name))
    assert counts["vision"] == sum(p.numel() for p in model.model.visual.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_a_model_whose_sizes_do_not_tell_is_counted_from_its_class():
    """Qwen3.5-9B: 8.95 thousand million parameters of language, as published, beside its tower; its adapters by peft;
    keys and values in 8 of 32 layers."""
    s = bundled_shape("Qwen/Qwen3.5-9B")
    counts = memory.parameters(s)
    assert (counts["decoder"] + counts["embeddings"]) / 1e9 == pytest.approx(8.95, rel=0.001)
    values = json.loads((CONFIGS.parent / "planned" / "qwen3.5-9b.json").read_text())
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**values)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    adapted = add_lora(model, Lora(rank=8))
    assert memory.adapters(s, 8) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert memory.cache_bytes(s, 2) == 8 * 2 * 4 * 256 * 2
    assert bundled_shape("Qwen/Qwen3.5-9000B") is None


def test_adapters_are_those_of_peft():
    model = add_lora(on_meta("qwen2.5-vl-3b"), Lora(rank=8))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.adapters(shape_of("qwen2.5-vl-3b"), 8) == count


def highest(work):
    """Most bytes that tensors held at once during `work`, above what they held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    held = top = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_within_a_factor_of_two_of_the_measured_peak(checkpointing):
    policy = tinymodels.make(checkpointing=checkpointing)
    recipe = Recipe(
        model=Model(gradient_checkpointing=checkpointing),
        sparse=Sparse(dense_below=0, probes={"recent": 8, "random": 8}),
        budgets=Budgets(low=0.6, high=0.9, num_generations=4),
        ppo=Ppo(kl_coef=0.0),
        train=Train(prompts_per_step=1, micro_batch=4, max_new_tokens=4),
    )
    prompts = tasks.prompts("test", "moving_digits", 1, 1, seed=0)
    pictures = MediaEncoder(policy, recipe)
    encoded = pictures.encode(prompts)
    seen = pictures.encode_vision(encoded)
    batch = roll_out(policy, recipe, prompts, encoded, seen.policy, 0, seen.reference)
    rows = flatten(batch, recipe, EfficiencyController(Efficiency(weight=1.0), policy.layers))
    for _, parameter in policy.trainable():
        parameter.grad = torch.zeros_like(parameter)  # counted on their own
    measured = highest(lambda: backward(policy, recipe, batch, rows, [0, 1, 2, 3], 1.0))
    shape = Shape.of(policy.model.config.to_dict())
    parts = memory.memory(shape, recipe, len(encoded[0]), 4)
    counted = parts["activations"] + parts["logits"]
    assert measured / 2 < counted < 2 * measured, (counted, measured)


def test_fixed_parts_are_exact():
    policy = tinymodels.make()
    policy.keep_reference()
    shape, recipe = Shape.of(policy.model.config.to_dict()), Recipe()
    parts = memory.memory(shape, recipe, 100, 4)
    own = sum(p.numel() for _, p in policy.trainable())
    tower = sum(p.numel() for p in policy.model.model.visual.parameters())
    assert parts["weights"] == 4 * sum(p.numel() for p in policy.model.parameters())
    assert parts["reference"] == parts["weights"] - 4 * tower
    assert parts["gradients"] == 4 * own and parts["optimizer"] == 8 * own


def test_a_cpu_holds_half_of_what_an_update_makes_besides():
    s, recipe = shape_of("qwen2.5-vl-3b"), Recipe()
    gpu, cpu = (memory.memory(s, recipe, 500, cpu=on_cpu) for on_cpu in (False, True))
    half = (gpu["activations"] + gpu["logits"]) // 2
    assert gpu["allocator"] == 0 and cpu["allocator"] == half
    assert cpu["peak"] - gpu["peak"] == half
    assert {k: v for k, v in cpu.items() if k not in ("allocator", "peak")} == {
        k: v for k, v in gpu.items() if k not in ("allocator", "peak")
    }


def test_sharding_divides_and_memory_grows_with_what_it_should():
    s = shape_of("qwen2.5-vl-7b")
    sharded = Recipe(train=Train(parallel="fsdp"))
    one, eight = (memory.memory(s, sharded, 1000, ranks=n) for n in (1, 8))
    assert eight["optimizer"] * 8 == one["optimizer"]
    assert memory.memory(s, Recipe(), 1000, ranks=8)["optimizer"] == one["optimizer"]
    longer = memory.memory(s, Recipe(), 2000)
    assert longer["activations"] > 1.9 * memory.memory(s, Recipe(), 1000)["activations"]
    # Logits do not grow with the answers once they are worked on in chunks.
    few, many = (
        memory.memory(s, Recipe(train=Train(max_new_tokens=n)), 1000)["logits"] for n in (64, 512)
    )
    assert few == many


def test_sharded_models_are_whole_while_they_load_and_while_they_answer():
    s, every = shape_of("qwen2.5-vl-7b"), 4
    counts = memory.parameters(s)
    total, tower = sum(counts.values()), counts["vision"]
    train = {"parallel": "fsdp", "micro_batch": 1}
    plain, mixed = (
        memory.memory(s, Recipe(train=Train(**train, param_dtype=d)), 500, ranks=64)
        for d in (None, "bfloat16")
    )
    for parts in (plain, mixed):
        assert parts["loading"] == every * (2 * total - tower) <= parts["peak"]
        assert parts["optimizer"] == 8 * (total - tower) // 64
        assert parts["weights"] == every * (total - tower) // 64 + every * tower
    assert plain["gathered"] == 4 * (total - tower) == 2 * mixed["gathered"]
    assert memory.memory(s, Recipe(train=Train(**train)), 500)["gathered"] == 0


RECIPES = sorted(
    p for p in Path(__file__).parents[2].glob("recipes/*.yaml") if not p.name.startswith("tiny")
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_planned_without_network_or_gpu(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    recipe = load(path)
    result = dry_run(recipe, None, console)
    text = console.export_text()
    assert "not checked here" in text and "tokenizer" in text and "data (" in text
    for shown in ("visual tokens", "rollout rows", "memory, peak", "steps", "at most 3 kept"):
        assert shown in text
    # What more ranks do not lower is needed before the weights are divided among them: with four and eight ranks, and
    # with a running average of the weights, of which four need more, with eight.
    ranks = 1 if recipe.train.average else 2
    assert text.count("59.3 GiB, while loading whole") == (
        ranks if recipe.train.parallel == "fsdp" else 0
    )
    assert "0.0 B" not in text and (
        ("peak on each of 8" in text) == (recipe.train.parallel == "fsdp")
    )
    # What the header promises is what is counted, rounded to whole GiB; and it fits with 2 GiB to spare.
    header = path.read_text()
    ranks = 8 if recipe.train.parallel == "fsdp" else 1
    peak = result["memory"]["peak" if ranks == 1 else "peak_of_8_ranks"] / 2**30
    assert f"{peak:.0f} GiB" in header
    assert f"{result['a100_hours'] / ranks:,.0f} hours" in header
    assert f"zipr1 train recipes/{path.name}" in header
    card = 24e9 if "24 GB" in header else 80e9
    assert peak * 2**30 < card - 2 * 2**30
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_no_datasets_library_and_a_known_model_needs_no_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = next(p for p in RECIPES if p.stem == "qwen2vl")
    result = dry_run(load(path), None, Console(quiet=True))
    assert "needs the datasets library" in result["not_checked"]
    with pytest.raises(InputError, match=r"model\.path: nobody/nothing is not on this machine"):
        dry_run(load(path, ["model.path=nobody/nothing"]), None, Console(quiet=True))


def test_data_that_is_here_is_checked_though_the_model_is_not(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q"}\n')
    path = next(p for p in RECIPES if p.stem == "qwen2vl")
    changes = [f"data.{key}={tmp_path / 'rows.jsonl'}" for key in ("source", "heldout")]
    changes += ["data.columns={}", "data.on_bad_row=error"]
    with pytest.raises(InputError, match=r"rows\.jsonl: row 1: no answer; columns: question"):
        dry_run(load(path, changes), None, Console(quiet=True))
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "x"}\n')
    result = dry_run(load(path, changes), None, Console(quiet=True))
    assert result["training_prompts"] == 1
    assert "tokenizer" in result["not_checked"] and "data" not in result["not_checked"]


def test_files_that_were_read_do_not_make_a_model_too_large(monkeypatch):
    """What the page cache holds is free: MemAvailable counts, not the pages that are unused at this moment."""
    recipe = load(next(p for p in RECIPES if p.stem == "qwen2vl"), ["model.path=Qwen/Qwen2-VL-2B"])
    needed = sum(memory.parameters(shape_of("qwen2-vl-2b")).values()) * memory.weight_bytes(recipe)
    unused, read, sysconf = 2**30, Path.read_text, os.sysconf
    loaded, unchecked = [], list[str]()
    available = 0

    def told(path, *arguments, **options):
        if str(path) == "/proc/meminfo":
            return f"MemFree: {unused // 1024} kB\nMemAvailable: {available // 1024} kB\n"
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", told)
    monkeypatch.setattr(
        os,
        "sysconf",
        lambda n: unused // sysconf("SC_PAGE_SIZE") if n == "SC_AVPHYS_PAGES" else sysconf(n),
    )
    monkeypatch.setattr(plan, "is_here", lambda *a: True)
    monkeypatch.setattr(plan, "load_policy", lambda *a: loaded.append(a))
    available = needed + 2**20
    plan._policy(recipe, "cpu", unchecked)
    assert loaded and not unchecked
    available = needed - 2**20
    assert plan._policy(recipe, "cpu", unchecked) is None
    assert len(loaded) == 1 and "are free" in unchecked[0]


def test_one_memory_model_for_the_plan_the_budget_of_a_pass_and_the_profile(monkeypatch):
    """Each of the three asked for what it counts; the numbers by hand: 3 layers of width 64, MLP 96, 2 KV heads of 16,
    float32."""
    policy = tinymodels.shared()
    layer, cache = 4 * (24 * 64 + 3 * 96), 4 * 3 * 2 * 2 * 16
    shape = Shape.of(policy.model.config.to_dict())
    # The plan: one row, whose update keeps all layers; the probes' scores are besides.
    recipe = Recipe(train=Train(prompts_per_step=1, micro_batch=1, max_new_tokens=10))
    parts = memory.memory(shape, recipe, 90, 4)
    assert parts["kv_cache"] == 100 * cache
    assert parts["activations"] == 3 * (100 * layer + 2 * 4 * 90 * 90 * 4)
    # A pass: tokens that 70 % of the free memory holds.
    free = 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    on_gpu = SimpleNamespace(
        device=torch.device("cuda"),
        model=policy.model,
        decoder=policy.decoder,
        name="x",
        processor=policy.processor,
    )
    assert token_budget(on_gpu, recipe, update=True) == int(0.7 * free / (3 * layer))
    assert token_budget(on_gpu, recipe, update=False) == int(0.7 * free / (cache + layer))
    # A profile: one layer beside a dense and a sparse cache, in nine tenths of what is free.
    built = SimpleNamespace(device=torch.device("cpu"), shape=replace(shape, size=4))
    need = 64 * 2 * (layer + 2 * cache)
    monkeypatch.setattr(machine, "free_memory", lambda: int(need / 0.9) + 1)
    profiling._check_memory(built, 64, 2)
    monkeypatch.setattr(machine, "free_memory", lambda: int(need / 0.9) - 1)
    with pytest.raises(MemoryError, match="are free"):
        profiling._check_memory(built, 64, 2)
