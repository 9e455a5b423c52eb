"""The policy as lmms-eval's model: a document is answered once, in all variants, and read variant by variant."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from zipr1.core.errors import InputError
from zipr1.core.load import load_written
from zipr1.core.recipe import Model
from zipr1.core.types import Prompt
from zipr1.evaluate.adapter import Adapter, AnswerStore, Document, _conditions_of, prompt_of
from zipr1.evaluate.answers import Answer, Answered, Answerer, Conditions
from zipr1.evaluate.harness import measure
from zipr1.evaluate.suites import EMBEDDED, SUITES, TASK_FILES
from zipr1.models.manifest import TINY
from zipr1.models.policy import load_policy


class Counting:
    """Stands in for an Answerer of two variants; asked: what it was asked, call by call."""

    def __init__(self):
        self.asked = []
        self.policy = types.SimpleNamespace(device="cpu")

    def answer(self, asked, conditions, tell):
        prompts = [make() for make in asked]
        self.asked.append(([p.id for p in prompts], conditions))
        tell(len(asked))
        return [
            Answered(
                [Answer(f"{p.id} {v}", [1.0], 1, 0.1, 1, 1) for v in ("dense", "sparse")], 0.0, 0.0
            )
            for p in prompts
        ]


def request(number, task="t", **settings):
    """As lmms-eval makes them: context, messages, settings, document, task, split."""
    arguments = ("", lambda document: document, settings, number, task, "test")
    return types.SimpleNamespace(args=arguments)


def chat(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


@pytest.fixture
def store():
    return AnswerStore(Counting())


def adapter(store, variant, **more):
    made = Adapter(store, variant, **more)
    made.task_dict["t"] = {"test": [chat(f"question {n}") for n in range(4)]}
    return made


def test_one_look_at_a_document_serves_all_variants(store):
    requests = [request(n) for n in (2, 0, 1)]
    assert adapter(store, 0).generate_until(requests) == ["t/2 dense", "t/0 dense", "t/1 dense"]
    assert adapter(store, 1).generate_until(requests) == ["t/2 sparse", "t/0 sparse", "t/1 sparse"]
    assert [ids for ids, _ in store.answerer.asked] == [["t/2", "t/0", "t/1"]]
    adapter(store, 1).generate_until([request(3), request(0)])
    assert [ids for ids, _ in store.answerer.asked][1:] == [["t/3"]]
    assert [a.answers[0].text for a in store.in_order()] == [f"t/{n} dense" for n in range(4)]
    assert store.text(Document("t", "test", 3), 1) == "t/3 sparse"


def test_the_task_says_how_long_and_where_to_stop(store):
    """Where conditions say nothing of the length; requests of the same conditions are answered together."""
    requests = [
        request(0, max_new_tokens=5, until="X"),
        request(1, max_new_tokens=7),
        request(2, max_new_tokens=5, until=["X"]),
        request(3),
    ]
    adapter(store, 0).generate_until(requests)
    seen = [(ids, c.max_new_tokens, c.stops) for ids, c in store.answerer.asked]
    assert seen == [(["t/0", "t/2"], 5, ("X",)), (["t/1"], 7, ()), (["t/3"], 128, ())]
    other = AnswerStore(Counting())
    adapter(other, 0, conditions=Conditions(max_new_tokens=9)).generate_until(requests[:2])
    assert [c.max_new_tokens for _, c in other.answerer.asked] == [9, 9]


def test_answers_are_changed_for_the_scorer_alone(store):
    made = adapter(store, 0, change=lambda task, text: f"<{task}: {text}>")
    assert made.generate_until([request(0)]) == ["<t: t/0 dense>"]
    assert store.text(Document("t", "test", 0), 0) == "t/0 dense"


def test_progress_is_told(store):
    told = []
    made = adapter(AnswerStore(Counting(), told.append), 0)
    made.generate_until([request(0), request(1)])
    assert told == [2]


def test_chat_messages_become_prompts():
    grey = Image.new("RGB", (4, 3), "grey")
    content = [
        {"type": "image", "url": grey},
        {"type": "video", "url": "clip.mp4"},
        {"type": "text", "text": "Which?"},
    ]
    made = prompt_of("t/1", [{"role": "user", "content": content}])
    assert isinstance(made, Prompt) and made.id == "t/1"
    kinds = [part["type"] for part in made.messages[0]["content"]]
    assert kinds == ["image", "video", "text"]
    pixels, clip = (m.source for m in made.media)
    assert (
        clip == Path("clip.mp4")
        and pixels.shape == (3, 4, 3)
        and np.unique(pixels).tolist() == [128]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgett": "1"}, "--model_args budgett: unknown"),
        ({"budget": 1.5}, r"budget.*sparse\.p: got 1\.5; 1 or less is allowed"),
    ],
)
def test_wrong_arguments_of_lmms_evals_command_line(arguments, message):
    with pytest.raises(InputError, match=message):
        Adapter(**arguments)


def test_a_run_is_measured_at_its_own_p_unless_told_otherwise(run):
    """As `zipr1.load` runs it: dense only if that was asked for."""
    own = load_written(run / "recipe.yaml").sparse
    for given, p in (({}, own.p), ({"budget": 0.9}, 0.9), ({"budget": 1}, 1.0)):
        answerer = Adapter(pretrained=str(run), device="cpu", **given).store.answerer
        (variant,) = answerer.variants
        assert variant.p == p
        assert variant.sparse == (None if p == 1 else own.model_copy(update={"p": p}))


def test_clips_have_their_suites_frames(store):
    """All 16 frames of an embedded clip; a task that nobody listed gets what `zipr1 eval` gives it."""
    seen = []
    store.answerer.answer = lambda asked, conditions, tell: (
        seen.append(conditions) or [None] * len(asked)
    )
    made = Adapter(store, 0)
    for task in ("moving_digits", "videomme", "unheard_of"):
        made.task_dict[task] = {"test": [chat("q")]}
        with contextlib.suppress(AttributeError):  # there are no answers to read
            made.generate_until([request(0, task, max_new_tokens=6)])
    assert [(c.max_new_tokens, c.frames, c.fps) for c in seen] == [
        (6, 16, None),
        (6, 64, 2.0),
        (6, 64, 2.0),
    ]


def test_lmms_evals_own_evaluation_finds_the_embedded_tasks():
    """By --include_path, with the model by its name; the scores are those of `zipr1 eval`."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(
        "ERROR", include_path=str(TASK_FILES), include_defaults=False, model_name="zipr1"
    )
    assert manager.all_tasks == sorted(EMBEDDED)
    for name in EMBEDDED:
        assert manager._get_config(name)["dataset_kwargs"] == {"questions": SUITES[name].limit}
    result = simple_evaluate(
        model="zipr1", model_args="pretrained=tiny,budget=0.8", tasks=["digits", "moving_digits"],
        task_manager=manager, limit=12, bootstrap_iters=0,
    )  # fmt: skip
    answerer = Answerer(load_policy(Model()), TINY, [0.8], 12)
    for name in ("digits", "moving_digits"):
        (scored,) = measure(SUITES[name], answerer, _conditions_of(name), 12, None)
        same = [
            [s["filtered_resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]
            for samples in (result["samples"][name], scored.samples[0])
        ]
        assert same[0] == same[1]
        assert result["results"][name]["exact_match,none"] == scored.headline[0]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, "holds start_time of a clip; pictures, whole clips"),
        ({"type": "video", "url": "a.mp4", "end_time": 2.0}, "holds end_time of a clip"),
        ({"type": "audio", "url": "a.wav"}, "holds audio"),
        ({"type": "image", "url": "https://x.org/a.png"}, "a URL"),
        ({"type": "image", "url": 7}, "image 7; allowed"),
    ],
)  # fmt: skip
def test_what_a_benchmark_shows_and_we_do_not_is_refused(part, words):
    content = [part, {"type": "text", "text": "q"}]
    with pytest.raises(InputError, match=f"t/1: {words}|t/1: .*{words}"):
        prompt_of("t/1", [{"role": "user", "content": content}])


def test_frames_of_a_benchmark_are_a_clip():
    frames = [Image.new("RGB", (8, 6), (level, 0, 0)) for level in (1, 2, 3)]
    content = [{"type": "video", "url": frames}, {"type": "text", "text": "q"}]
    (media,) = prompt_of("t/1", [{"role": "user", "content": content}]).media
    assert media.kind == "video" and [frame[0, 0, 0] for frame in media.source] == [1, 2, 3]
