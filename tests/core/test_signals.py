"""A signal ends a run at once, or waits until the weights are those of a whole step."""

from __future__ import annotations

import signal

import pytest

from zipr1.core import distributed, signals


@pytest.fixture(autouse=True)
def released():
    signals.release()  # an update that another test ran on its own has left it held
    yield
    signals.release()


def test_at_once_unless_it_is_held():
    with pytest.raises(signals.Stopped) as stop:
        signals.handle(signal.SIGTERM)
    assert stop.value.number == 15
    signals.release()
    signals.hold()
    signals.handle(signal.SIGTERM)  # waits
    with pytest.raises(signals.Stopped) as stop:
        signals.check(distributed.gather)
    assert stop.value.number == 15
    signals.check(distributed.gather)  # and is raised once
    signals.hold()
    signals.check(distributed.gather)


def test_no_exception_handler_takes_it_for_a_failure():
    assert not issubclass(signals.Stopped, Exception)
