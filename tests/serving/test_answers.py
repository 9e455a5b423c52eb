"""The same answers, kept tokens and log-probabilities as `zipr1.load(folder).generate`, whatever is in flight."""

from importlib.util import find_spec

import engines
import pytest

import zipr1
from zipr1.core.types import Prompt
from zipr1.data.digits import tasks

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


def pictures(count):
    return tasks.prompts("test", "digits", count // 4, 4, 0)


def clips(count):
    return tasks.prompts("test", "moving_digits", count // 4, 4, 0)


def others():
    """Text alone, two pictures, and several turns."""
    some = tasks.prompts("test", "digits", 2, 1, 3)
    words = [{"role": "user", "content": [{"type": "text", "text": "which digit is green?" * 9}]}]
    two = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, *some[0].messages[0]["content"][1:]],
        }
    ]
    turns = [
        *some[0].messages,
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "what color is the two?"}]},
    ]
    return [
        Prompt("text", words, (), "", "digits"),
        Prompt("two", two, (some[0].media[0], some[1].media[0]), "", "digits"),
        Prompt("turns", turns, some[0].media, "", "digits"),
    ]


@pytest.mark.door("vLLM")
@pytest.mark.asked("qwen2_5_vl", "pictures", "clips")
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]], ids=str)
def test_two_hundred_pictures_and_sixty_clips(served, loaded, settings):
    """One by one, and with sixteen in flight."""
    model, processor = loaded
    prompts = pictures(200) + clips(60)
    asked = engines.questions(processor, prompts)
    with zipr1.sparse(model, settings["p"], skip=settings["skip"]), served.settings(**settings):
        wanted = engines.reference(model, processor, prompts)
        for together in (True, False):
            found = served.ask(asked, together=together)
            engines.agree(found, wanted)
            print(settings, f"together: {together}, apart: {engines.apart(found, wanted):.1e}")


@pytest.mark.door("vLLM")
@pytest.mark.asked("qwen2_5_vl", "text", "several media")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_rules_skips_text_several_pictures_and_turns(served, loaded, settings, together):
    model, processor = loaded
    prompts = others() + pictures(8) + clips(4)
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
