"""The theoretical card: sums by hand, the bounds known from elsewhere, sizes of real classes."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch

from zipr1.core.errors import InputError
from zipr1.models import cost

# Hidden 8, 2 layers, 2 query heads and 1 key head of dimension 4, MLP 16; a tower of hidden 4 that merges 2 x 2.
TOY = cost.Shape("toy", 8, 2, 2, 1, 4, 16, 10, 100, 1, 4, 6, True, 1, 4, 14, 2, 2)


def test_a_dense_layer_by_hand():
    work = cost.layer(TOY, 10, 1.0, "none", 5)
    assert work["projections"].flops == 2 * 10 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8)
    assert work["attention"].flops == sum(2 * 2 * 2 * 4 * seen for seen in range(1, 11))
    assert work["mlp"].flops == 2 * 10 * 3 * 8 * 16
    assert work["scoring"].flops == 0
    # Weights and, of 10 tokens, what goes in and comes out, two bytes each.
    assert work["mlp"].bytes == 2 * ((8 * 32 + 10 * 40) + (16 * 8 + 10 * 24))


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_sparse_layer_by_hand(skip):
    work = cost.layer(TOY, 10, 0.3, skip, 2, batch=3)
    n, through, asked = (3, 3, 5) if skip == "layer" else (3, 10, 10)
    assert work["projections"].flops == 3 * 2 * (asked * 64 + 10 * 32 + through * 32 + n * 64)
    assert work["attention"].flops == 3 * sum(2 * 2 * 2 * 4 * seen for seen in range(1, 4))
    assert work["mlp"].flops == 3 * 2 * through * 3 * 8 * 16
    assert work["scoring"].flops == 3 * 2 * 2 * 2 * 4 * 10


def test_the_known_bounds_of_qwen25_vl_7b():
    """arXiv 2504.18579's arithmetic at 25 % kept: at most 1.10x to 2.78x if dropped tokens still run the MLP."""
    shape = dataclasses.replace(cost.shape_of("qwen2.5-vl-7b"), limit=2**17)
    lengths = [4096, 16384, 32768, 131072]
    rows = [r for r in cost.card(shape, lengths, [0.25], 128, 1) if r["phase"] == "prefill_layer"]
    bounds = {k: [r["bound"] for r in rows if r["skip"] == k] for k in ("attention", "layer")}
    assert bounds["attention"] == pytest.approx([1.10, 1.28, 1.52, 2.78], rel=0.01)
    assert bounds["layer"] == pytest.approx([4.0, 4.6, 5.2, 7.9], rel=0.01)


def test_memory_and_a_step_by_hand():
    assert cost.kv_bytes(TOY, 10, 1.0, "none") == 2 * 2 * 1 * 4 * 10 * 2
    assert cost.kv_bytes(TOY, 10, 0.3, "layer", batch=2) == 2 * 2 * 2 * 1 * 4 * 3 * 2
    step = cost.decode(TOY, 10, 0.3, "layer", batch=2)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16) + 8 * 10
    assert step.flops == 2 * (2 * weights + 2 * 2 * 2 * 2 * 4 * 3)
    assert step.bytes == 2 * weights + 2 * 2 * 2 * 1 * 4 * 3 * 2


def test_the_tower_by_hand():
    """3 visual tokens are 12 patches; windows hold 4, and the one block attends to all."""
    patches, weights = 12, 4 * 16 + 3 * 6 * 4
    flops = 2 * patches * (weights + 3 * 2 * 14 * 14 * 4) + 2 * 3 * (16 * 16 + 16 * 8)
    assert cost.vision(TOY, 3).flops == flops + 4 * patches * patches * 4
    windowed = dataclasses.replace(TOY, full_blocks=0)
    assert cost.vision(windowed, 3).flops == flops + 4 * patches * 4 * 4
    assert cost.vision(TOY, 0) == cost.Work(0, 0)
    two = cost.vision(TOY, 2 * cost.PICTURE)
    assert two.flops == 2 * cost.vision(TOY, cost.PICTURE).flops, "pictures do not see each other"


# In thousand millions of parameters.
PUBLISHED = {
    "qwen2-vl-2b": 2.21,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen3-vl-4b": 4.44,
    "qwen3-vl-8b": 8.77,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bundled_sizes_are_those_of_the_real_classes(name):
    from importlib.resources import files

    from transformers import AutoConfig, AutoModelForImageTextToText

    shape = cost.shape_of(name)
    values = json.loads((files("zipr1") / "assets" / "configs" / f"{name}.json").read_text())
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    layer = model.get_decoder().layers[0]
    products = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert products == shape.layer_weights
    assert len(model.get_decoder().layers) == shape.layers
    size = sum(p.numel() for p in model.parameters()) / 1e9
    assert size == pytest.approx(PUBLISHED[name], rel=0.005)


def test_every_bundled_config_has_a_card():
    assert len(cost.bundled()) == 10
    for name in [*cost.bundled(), "tiny"]:
        shape = cost.shape_of(name)
        rows = cost.card(shape, [256, 1024], [0.1, 1.0], 64, 8, visual=0.5)
        assert len(rows) == 2 * 2 * 2 * 4
        for row in rows:
            assert row["batch"] == 8 and row["bound"] > 0.9
            if row["keep"] == 0.1 and row["phase"] == "kv_cache":
                assert row["bound"] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen2.5-vl-8b"], "did you mean qwen2.5-vl-7b?"),
        (["--keep", "0"], "--keep 0: outside (0, 1]; give shares"),
        (["--keep", "1.5"], "--keep 1.5: outside (0, 1]; give shares"),
        (["--keep", "a quarter"], "--keep a quarter: give numbers"),
        (["--lengths", "0"], "--lengths 0: give 1 or more"),
        (["--lengths", "999999", "--model", "qwen2-vl-7b"], "outside 1..32768, what qwen2-vl-7b"),
        (["--visual", "2"], "visual 2.0 is not in [0, 1]"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, monkeypatch, capsys):
    from zipr1.cli import main

    monkeypatch.setattr(sys, "argv", ["zipr1", "profile", "--card", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_other_folders_and_families(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        InputError, match="model_type is 'llama'; allowed: qwen2_vl, qwen2_5_vl, qwen3_vl"
    ):
        cost.shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(InputError, match="the config has no embed_dim"):
        cost.shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        cost.shape_of(str(tmp_path))


def test_the_command_loads_no_torch_and_ends_with_json():
    code = (
        "import sys; from zipr1.cli import main\n"
        "sys.argv = ['zipr1', 'profile', '--card', '--model', 'qwen2.5-vl-3b', '--lengths', '4096,16384', '--keep',"
        " '0.1', '--keep', '0.25', '--json']\n"
        "try: main()\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] == "qwen2.5-vl-3b"
    assert {(r["length"], r["keep"]) for r in found["rows"]} == {
        (n, k) for n in (4096, 16384) for k in (0.1, 0.25)
    }
    # Of keys and values a share is saved: x is times faster, and nothing else.
    assert "KV saved" in done.stderr and re.search(
        r"4,096 +25% +layer +\d\.\d\dx .* 75\.0% ", done.stderr
    )
