"""A signal ends a run at once, or waits until the weights are those of a whole step."""

from __future__ import annotations

import signal

import pytest

from zipr1 import ranks, stopping


@pytest.fixture(autouse=True)
def released():
    stopping.release()  # an update that another test ran on its own has left it held
    yield
    stopping.release()


def test_at_once_unless_it_is_held():
    with pytest.raises(stopping.Stopped) as stop:
        stopping.handle(signal.SIGTERM)
    assert stop.value.number == 15
    stopping.release()
    stopping.hold()
    stopping.handle(signal.SIGTERM)  # waits
    with pytest.raises(stopping.Stopped) as stop:
        stopping.check(ranks.gather)
    assert stop.value.number == 15
    stopping.check(ranks.gather)  # and is raised once
    stopping.hold()
    stopping.check(ranks.gather)


def test_no_exception_handler_takes_it_for_a_failure():
    assert not issubclass(stopping.Stopped, Exception)
