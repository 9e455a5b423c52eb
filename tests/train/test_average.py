"""The running average of weights: by hand, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch

from zipr1.core import signals
from zipr1.train.average import START, Average


def one(value: float) -> list[tuple[str, torch.nn.Parameter]]:
    return [("a", torch.nn.Parameter(torch.full((2,), value)))]


def test_it_moves_towards_the_weights_of_each_step():
    named = one(0.0)
    average = Average(named, 0.5)
    named[0][1].data.fill_(1.0)
    average.update()
    # Of the first step 1 / (1 + START) stays, less than the decay: the start is soon forgotten.
    first = 1 - 1 / (1 + START)
    assert average.values[0].tolist() == pytest.approx([first] * 2)
    for step in range(2, 40):
        average.update()
        keep = min(0.5, step / (step + START))
        first = keep * first + (1 - keep) * 1.0
    assert average.values[0].tolist() == pytest.approx([first] * 2) and average.steps == 39
    named[0][1].data.fill_(3.0)
    average.update()
    assert average.values[0].tolist() == pytest.approx([0.5 * first + 0.5 * 3.0] * 2)


def test_inside_the_model_has_the_average_and_afterwards_the_newest_weights():
    named = one(0.0)
    average = Average(named, 0.9)
    named[0][1].data.fill_(4.0)
    with average.used() as newest:
        assert named[0][1].tolist() == [0.0, 0.0] and newest["a"].tolist() == [4.0, 4.0]
    assert named[0][1].tolist() == [4.0, 4.0] and average.values[0].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="within"), average.used():
        raise ValueError("within")
    assert named[0][1].tolist() == [4.0, 4.0]
    with average.used():  # what is loaded inside becomes the average
        named[0][1].data.fill_(7.0)
    assert named[0][1].tolist() == [4.0, 4.0] and average.values[0].tolist() == [7.0, 7.0]
    average.take_over()
    assert named[0][1].tolist() == [7.0, 7.0]


def test_without_decay_nothing_is_kept():
    named = one(1.0)
    average = Average(named, 0.0)
    named[0][1].data.fill_(2.0)
    average.update()
    with average.used() as newest:
        assert newest == {} and named[0][1].tolist() == [2.0, 2.0]
    average.take_over()
    average.restore({})
    assert named[0][1].tolist() == [2.0, 2.0] and average.values == []


def test_a_resumed_average_goes_on_as_an_unbroken_one():
    named, other = one(0.0), one(0.0)
    whole = Average(named, 0.9)
    for step in range(6):
        named[0][1].data.fill_(float(step * step))
        whole.update()
        if step == 2:  # saved: the folder has the average, the state the newest weights
            other[0][1].data.copy_(whole.values[0])
            resumed = Average(other, 0.9, whole.steps)
            resumed.restore({"a": named[0][1].detach().clone()})
            assert torch.equal(other[0][1], named[0][1])
        elif step > 2:
            other[0][1].data.fill_(float(step * step))
            resumed.update()
    assert torch.equal(whole.values[0], resumed.values[0]) and whole.steps == resumed.steps


def test_a_signal_waits_while_the_model_is_half_of_each():
    average = Average(one(0.0), 0.9)
    with signals.scope():
        with average.used():
            signals.handle(15)  # does not raise
        with pytest.raises(signals.Stopped):
            signals.check(lambda number: [number])
