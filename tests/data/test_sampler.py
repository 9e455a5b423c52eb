"""Which questions a step asks: whole epochs, or more of the kinds that lose answers."""

from __future__ import annotations

from collections import Counter

from zipr1.core.types import Prompt
from zipr1.data.sampler import PromptSampler


def prompts(count: int = 30) -> list[Prompt]:
    return [
        Prompt(str(i), [], (), "", task="t", kind="hard" if i % 3 == 0 else "easy")
        for i in range(count)
    ]


def test_an_epoch_asks_every_question_once():
    seen = Counter(p.id for step in range(6) for p in PromptSampler(prompts(), 0, 5).draw(step))
    assert seen == {str(i): 1 for i in range(30)}
    assert (
        PromptSampler(prompts(), 0, 5).draw(3)
        == PromptSampler(prompts(), 0, 5).draw(3)
        != PromptSampler(prompts(), 1, 5).draw(3)
    )


def test_epochs_may_end_within_a_step():
    """Seven steps of five are five epochs of seven: whole ones, each in an order of its own."""
    drawn = [p.id for step in range(7) for p in PromptSampler(prompts(7), 3, 5).draw(step)]
    epochs = [drawn[start : start + 7] for start in range(0, 35, 7)]
    assert all(sorted(epoch) == [str(i) for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_weights_by_kind():
    asked = [PromptSampler(prompts(), 0, 4).draw(step, {"t/hard": 4.0}) for step in range(500)]
    assert all(len({p.id for p in one}) == 4 for one in asked)
    # 10 hard ones of weight 4 and 20 easy ones of weight 1: at first 2/3 are hard, then a little fewer.
    share = Counter(p.kind for one in asked for p in one)["hard"] / 2000
    assert 0.6 < share < 0.68
    assert asked[7] == PromptSampler(prompts(), 0, 4).draw(7, {"t/hard": 4.0})


def test_fewer_questions_than_a_step_asks_are_asked_again():
    assert len(PromptSampler(prompts(3), 0, 5).draw(0, {"t/hard": 4.0})) == 5


def test_weights_leave_the_tasks_their_shares():
    both = prompts() + [Prompt(f"s{i}", [], (), "", task="sums", kind="sum") for i in range(10)]
    asked = [
        PromptSampler(both, 0, 4).draw(step, {"t/hard": 4.0, "sums/sum": 16.0})
        for step in range(1000)
    ]
    share = Counter(p.kind for one in asked for p in one)
    # A task of one kind gains nothing from its weight; drawing without replacement costs it next to nothing.
    assert abs(share["sum"] / 4000 - 1 / 4) < 0.02
    assert 0.6 < share["hard"] / (share["hard"] + share["easy"]) < 0.68
