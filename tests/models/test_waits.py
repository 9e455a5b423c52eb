"""How often a GPU would be waited for and what it would be given, counted on a stand-in (standingpu.py)."""

import contextlib
import importlib
import itertools
import logging
import warnings

import pytest
import standingpu
import tinymodels
import torch
from standingpu import DEVICE, OnGpu
from tinysteps import gradients, recipe, roll, with_train
from zipr1_kernels import Kept
from zipr1_kernels.probe_scores import kernel as probing
from zipr1_kernels.select_top_p import kernel as selecting
from zipr1_kernels.sparse_prefill import packed

from zipr1.core.recipe import Efficiency, Model, Ppo, Probes, Sparse
from zipr1.models import decoding, sampling
from zipr1.models.policy import load_policy
from zipr1.models.sparse.patch import attributes, sparse_attention
from zipr1.models.sparse.request import PromptBatch, Request
from zipr1.models.sparse.rules import RULES

LAYERS = tinymodels.TEXT["num_hidden_layers"]
PROBES = Probes(recent=3, random=6)


def settings(**changes):
    return Sparse(**{"p": 0.8, "dense_below": 0, "probes": PROBES} | changes)


@pytest.fixture
def fixed(monkeypatch):
    """Decode as on a GPU."""
    monkeypatch.setitem(sampling.FIXED, DEVICE.type, True)
    monkeypatch.setitem(decoding.LOOK, DEVICE.type, decoding.LOOK["cuda"])


def prompts():
    """A policy, prompts of four lengths and their features, on the CPU."""
    policy = tinymodels.make()
    encoded = tinymodels.encode(policy, tinymodels.mixed())
    return policy, encoded, policy.encode_vision(encoded)


def launches_of_layers(policy, gpu, run):
    """What a GPU is given from the start of one decoder layer to that of the next, for all but the last one."""
    marks = []
    with contextlib.ExitStack() as undo:
        for layer in policy.decoder.layers:

            def forward(*args, stock=layer.forward, **kwargs):
                marks.append(gpu.launches)
                return stock(*args, **kwargs)

            undo.enter_context(attributes(layer, forward=forward))
        run()
    return [later - earlier for earlier, later in itertools.pairwise(marks)]


def there(policy, features):
    standingpu.moved(policy.model)
    return {name: OnGpu(values) for name, values in features.items()}


def generate(policy, encoded, features, request, new):
    uniforms = torch.rand(len(encoded), new, generator=torch.Generator().manual_seed(1))
    return policy.generate(encoded, features, request, new, uniforms)


def test_the_stand_in_counts_what_makes_a_host_wait():
    def counted(run):
        before, launches = gpu.waits.total(), gpu.launches
        run()
        return gpu.waits.total() - before, gpu.launches - launches

    with standingpu.gpu() as gpu:
        x = torch.arange(6, device=DEVICE)
        assert x.device == DEVICE and gpu.launches == 1 and not gpu.waits
        for waits in (
            lambda: x[2].item(),
            lambda: bool((x > 2).any()),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.nonzero(),
            lambda: x[x > 2],
            lambda: x.unique(),
            lambda: torch.tensor([1, 2], device=DEVICE),
            lambda: torch.ones(3).to(DEVICE),
            lambda: torch.zeros(6, dtype=torch.long, device=DEVICE).masked_fill_(x > 2, 1)[x > 2],
            lambda: x.repeat_interleave(x),
            lambda: torch.where(x > 2, x, torch.tensor(7)),
        ):
            assert counted(waits)[0] == 1
        assert counted(lambda: x.view(2, 3).T[1:]) == (0, 0)
        assert counted(lambda: x[torch.arange(2, device=DEVICE)] + 1) == (0, 3)
        assert counted(lambda: x.repeat_interleave(x, output_size=15)) == (0, 2)
        assert counted(lambda: x[:0] + 1) == (0, 0)
        assert counted(lambda: torch.where(x > 2, x, 7)) == (0, 3)
        assert x.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("audit", [(), (0, 2)])
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_prefill_waits_once_a_layer_and_decoding_once_in_eight_tokens(skip, audit, fixed):
    policy, encoded, features = prompts()
    request = Request(settings(skip=skip), audit=audit)
    wanted = generate(policy, encoded, features, request, 18)
    with standingpu.gpu() as gpu:
        features = there(policy, features)
        of_layers = launches_of_layers(
            policy, gpu, lambda: generate(policy, encoded, features, request, 1)
        )
        prefill, launches = gpu.waits.copy(), gpu.launches
        gpu.waits.clear()
        got = generate(policy, encoded, features, request, 18)
        step = (gpu.launches - 2 * launches) / 17
    inside = {where: n for where, n in prefill.items() if "transfer.py" not in where}
    assert sum(inside.values()) <= LAYERS, inside
    assert prefill.total() <= LAYERS + 2, prefill  # what was chosen, and what was kept
    assert (gpu.waits - prefill).total() <= 17 // 8, gpu.waits - prefill
    assert len(of_layers) == LAYERS - 1 and max(of_layers) <= 50, of_layers
    assert step <= 50 * LAYERS + 40
    for one, other in zip(wanted.tokens, got.tokens, strict=True):
        assert one.tolist() == other.tolist()
    for one, other in zip(wanted.kept, got.kept, strict=True):
        assert [x.tolist() for x in one] == [x.tolist() for x in other]


def test_dense_decoding_waits_once_in_eight_tokens_too(fixed):
    policy, encoded, features = prompts()
    wanted = generate(policy, encoded, features, None, 18)
    with standingpu.gpu() as gpu:
        features = there(policy, features)
        generate(policy, encoded, features, None, 1)
        prefill = gpu.waits.copy()
        gpu.waits.clear()
        got = generate(policy, encoded, features, None, 18)
    assert prefill.total() <= LAYERS, prefill
    assert (gpu.waits - prefill).total() <= 17 // 8, gpu.waits - prefill
    for one, other in zip(wanted.tokens, got.tokens, strict=True):
        assert one.tolist() == other.tolist()


def counted_in_a_prefill(policy, *requests):
    """For each request, of two pictures of two sizes: launches of each layer but the last one, and waits."""
    encoded = tinymodels.encode(policy, [tinymodels.prompt(i, "image") for i in (0, 1)])
    features, found = policy.encode_vision(encoded), []
    with standingpu.gpu() as gpu:
        features = there(policy, features)
        for request in requests:
            gpu.waits.clear()
            of_layers = launches_of_layers(
                policy, gpu, lambda r=request: generate(policy, encoded, features, r, 1)
            )
            found.append((of_layers, gpu.waits.copy()))
    return found


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "smolvlm", "qwen3_vl"])
@pytest.mark.parametrize("longest", [selecting.LONGEST, 0])
def test_a_layer_in_16_bits_is_launched_as_seldom(family, longest, tmp_path, monkeypatch):
    """Of whatever family, and where rows are so long that they are sorted: Qwen3-VL's, too, whose layers norm their
    heads, and add features between the first ones; when dense they are given more."""
    monkeypatch.setattr(selecting, "LONGEST", longest)
    settings_of = Model(path=str(tinymodels.folder(family, tmp_path)), dtype="bfloat16")
    policy = load_policy(settings_of, "cpu")
    request = Request(settings(skip="layer"), audit=(0,))
    (of_layers, waits), (dense, dense_waits) = counted_in_a_prefill(policy, request, None)
    most = 45 if family == "qwen3_vl" else 41
    assert min(of_layers) > 35 and max(of_layers) <= most + (0 if longest else 4), of_layers
    assert min(dense) > (50 if family == "qwen3_vl" else 35), dense
    assert waits.total() <= LAYERS + 2, waits
    assert not any("index" in where or "size" in where for where in dense_waits), dense_waits


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_in_16_bits_is_launched_as_seldom_by_rule(rule, tmp_path):
    """What a rule makes of p is made for all layers before the first, and so are the control's scores."""
    path = str(tinymodels.folder("qwen2_5_vl", tmp_path))
    policy = load_policy(Model(path=path, dtype="bfloat16"), "cpu")
    request = Request(settings(rule=rule, skip="layer"), audit=(0,))
    ((of_layers, waits),) = counted_in_a_prefill(policy, request)
    assert max(of_layers) <= (41 if rule in ("top_p", "threshold") else 42), of_layers
    assert waits.total() <= LAYERS + 2, waits


def test_an_adapter_adds_to_a_sparse_layer_what_it_adds_to_a_dense_one():
    """The launches of each of its projections, of which scoring asks two a second time."""
    request = Request(settings(skip="layer"))
    counts = {}
    for lora in (False, True):
        sparse, dense = counted_in_a_prefill(tinymodels.make(lora=lora), request, None)
        counts[lora] = sparse[0], dense[0]
    of_a_projection = {(b - a) / 7 for a, b in zip(counts[False][1], counts[True][1], strict=True)}
    assert of_a_projection == {4}, "two products, a factor and a sum"
    assert [b - a for a, b in zip(counts[False][0], counts[True][0], strict=True)] == [36] * 2


@torch.no_grad()
def test_the_table_of_launches_is_what_the_wrappers_launch(monkeypatch):
    """Kernels themselves do not run; all that torch does around them is counted."""
    rows, tokens, dim = 2, 300, 16
    monkeypatch.setattr(probing, "PROGRAMS", 10**6)  # the keys are split, and joined
    with standingpu.gpu() as gpu:

        def launch(kernel, grid, *args, **options):
            gpu.launches += 1

        found = {}

        def count(op, module, *args, **kwargs):
            module = importlib.import_module(f"zipr1_kernels.{module}.kernel")
            monkeypatch.setattr(module, "launch", launch)
            before = gpu.launches + gpu.waits.total()  # a wait is for a copy, launched too
            getattr(module, op)(*args, **kwargs)
            found[op] = gpu.launches + gpu.waits.total() - before

        def heads(number, length=tokens):
            return OnGpu(torch.randn(rows, length, number, dim)).transpose(1, 2)

        every = OnGpu(torch.ones(rows, tokens, dtype=torch.bool))
        few = OnGpu(torch.zeros(rows, tokens, dtype=torch.bool))
        index = torch.arange(tokens).repeat(rows, 1)
        kept = Kept(OnGpu(index), OnGpu(torch.tensor([tokens, 7])), 7, tokens, tokens + 7)
        vars(kept).update(flat=OnGpu(torch.arange(tokens + 7)))  # the kernel writes it along
        k = heads(2)
        probes = OnGpu(torch.arange(6, dtype=torch.int32).view(rows, 3))
        scores, amount = OnGpu(torch.rand(rows, tokens)), OnGpu(torch.rand(rows))
        which = OnGpu(torch.zeros(rows, dtype=torch.int32))
        count("probe_scores", "probe_scores", heads(4, 3), k, probes, every, rows=which)
        for op in ("select_top_p", "select_threshold"):
            count(op, "select_top_p", scores, amount, every, few)
        count("select_top_k", "select_top_p", scores, OnGpu(torch.tensor([1, 2])), every, few)
        count("pack_each", "select_top_p", every)
        count("kv_compact", "kv_compact", k, k, kept.index)
        flat = k.transpose(1, 2)
        count("norm_rope", "norm_rope", flat, k[:, 0], k[:, 1], k[0, 0, 0], 1e-6)
        count("sparse_decode", "sparse_decode", heads(4, 1), k, k, count=kept.count)
        # By a library's attention, which is one launch: what it takes to gather, and to put back.
        monkeypatch.setattr(packed, "packed_attention", lambda q, *x, **y: launch(None, ()) or q)
        before = gpu.launches
        packed.sparse_prefill(heads(4), k, k, kept)
        found["sparse_prefill"] = gpu.launches - before
        searched = dict(found)
        monkeypatch.setattr(selecting, "LONGEST", 0)
        count("select_top_p", "select_top_p", scores, amount, every, few)
    assert gpu.waits.total() == 1, "packing alone waits"
    assert searched == {op: standingpu.KERNELS[op] for op in searched}
    assert found["select_top_p"] == searched["select_top_p"] + standingpu.SORTED


@pytest.mark.parametrize("kv", ["evict", "retain"])
@torch.no_grad()
def test_a_prompt_of_a_users_own_waits_for_its_mask_besides(kv):
    from zipr1.models.sparse import context, retain

    policy, encoded, features = prompts()
    begin = context.begin if kv == "evict" else retain.begin
    with standingpu.gpu() as gpu:
        inputs, valid = policy.rows(encoded, there(policy, features), None, left=True)
        mask = OnGpu(valid.long())
        with sparse_attention(policy.model, Request(settings(skip="layer", kv=kv)), begin):
            policy.decoder(**inputs, attention_mask=mask, use_cache=True)
    assert gpu.waits.total() <= LAYERS + 1, gpu.waits


@torch.no_grad()
def test_a_picture_that_transformers_itself_adds_waits_for_its_places_once(tmp_path):
    """By a mask, whose size is asked for twice in each of the first layers otherwise."""
    policy = load_policy(Model(path=str(tinymodels.folder("qwen3_vl", tmp_path))), "cpu")
    encoded = tinymodels.encode(policy, [tinymodels.prompt(i, "image") for i in (0, 1)])
    features = policy.encode_vision(encoded)
    request = Request(settings(skip="layer"))

    def passed(features, place):
        inputs, valid = policy.rows(encoded, features, None, left=True)
        shown = torch.zeros(valid.numel(), dtype=torch.bool)
        slots = inputs["visual_pos_masks"]
        shown[getattr(slots, "held", slots)] = True
        with sparse_attention(policy.model, request):
            by_slots = policy.decoder(**inputs, sparse_batch=PromptBatch(valid))
            inputs["visual_pos_masks"] = place(shown.view(valid.shape))
            by_mask = policy.decoder(**inputs, sparse_batch=PromptBatch(valid))
        return by_slots.last_hidden_state, by_mask.last_hidden_state

    assert torch.equal(*passed(features, lambda x: x))
    with standingpu.gpu() as gpu:
        passed(there(policy, features), OnGpu)
    assert gpu.waits.total() <= 2 * LAYERS + 1, gpu.waits


@pytest.mark.parametrize("skip", ["attention", "layer"])
@torch.no_grad()
def test_a_later_turn_of_a_conversation_waits_once_a_layer_too(skip):
    from zipr1.models.sparse import retain

    policy, encoded, features = prompts()
    request = Request(settings(skip=skip, kv="retain"))
    ids = torch.arange(40, 48).view(1, -1).expand(len(encoded), -1)

    def turns(features, place, gpu):
        inputs, valid = policy.rows(encoded, features, None, left=True)
        mask = torch.cat([valid, torch.ones(ids.shape, dtype=torch.bool)], 1).long()
        at = valid.shape[1] + torch.arange(ids.shape[1]).expand(3, *ids.shape)
        first = valid.long()
        first, mask, at, more = (place(x) for x in (first, mask, at, ids))
        with sparse_attention(policy.model, request, retain.begin) as run:
            out = policy.decoder(**inputs, attention_mask=first, use_cache=True)
            before = gpu.waits.total()
            out = policy.decoder(
                input_ids=more, attention_mask=mask, position_ids=at, use_cache=True,
                past_key_values=out.past_key_values,
            )  # fmt: skip
            waited = gpu.waits.total() - before
        return out.last_hidden_state, run.record.kept_positions(), waited

    wanted, kept, _ = turns(features, lambda x: x, standingpu.Gpu())
    with standingpu.gpu() as gpu:
        got, found, waited = turns(there(policy, features), OnGpu, gpu)
    assert waited <= LAYERS + 2, (
        gpu.waits
    )  # which tokens are real, of this turn and of those before
    assert [[x.tolist() for x in row] for row in found] == [
        [x.tolist() for x in row] for row in kept
    ]
    torch.testing.assert_close(got.held, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["answers", "cut+pathwise", "pathwise+through"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_an_update_waits_once_a_minibatch_and_once_at_its_end(
    family, method, tmp_path, monkeypatch
):
    if family == "qwen3_vl":
        path = str(tinymodels.folder(family, tmp_path))
        monkeypatch.setattr(tinymodels, "make", lambda: load_policy(Model(path=path), "cpu"))
    own = recipe(
        sparse=settings(skip="layer"),
        efficiency=Efficiency(method=method),
        ppo=Ppo(kl_coef=0.3, minibatches=2, dense_kl_fraction=0.25),
    )
    own = with_train(own, micro_batch=4)
    policy, batch = roll(own, tinymodels.mixed())
    for group in batch.groups:
        group.rollouts[0].rewards["correct"] = 1.0
    wanted, _ = gradients(own, policy, batch)
    with standingpu.gpu() as gpu:
        batch.features = there(policy, batch.features)
        standingpu.moved(policy.reference_model)
        batch.reference = batch.features
        got, _ = gradients(own, policy, batch)
    assert gpu.waits.total() <= 2 + 1, gpu.waits
    assert got == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_steps_of_decoding_are_alike_so_that_one_can_stand_for_all(fixed):
    """Step after step the same operations on the same shapes, numbers and places in memory: those of a CUDA graph."""
    policy, encoded, features = prompts()
    steps = []

    class Noted(standingpu.Gpu):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if steps:
                made, notes, alive = steps[-1]
                parts = []
                for x in standingpu.tree_leaves((args, kwargs)):
                    if not isinstance(x, OnGpu):
                        parts.append(x if not isinstance(x, torch.Tensor) else tuple(x.shape))
                        continue
                    place = x.held.untyped_storage().data_ptr()
                    parts.append((tuple(x.shape), "made here" if place in made else place))
                for x in standingpu.tree_leaves(out):
                    if isinstance(x, OnGpu):
                        place = x.held.untyped_storage().data_ptr()
                        known = any(
                            place == part[1]
                            for part in parts
                            if isinstance(part, tuple) and len(part) == 2
                        )
                        alive.append(x.held)
                        made |= set() if known else {place}
                notes.append((str(func), parts))
            return out

    again = decoding.Steps.again

    def noted(self):
        steps.append((set(), [], []))
        again(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standingpu, "Gpu", Noted)
        patch.setattr(decoding.Steps, "again", noted)
        with standingpu.gpu():
            features = there(policy, features)
            request = Request(settings(skip="layer"))
            generate(policy, encoded, features, request, 6)
    first, *later = [
        # transformers counts the tokens in Python, and looks at that number nowhere.
        [note for note in notes if "arange" not in note[0]]
        for _, notes, _ in steps[:-1]  # what follows the last step is noted with it
    ]
    assert len(first) > 100 and len(later) == 3
    for other in later:
        assert other == first


@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_cache_with_room_answers_as_one_that_grows(skip, monkeypatch):
    policy, encoded, features = prompts()
    request = Request(settings(skip=skip))
    wanted = generate(policy, encoded, features, request, 20)
    monkeypatch.setitem(sampling.FIXED, "cpu", True)
    monkeypatch.setitem(decoding.LOOK, "cpu", 8)
    got = generate(policy, encoded, features, request, 20)
    assert len({len(rows[1]) for rows in wanted.kept}) > 1  # rows have places of their own
    for one, other in zip(wanted.tokens, got.tokens, strict=True):
        assert one.tolist() == other.tolist()
    for one, other in zip(wanted.logprobs, got.logprobs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert torch.equal(wanted.counts, got.counts) and wanted.kv_bytes == got.kv_bytes


def test_tokens_after_the_end_are_dropped_however_late_the_host_looks(monkeypatch):
    policy, encoded, features = prompts()
    free = generate(policy, encoded, features, Request(settings()), 20)
    monkeypatch.setattr(policy.processor, "end_ids", [int(x[3]) for x in free.tokens])
    found = []
    for every in (1, 8):
        monkeypatch.setitem(decoding.LOOK, "cpu", every)
        found.append(generate(policy, encoded, features, Request(settings()), 20))
    for one, other in zip(found[0].tokens, found[1].tokens, strict=True):
        assert one.tolist() == other.tolist()
        assert len(one) <= 4 and int(one[-1]) in policy.processor.end_ids


def test_a_step_that_cannot_be_captured_runs_as_it_is(caplog):
    if torch.cuda.is_available():
        pytest.skip("a GPU captures it")
    calls = []
    with caplog.at_level(logging.WARNING):
        step = decoding.captured(lambda: calls.append(1), torch.device("cuda", 0))
    step()
    assert calls and "launched piece by piece" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_captured_step_answers_as_the_eager_one(skip, monkeypatch, caplog):
    policy, encoded, features = prompts()
    policy.model.cuda()
    features = {name: values.cuda() for name, values in features.items()}
    request = Request(settings(skip=skip))
    captured = generate(policy, encoded, features, request, 40)
    monkeypatch.setattr(decoding, "CAPTURED", 1000)
    eager = generate(policy, encoded, features, request, 40)
    assert not caplog.records
    for one, other in zip(captured.tokens, eager.tokens, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("skip", ["attention", "layer"])
def test_a_prefill_and_decoding_wait_as_seldom_on_a_gpu(skip, monkeypatch):
    policy, encoded, features = prompts()
    policy.model.cuda()
    features = {name: values.cuda() for name, values in features.items()}
    request = Request(settings(skip=skip))
    monkeypatch.setattr(decoding, "CAPTURED", 1000)  # what is captured cannot wait at all
    generate(policy, encoded, features, request, 18)
    seen = {}
    for new in (1, 18):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                generate(policy, encoded, features, request, new)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [(w.filename, w.lineno) for w in caught if "synchroniz" in str(w.message)]
        seen[new] = places
    assert len(seen[1]) <= LAYERS + 2, seen[1]
    assert len(seen[18]) - len(seen[1]) <= 17 // 8, seen[18]


@pytest.mark.gpu
def test_an_update_does_not_wait_on_a_gpu():
    own = with_train(recipe(sparse=settings(skip="layer"), ppo=Ppo(kl_coef=0.3)), micro_batch=4)
    policy, batch = roll(own, tinymodels.mixed())
    policy.model.cuda()
    policy.reference_model.cuda()
    batch.features = {name: values.cuda() for name, values in batch.features.items()}
    batch.reference = batch.features
    gradients(own, policy, batch)
    seen = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as caught:
            gradients(own, policy, batch)
        seen = [w for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    minibatches = min(own.ppo.minibatches, 16) * own.ppo.epochs
    assert len(seen) <= minibatches + 1, [(w.filename, w.lineno) for w in seen]
