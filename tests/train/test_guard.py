"""Guard questions: which they are, which turn comes when, and what is said of the answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import tinymodels
import torch

from zipr1.core.recipe import Data, Efficiency, Recipe, Train
from zipr1.core.recipe import Guard as Settings
from zipr1.data import sources
from zipr1.models.encoder import MediaEncoder
from zipr1.models.sparse.request import Request
from zipr1.rewards.registry import reward_of
from zipr1.train.average import Average
from zipr1.train.constraint import Constraint
from zipr1.train.guard import SHARE, Guard, part


def settings(**guard) -> Recipe:
    return Recipe(
        efficiency=Efficiency(max_accuracy_drop=0.01, guard=Settings(**guard)),
        train=Train(max_new_tokens=4, micro_batch=5),
    )


def test_embedded_guards_are_of_other_hands_and_take_nothing_from_training():
    recipe = Recipe(
        data=Data(prompts=40, mix={"digits": 0.5, "hard_digits": 0.5}, heldout="validation"),
        efficiency=Efficiency(guard=Settings(questions=24)),
    )
    prompts = sources.load(recipe.data, "train", 0)
    train, guard = part(prompts, recipe)
    assert train == prompts and list(guard) == ["digits", "hard_digits"]
    assert all(len(own) == 24 for own in guard.values())
    assert all(p.id.split("/")[1] == "validation" for own in guard.values() for p in own)
    heldout = sources.load(recipe.data, "heldout", 0)
    shown = {p.media_key for p in heldout} | {p.media_key for p in train}
    assert not shown & {p.media_key for own in guard.values() for p in own}


def rows(pictures: int, each: int, task: str = "a") -> list:
    return [
        replace(tinymodels.prompt(0, "image"), id=f"{task}-{p}-{q}", task=task, picture=f"{task}-{p}")
        for p in range(pictures)
        for q in range(each)
    ]  # fmt: skip


def test_rows_lose_whole_pictures_a_tenth_at_most(caplog):
    recipe = Recipe(data=Data(source="rows.jsonl"))
    prompts = [*rows(30, 3), *rows(4, 3, "b")]
    train, guard = part(prompts, recipe)
    assert list(guard) == ["a"]  # a tenth of twelve is less than one picture's three
    held = {p.picture for p in guard["a"]}
    assert len(guard["a"]) == 3 * len(held) == 9 == int(SHARE * 90)
    assert not held & {p.picture for p in train}
    assert len(train) + 9 == len(prompts) and sum(p.task == "b" for p in train) == 12
    assert "b: 12 questions are too few" in caplog.text and "a: " not in caplog.text
    # In whatever order they come, the same are held back.
    again = part(prompts[::-1], recipe)[1]
    assert {p.id for p in again["a"]} == {p.id for p in guard["a"]}
    few = Recipe(data=Data(source="rows.jsonl"), efficiency=Efficiency(guard=Settings(questions=4)))
    assert len(part(prompts, few)[1]["a"]) == 3


def test_a_picture_that_guards_one_task_is_not_trained_on_in_another():
    prompts = rows(20, 1)
    shared = [replace(p, id=f"{p.id}-c", task="c") for p in prompts]
    train, guard = part([*prompts, *shared], Recipe(data=Data(source="rows.jsonl")))
    held = {p.picture for own in guard.values() for p in own}
    assert held and not held & {p.picture for p in train}


@pytest.fixture
def made():
    policy = tinymodels.make()
    policy.keep_reference()
    prompts = [replace(p, task=t, answer="zero") for t in ("a", "b") for p in tinymodels.mixed()]
    return policy, prompts


def ask(policy, prompts, times: int = 1, **guard):
    recipe = settings(**guard)
    by_task = {t: [p for p in prompts if p.task == t] for t in ("a", "b")}
    judge = Guard(policy, recipe, MediaEncoder(policy, recipe), by_task)
    constraint, known = Constraint(recipe.efficiency, {}, 100), {}
    return [judge.ask(constraint, known) for _ in range(times)], constraint, known, judge


def test_every_question_has_its_turn_and_every_second_one_is_asked_with_all_tokens(made):
    policy, prompts = made
    found, constraint, known, judge = ask(policy, prompts, times=4, per_step=4)
    assert [Counter(one.task for one in step) for step in found] == [{"a": 2, "b": 2}] * 4
    assert all([one.drift is not None for one in step] == [True, False] * 2 for step in found)
    assert constraint.state["asked"] == {"a": 8, "b": 8}
    assert len(known) == 4  # the same four pictures and questions in both tasks
    assert {p.id for p in judge.by_task["a"]} == {p.id for p in prompts if p.task == "a"}
    # More than there are: each once, no more.
    (step,), *_ = ask(policy, prompts, per_step=100)
    assert len(step) == 8


def test_losses_are_what_the_answers_say(made):
    """The base says what is right; what the policy says is generated here one by one."""
    policy, prompts = made
    recipe = settings(per_step=8)
    pictures = MediaEncoder(policy, recipe)
    encoded = pictures.encode(prompts)
    seen = pictures.encode_vision(encoded).policy

    def said(request: Request | None) -> list[str]:
        tokens = [policy.generate([e], seen, request, 4).tokens[0] for e in encoded]
        return [policy.processor.decode(t) for t in tokens]

    base = said(None)
    average = Average(policy.trainable(), 0.9)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, value in policy.trainable():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    sparse, dense = said(Request(recipe.sparse)), said(None)
    # What the base says is right; of some questions also what the changed weights say, sparse or dense.
    too = [(sparse[i],) if i % 3 == 0 else (dense[i],) if i % 3 == 1 else () for i in range(8)]
    prompts = [
        replace(p, answer=text, accepted=more)
        for p, text, more in zip(prompts, base, too, strict=True)
    ]
    wanted: Counter = Counter()
    for prompt, first, one, other in zip(prompts, base, sparse, dense, strict=True):
        right = [reward_of(prompt, recipe)(text, prompt.answer) for text in (first, one, other)]
        wanted[prompt.task, (right[0] - right[1], right[0] - right[2])] += 1
    assert len(wanted) > 2  # some are lost and some are not
    (step,), *_ = ask(policy, prompts, per_step=8)
    found = Counter((one.task, one.lost) for one in step)
    for (task, (lost, _)), number in wanted.items():
        found[task, lost] -= number
    assert not any(found.values())
    assert all(0 < one.ratio <= 1 for one in step)
    assert {one.drift for one in step} - {None} <= {dense for _, (_, dense) in wanted}
    with average.used():  # the average is still the base
        (step,), *_ = ask(policy, prompts, per_step=8)
    assert all(one.drift in (0.0, None) for one in step)
