"""The same answers, kept tokens and log-probabilities as `zipr1.load(folder).generate`, whatever is in flight."""

from collections import defaultdict
from importlib.util import find_spec

import engines
import pytest
import tinyruns

import zipr1
from zipr1.data.digits import tasks
from zipr1.data.pages import tasks as forms

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="run `make vllm`")

# Kept shares from 3 to 60 %: at the smaller ones few answers are what the dense model says.
SETTINGS = [
    {"skip": "layer", "p": 0.6},
    {"skip": "layer", "p": 0.3},
    {"skip": "attention", "p": 0.6},
    {"skip": "layer", "p": 0.9, "rule": "top_k"},
    {"skip": "layer", "p": 0.4, "rule": "threshold"},
    {"skip": "layer", "p": 0.3, "rule": "random"},
    {"skip": "attention", "p": 0.8, "normalise": False, "keep_last": 5},
    {"skip": "layer", "p": 0.6, "dense_below": 90},
]


@pytest.fixture(scope="module")
def served(folder):
    with engines.engine(folder, max_num_seqs=16) as made:
        yield made


@pytest.fixture(scope="module")
def loaded(folder):
    return zipr1.load(str(folder))


def pictures(count, each=4):
    return tasks.prompts("test", "digits", count // each, each, 0)


def clips(count, each=4):
    return tasks.prompts("test", "moving_digits", count // each, each, 0)


@pytest.fixture(scope="module")
def dense(loaded):
    """What the model says where all tokens are kept."""
    model, processor = loaded
    with zipr1.sparse(model, 1.0):
        return engines.reference(model, processor, pictures(200, each=1) + clips(60, each=1))


@pytest.mark.door("vLLM")
@pytest.mark.asked("qwen2_5_vl", "pictures", "clips")
@pytest.mark.parametrize("skip", ["layer", "attention"])
@pytest.mark.parametrize("p", [0.6, 0.3])
def test_two_hundred_pictures_and_sixty_clips(served, loaded, dense, p, skip, monkeypatch):
    """One by one, and with sixteen in flight; what is served is not what the dense model says."""
    model, processor = loaded
    prompts = pictures(200, each=1) + clips(60, each=1)
    asked = engines.questions(processor, prompts)
    with zipr1.sparse(model, p, skip=skip), served.settings(p=p, skip=skip):
        wanted = engines.reference(model, processor, prompts)
        for together, most in ((True, 16), (False, 1)):
            counts = []
            monkeypatch.setattr(
                served.scheduler, "update_from_output", engines.running(served, counts)
            )
            found = served.ask(asked, together=together)
            monkeypatch.undo()
            assert max(counts) == most
            engines.agree(found, wanted)
            print(p, skip, f"together: {together}, apart: {engines.apart(found, wanted):.1e}")
    other = sum(list(one.ids) != list(full.ids) for one, full in zip(wanted, dense, strict=True))
    print(p, skip, f"answers that the dense model does not give: {other} of {len(wanted)}")
    assert other > 10


@pytest.mark.door("vLLM")
@pytest.mark.asked("qwen2_5_vl", "text", "several media")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_rules_skips_text_several_pictures_and_turns(served, loaded, settings, together):
    model, processor = loaded
    prompts = engines.others() + pictures(8) + clips(4)
    asked = engines.questions(processor, prompts)
    changed = {k: v for k, v in settings.items() if k != "p"}
    with zipr1.sparse(model, settings["p"], **changed), served.settings(**settings):
        wanted = engines.reference(model, processor, prompts)
        engines.agree(served.ask(asked, together=together), wanted)
    if settings.get("dense_below"):
        short = [one.prompt < settings["dense_below"] for one in wanted]
        assert 0 < sum(short) < len(short)
        assert all((one.kept == [one.prompt] * 4) == s for one, s in zip(wanted, short))
    else:
        assert all(k < one.prompt for one in wanted for k in one.kept)


@pytest.mark.parametrize("skip", ["layer", "attention"])
def test_dropped_tokens_are_not_computed(served, loaded, skip, monkeypatch):
    """Rows that go through a layer's parts, step by step, while six questions are read at once and answered: of a
    dropped token the key, and the query only if it is a probe."""
    seen = defaultdict(list)

    def watch(name, part):
        """A part of a layer is a module, or one of the products with the matrix of queries, keys and values."""
        forward = part.forward
        monkeypatch.setattr(
            part, "forward", lambda x, *more: seen[name].append(len(x)) or forward(x, *more)
        )

    def watch_products(index, projection):
        method = projection.quant_method
        names = {id(getattr(method, name)): name for name in ("queries", "keys", "values")}
        names[id(projection)] = "all"
        apply = method.apply

        def counted(matrix, x, bias):
            seen[index, names[id(matrix)]].append(len(x))
            return apply(matrix, x, bias)

        monkeypatch.setattr(method, "apply", counted)

    layers = served.model.language_model.model.layers
    for index, layer in enumerate(layers):
        for name in ("self_attn.attn", "self_attn.o_proj", "mlp"):
            watch((index, name), layer.get_submodule(name))
        watch_products(index, layer.self_attn.qkv_proj)
    prompts = engines.questions(loaded[1], pictures(4) + clips(4)[:2])
    with served.settings(skip=skip, p=0.6):
        found = served.ask(prompts, 5, ignore_eos=True)
    total = sum(one.prompt for one in found)
    probes = sum(tinyruns.SPARSE["probes"].values())
    for index in range(len(layers)):
        kept = sum(one.kept[index] for one in found)
        assert kept < total / 2
        answering = [6, 6, 6, 6]
        assert seen[index, "keys"] == [total]
        assert seen[index, "values"] == [kept]
        assert seen[index, "queries"] == [probes] * 6 + [kept]
        assert seen[index, "all"] == answering
        assert seen[index, "self_attn.attn"] == [kept, *answering]
        assert seen[index, "self_attn.o_proj"] == [kept, *answering]
        assert seen[index, "mlp"] == [total if skip == "attention" else kept, *answering]


@pytest.mark.parametrize("skip", ["layer", "attention"])
def test_pages_and_long_clips(served, loaded, skip):
    """Prompts of hundreds of tokens, which this model cannot read: whatever it says of them, it says there too."""
    model, processor = loaded
    prompts = forms.prompts("test", "pages", 6, 1, 0) + forms.prompts("test", "page_clips", 3, 1, 0)
    asked = engines.questions(processor, prompts)
    with zipr1.sparse(model, 0.6, skip=skip), served.settings(p=0.6, skip=skip):
        wanted = engines.reference(model, processor, prompts)
        for together in (True, False):
            engines.agree(served.ask(asked, together=together), wanted)
    assert min(one.prompt for one in wanted) > 500
    assert max(one.prompt for one in wanted) > 1000
