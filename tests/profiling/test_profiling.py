"""Measured profiles: what is counted by hand, what is forced, what is refused; never how long something takes."""

import copy
import json
import re
import sys

import pytest
import tinymodels
import torch
import torch.nn.functional as F

from zipr1.core import machine
from zipr1.core.errors import InputError
from zipr1.core.phases import Stopwatch, phase
from zipr1.core.recipe import Sparse
from zipr1.models import cost
from zipr1.models.sparse.attention import ATTENTION
from zipr1.models.sparse.cache import PrunedCache
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import PromptBatch, Request
from zipr1.profiling import counting, measure, rows, subject
from zipr1.profiling.rates import Rates
from zipr1.profiling.request import check
from zipr1.profiling.session import ProfileRequest, profile


@pytest.fixture(scope="module")
def tiny():
    return subject.load("tiny", None, "cpu", "auto", 8)


@torch.no_grad()
def test_fused_attention_is_counted_causally():
    q, k, v = (torch.randn(2, heads, 10, 16) for heads in (4, 2, 2))
    with counting.operations() as count:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # Query i of 10 sees i + 1 keys: 55 pairs, for 2 samples and 4 heads, 16 dimensions in each of two products.
    assert count.flops == 2 * 2 * 4 * 55 * (16 + 16)
    with counting.operations() as count:
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(10, 10, dtype=torch.bool))
    assert count.flops == 2 * 2 * 4 * 100 * (16 + 16)
    assert counting.attention_flops((1, 1, 4, 1), (1, 1, 2, 1), (1, 1, 2, 1), True) == 4 * (
        1 + 2 * 3
    )


@pytest.mark.parametrize("keep", [0.1, 0.25])
@pytest.mark.parametrize("batch", [1, 3])
def test_counted_operations_are_the_cards(tiny, keep, batch):
    s, length, probes = tiny.shape, 120, 8
    inputs = tiny.random(length, batch)
    n = cost.kept_tokens(length, keep)

    def expected(skip):
        return s.layers * cost.add(cost.layer(s, length, keep, skip, probes, batch).values()).flops

    def counted(variant):
        return rows.counted(tiny, inputs, variant)

    flops, step = counted(measure.Variant("none", 1.0))
    assert flops == expected("none")
    # The step's query sees the prompt and itself.
    assert step == cost.decode(s, length + 1, 1.0, "none", batch).flops
    # Scores are summed over heads and probes by a product with ones; the kept keys are projected twice in `layer`.
    ones = 2 * batch * s.layers * s.q_heads * probes * length
    again = 2 * batch * s.layers * n * s.hidden * s.heads * s.dim
    for skip, more in (("attention", ones), ("layer", ones + again)):
        flops, step = counted(measure.sparse_variant(tiny, inputs, skip, keep))
        assert flops == expected(skip) + more
        assert step == cost.decode(s, n + 1, 1.0, "none", batch).flops


@pytest.mark.parametrize("skip", ["attention", "layer"])
@pytest.mark.parametrize("keep", [0.03, 0.25, 0.5, 0.99, 1.0])
def test_keep_ratios_are_forced_exactly(tiny, skip, keep):
    inputs = tiny.random(100, 2)
    variant = measure.sparse_variant(tiny, inputs, skip, keep)
    for _ in range(2):
        _, cache = measure.prefill(tiny, inputs, variant)
        assert variant.request.settings.rule == "top_p"
        assert cache.prompt_counts().tolist() == [[round(100 * keep)] * 4] * 2
    assert rows.realised(variant) == pytest.approx(keep)


@torch.no_grad()
def test_memory_is_what_is_alive_at_once():
    with counting.Memory() as used:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        del b
        d = c.view(10, 100)[2:]
        e = torch.zeros(100)
        del c, d, e
        torch.zeros(50)
    assert used.peak == 2 * 4000


def test_phases_exclude_what_runs_inside(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 4.0, 10.0, 12.0])
    monkeypatch.setattr("zipr1.core.phases.time.perf_counter", lambda: next(ticks))
    watch = Stopwatch()
    with phase("nobody listens"):
        pass
    with watch.listening():
        with phase("outer"), phase("inner"):  # 0, 1 to 3, 4
            pass
        with phase("inner"):  # 10 to 12
            pass
    assert watch.seconds == {"outer": 2.0, "inner": 4.0}


def spans_of(trace):
    return {e.key: e.count for e in trace.key_averages() if e.key.startswith("zipr1/")}


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_users_trace_shows_the_phases(tiny, skip):
    """Each of four layers scores once and attends once, and what ran inside lies below its span."""
    inputs = tiny.random(64, 1)
    variant = measure.sparse_variant(tiny, inputs, skip, 0.25)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        measure.prefill(tiny, inputs, variant)
    found = spans_of(trace)
    assert set(found) == {f"zipr1/{p}" for p in ("scoring", "selection", "attention", "gathers")}
    assert found["zipr1/scoring"] == found["zipr1/attention"] == 4
    scored = [e for e in trace.events() if e.name == "zipr1/scoring"]
    assert all(any("bmm" in child.name for child in descendants(e)) for e in scored)


def descendants(event):
    for child in event.cpu_children:
        yield child
        yield from descendants(child)


def test_a_stopwatch_and_a_trace_hear_the_same_phases(monkeypatch):
    watch = Stopwatch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        with watch.listening(), phase("outer"), phase("inner"):
            pass
        with phase("alone"):
            pass
    assert set(watch.seconds) == {"outer", "inner"}
    assert spans_of(trace) == {"zipr1/outer": 1, "zipr1/inner": 1, "zipr1/alone": 1}

    def made(name):
        raise AssertionError(f"a span of {name} although nobody traces")

    monkeypatch.setattr(torch.profiler, "record_function", made)
    with watch.listening(), phase("outer"):
        pass
    with phase("alone"):
        pass


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_phases_add_up_to_the_decoder(tiny, skip):
    inputs = tiny.random(64, 1)
    variant = measure.sparse_variant(tiny, inputs, skip, 0.25)
    with measure.watched(tiny) as watch:
        took = measure.prefill(tiny, inputs, variant)[0]["decoder"]
    assert set(watch.seconds) == {
        "projections", "mlp", "norms", "scoring", "selection", "attention", "gathers",
    }  # fmt: skip
    assert 0 < sum(watch.seconds.values()) < took
    assert not tiny.model.get_decoder().layers[0].mlp._forward_hooks


def test_bounds_come_from_the_slower_of_operations_and_bytes():
    rates = Rates(matrix=100.0, attention=10.0, copy=1000.0)
    work = {"mlp": cost.Work(200, 1), "attention": cost.Work(20, 1), "selection": cost.Work(0, 500)}
    assert rates.seconds(work) == 2.0 + 2.0 + 0.5


def test_noise_is_told():
    """By hand: p20 and p80 lie at indices 0.2 (n - 1) and 0.8 (n - 1) of the sorted times, between neighbours."""
    assert not measure.Spread([10, 10.1, 10, 10.1, 10, 10.1]).noisy
    assert measure.Spread([10, 10, 10.05, 11, 11, 11.05, 11, 10]).noisy is False
    assert measure.Spread([10] * 6 + [11] * 6).noisy is False  # the spread covers it
    assert measure.Spread([10, 14, 10, 14, 10, 14]).noisy, "the spread is a fifth"
    assert measure.Spread([10.0] * 9 + [10.5] * 2 + [10.0] * 9).noisy is False
    # Of 9 times: p20 = 9.6, p80 = 10. The first four have a median of 9.5, the last five of 10: 0.5 apart.
    assert measure.Spread([9, 9, 10, 10, 10, 10, 10, 10, 10]).noisy is True, "it drifted"
    assert (
        measure.Spread([9, 10, 10, 10, 9, 10, 10, 10, 10]).noisy is False
    )  # the same times, no drift
    assert measure.Spread([9.9, 9.9, *[10] * 7]).noisy is False  # 0.05 apart: less than 2 %


def test_the_whole_cache_decodes_as_the_dense_one(tiny):
    inputs = tiny.random(40, 2)
    dense = measure.Variant("none", 1.0)
    _, cache = measure.prefill(tiny, inputs, dense)
    whole = PrunedCache.whole(cache)
    found = []
    for held, request in ((cache, None), (whole, Request(tiny.sparse, force=True))):
        with torch.no_grad(), sparse_attention(tiny.model, request):
            decoder = tiny.model.get_decoder()
            out = decoder(**inputs.next(), past_key_values=held, use_cache=True)
        found.append(out.last_hidden_state)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", tinymodels.FAMILIES)
@torch.no_grad()
def test_a_decoding_step_never_waits_for_a_value(family):
    """On the `meta` device there are none: whatever asks for one fails."""
    policy = tinymodels.shared(family)
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    inputs, valid = policy.rows(encoded, policy.encode_vision(encoded), None, left=True)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    request = Request(Sparse(dense_below=0, p=0.8))
    cache, batch = PrunedCache(), PromptBatch(valid)
    with sparse_attention(policy.model, request):
        policy.decoder(**inputs, sparse_batch=batch, past_key_values=cache, use_cache=True)
    with torch.device("meta"):
        model = type(policy.model)(copy.deepcopy(policy.model.config))
    model.set_attn_implementation({"text_config": ATTENTION})
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        layer.valid = layer.valid.to("meta")
    held = cache.layers[0].keys.shape[2]
    with sparse_attention(model, request):
        for _ in range(20):
            model.model(
                inputs_embeds=embeds[:, -1:].to("meta"),
                position_ids=positions[..., -1:].to("meta"),
                past_key_values=cache,
                use_cache=True,
            )
    assert cache.layers[0].keys.shape[2] == held + 20


FIELDS = {"phase", "length", "batch", "keep", "skip"}
TIMED = {"ms", "ms_p20", "ms_p80", "dense_ms", "speedup", "bound"}


def command(arguments, monkeypatch, capsys):
    from zipr1.cli import main

    monkeypatch.setattr(sys, "argv", ["zipr1", "profile", *arguments])
    code = 0
    try:
        main()
    except SystemExit as left:
        code = left.code or 0
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "p"
    code, out, err = command(
        ["--model", "tiny", "--lengths", "48,96", "--keep", "0.25", "--batch", "1", "--batch", "2", "--seconds", "0",
         "--probes", "8", "--measure-tflops", "--json", "--output", str(folder)],
        monkeypatch, capsys,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((folder / "profile.json").read_text())
    assert json.loads(out.splitlines()[-1]) == found
    assert {"hardware", "versions", "matrix_tflops", "copy_gb_s"} <= set(found["machine"])
    assert found["model"] | {"name": "tiny", "weights": "its own", "probes": 8} == found["model"]
    places = {(r["length"], r["batch"], r["keep"], r["skip"]) for r in found["rows"]}
    assert places == {
        (n, b, k, skip)
        for n in (48, 96)
        for b in (1, 2)
        for k, skip in ((1.0, "none"), (0.25, "attention"), (0.25, "layer"))
    }
    for row in found["rows"]:
        assert set(row) >= FIELDS
        if row["phase"] in ("prefill_layer", "prefill", "decode"):
            assert set(row) >= TIMED
            assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["turns"] >= 5
            assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ms"])
            if row["skip"] == "none":
                assert row["speedup"] == row["bound"] == 1
        if row["phase"] == "prefill_layer":
            assert row["tflops"] == pytest.approx(row["counted_flops"] / row["ms"] / 1e9)
        if row["phase"] == "kv_cache":
            assert row["bound"] == pytest.approx(1 / row["keep"])
            kept = row["length"] * row["keep"] * row["batch"]
            assert (
                row["kv_bytes"] == 4 * 2 * 2 * 32 * 4 * kept
            )  # layers, K and V, heads, dimension, bytes
    page = (folder / "report.html").read_text()
    # A layer's phases, two gains and two of memory, as drawings.
    assert page.count("<svg") == 5 and not re.search(r'(src|href)="http', page)
    assert "MLP" in page and "random tokens" in page
    row = next(r for r in found["rows"] if r["phase"] == "prefill_layer" and r["skip"] == "layer")
    assert f"{row['speedup']:.2f}x" in page and f"{row['speedup']:.2f}x" in err


def test_a_real_clip_is_the_default_for_a_model_with_weights(tmp_path):
    found = profile(ProfileRequest("tiny", seconds=0.0, device="cpu"))
    first = found["rows"][0]
    assert first["length"] > 150 and found["model"]["p"] == 0.975
    kinds = [r["phase"] for r in found["rows"] if r["skip"] == "none"]
    assert kinds == ["prefill_layer", "prefill", "vision", "ttft", "decode", "kv_cache"]
    sparse = [r for r in found["rows"] if r["phase"] == "kv_cache" and r["skip"] != "none"]
    assert all(0.5 < r["keep"] < 1 for r in sparse)


def test_a_picture_of_the_users(tmp_path):
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.new("RGB", (160, 112), "grey").save(path)
    found = profile(ProfileRequest("tiny", image=path, keeps=[0.5], seconds=0.0, device="cpu"))
    assert found["model"]["input"] == "grey.png"
    assert {r["tokens"] for r in found["rows"] if r["phase"] == "vision"} == {10 * 7}
    length = found["rows"][0]["length"]
    assert found["rows"][-1]["keep"] == pytest.approx(cost.kept_tokens(length, 0.5) / length, 1e-3)


def test_too_little_memory_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 3_000_000)
    found = profile(ProfileRequest("tiny", lengths=[32, 4096], seconds=0.0, device="cpu"))
    bad = [r for r in found["rows"] if "error" in r]
    assert [(r["length"], r["batch"]) for r in bad] == [(4096, 1)]
    assert bad[0]["error"].startswith("needs about ")
    assert any(r["length"] == 32 and r["phase"] == "decode" for r in found["rows"])


def test_an_allocation_that_fails_is_a_row(monkeypatch):
    take = rows.take

    def fail(subject, inputs, *rest):
        if inputs.length == 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return take(subject, inputs, *rest)

    monkeypatch.setattr(rows, "take", fail)
    found = profile(ProfileRequest("tiny", lengths=[64, 32], seconds=0.0, device="cpu"))
    assert [r["length"] for r in found["rows"] if "error" in r] == [64]
    assert {r["length"] for r in found["rows"]} == {32, 64}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "qwen2.5-vl-8b"], "did you mean qwen2.5-vl-7b?"),
        (["--lengths", "40", "--keep", "0"], "--keep 0: outside (0, 1]"),
        (["--lengths", "40", "--keep", "1.01"], "--keep 1.01: outside (0, 1]"),
        (["--lengths", "400000"], "--lengths 400000 is outside 1..4096, what tiny was made for"),
        (["--batch", "0"], "--batch 0: give 1 or more"),
        (["--card", "--measure-tflops"], "--card counts, and runs and writes nothing; leave out --measure-tflops"),
        (["--visual", "0.5"], "--visual is for --card"),
        (["--dtype", "int8"], "--dtype int8: allowed: auto, float32"),
        (["--layers", "2"], "--layers is for a bundled config"),
        (["--layers", "99", "--model", "qwen2.5-vl-3b"], "--layers 99 is outside 1..36"),
        (["--device", "cuda:7"], "--device cuda:7: not usable here"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--image", "a.png", "--video", "b.mp4"], "--image and --video were both given"),
        (["--lengths", "40", "--video", "b.mp4"], "--lengths makes random prompts"),
        (["--lengths", "40", "--output", __file__], "this is a file; give a folder"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", "tiny"]
    code, _, error = command([*model, *arguments], monkeypatch, capsys)
    assert code == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.glob("runs/*")), "nothing is left behind"


def test_pictures_need_a_tokenizer(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="no tokenizer"):
        check(ProfileRequest("qwen2.5-vl-3b", image=path))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_model_that_shows_the_overhead_is_narrow_in_every_family(family, tmp_path, monkeypatch):
    """8 numbers for each of 4 heads, an MLP of 16, 64 words, as deep as the model; none of a family's own sizes."""
    folder = tinymodels.folder(family, tmp_path)
    profiled = subject.load(str(folder), None, "cpu", "float32", None)
    made = []
    build = measure.random_model

    def noted(*arguments):
        made.append(build(*arguments))
        return made[-1]

    monkeypatch.setattr(measure, "random_model", noted)
    assert measure.overhead_ms(profiled, 1) > 0
    text = made[0].config.get_text_config()
    sizes = (text.hidden_size, text.intermediate_size, text.vocab_size, text.num_hidden_layers)
    assert sizes == (32, 16, 64, 3)
    assert made[0].get_decoder().layers[0].self_attn.head_dim == 8
