"""Qwen2-VL beside Qwen2.5-VL, and prompts of which all is kept: what vLLM says without us."""

import json
import shutil
from importlib.util import find_spec

import engines
import pytest
import tinymodels

import zipr1
from zipr1.core.recipe import Sparse
from zipr1.data.digits import tasks
from zipr1.models.loading import save_folder
from zipr1.serving.vllm.settings import KEY, marked

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="run `make vllm`")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """A Qwen2-VL of random weights and three layers, marked as an export is."""
    wanted = tinymodels.settings("qwen2_vl")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {**tinymodels.TEXT, "hidden_size": 128, "rope_parameters": rope}
    config = {**wanted.config, "text": text}
    policy = tinymodels.load_policy(wanted.model_copy(update={"config": config}), "cpu", seed=0)
    for name, parameter in policy.model.named_parameters():
        if "language_model" in name and ("q_proj" in name or "k_proj" in name):
            parameter.data *= 8.0
    sparse = Sparse(
        p=0.5, skip="layer", keep_last=2, dense_below=0, probes={"recent": 6, "random": 6}
    )
    setattr(policy.model.config, KEY, marked(sparse))
    folder = tmp_path_factory.mktemp("qwen2")
    processor = policy.processor
    save_folder(policy.model, processor.tokenizer, processor.settings, folder)
    return folder, sparse


def prompts():
    pictures = tasks.prompts("test", "digits", 4, 1, 0)
    return pictures + tasks.prompts("test", "moving_digits", 2, 1, 0) + engines.others()


@pytest.mark.door("vLLM")
@pytest.mark.asked("qwen2_vl", "pictures", "clips", "text", "several media")
def test_qwen2_vl_says_and_keeps_the_same(qwen2):
    folder, sparse = qwen2
    model, processor = zipr1.load(str(folder), **sparse.model_dump())
    assert model.config.model_type == "qwen2_vl"
    wanted = engines.reference(model, processor, prompts(), 8)
    with engines.engine(folder) as served:
        assert type(served.model).__name__ == "SparseQwen2VL"
        asked = engines.questions(processor, prompts())
        engines.agree(served.ask(asked, 8), wanted)
        assert {k < one.prompt for one in wanted for k in one.kept} == {True}


def test_where_all_is_kept_it_is_vllm_without_us(folder):
    model, processor = zipr1.load(str(folder), budget=1.0)
    many = [*prompts(), *tasks.prompts("test", "digits", 100, 1, 5)]
    many += tasks.prompts("test", "moving_digits", 30, 1, 5)
    asked = engines.questions(processor, many)
    dense = {"additional_config": {KEY: "dense"}, "enforce_eager": True}
    with engines.engine(folder, **dense) as stock:
        assert type(stock.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
        wanted = stock.ask(asked, 8, ignore_eos=True)
    with engines.engine(folder) as served:
        served.model.unsaid = []  # vLLM alone may say placeholders
        for all_kept in ({"p": 1.0}, {"dense_below": 10_000}):
            with served.settings(**all_kept):
                found = served.ask(asked, 8, ignore_eos=True)
            assert [one.kept for one in found] == [[one.prompt] * 4 for one in found]
            engines.agree(found, wanted, kept=False)
    ours = engines.reference(model, processor, many, 8)
    assert [one.ids[: len(o.ids)] for one, o in zip(found, ours)] == [o.ids for o in ours]


def test_another_p_and_the_folders_own_sampling_reach_what_is_served(folder, tmp_path):
    """Of a base's generation_config.json, as Qwen's have it: what was in the prompt is penalised, too."""
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    path = copy / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.5}))
    model, processor = zipr1.load(str(copy), budget=0.3)
    wanted = engines.reference(model, processor, prompts())
    with engines.engine(copy, additional_config={KEY: {"p": 0.3}}) as served:
        defaults = served.llm.get_default_sampling_params()
        assert defaults.repetition_penalty == 1.5
        asked = engines.questions(processor, prompts())
        found = served.ask(asked, repetition_penalty=defaults.repetition_penalty)
        plain = served.ask(asked)
    for one, other in zip(found, wanted, strict=True):
        assert (one.ids, one.kept) == (other.ids, other.kept)
    assert [one.ids for one in plain] != [one.ids for one in found]
