"""Two processes that evaluate, of which one stands still or dies: both end, and tell which one and where."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ranks import LIMIT, at_call, pair

pytest.importorskip("lmms_eval")


def in_opening_the_model() -> None:
    from zipr1.evaluate import session

    at_call(1, session, "load_policy", 1)


def in_answering() -> None:
    from zipr1.evaluate.answers import Answerer

    at_call(1, Answerer, "_chunk", 1)


def in_scoring() -> None:
    """The first rank, whose console is the one that is seen."""
    from zipr1.evaluate import records

    at_call(0, records, "record", 1)


def dies_in_answering() -> None:
    from zipr1.core import watch
    from zipr1.evaluate.answers import Answerer

    def die() -> None:
        watch._watches[-1]._tell()  # where it is, as twice a second
        os.kill(os.getpid(), signal.SIGKILL)

    at_call(1, Answerer, "_chunk", 1, die, lambda: None)


WHAT = ["--model", "tiny", "--tasks", "digits", "--limit", "6"]
COMMAND = ["eval", *WHAT, "train.stall_minutes=5"]
# What hangs, in which rank, and the phase that the line names.
CASES: dict[str, tuple[Callable[[], None], int, str]] = {
    "opening the model": (in_opening_the_model, 1, "opening tiny'"),
    "answering": (in_answering, 1, "digits: question 0 of 6'"),
    "scoring": (in_scoring, 0, "digits: summing up'"),
}


@pytest.fixture(scope="module")
def hung(tmp_path_factory) -> dict[str, Any]:
    """All cases at once, for they mostly wait: exit codes, what was said, and the folder."""
    folder = tmp_path_factory.mktemp("hung")

    def one(name: str) -> Any:
        before, _, _ = CASES[name]
        output = folder / name.replace(" ", "-")
        return (*pair(output, output, before, 300, command=COMMAND), output)

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(one, CASES), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_hangs_in_an_evaluation_is_named_with_its_phase(hung, name):
    _, who, where = CASES[name]
    codes, said, output = hung[name]
    told = f"rank {who} has shown no sign of life for {LIMIT} s, last seen in '{where}"
    assert codes == [1, 1], "".join(said)[-3000:]
    for rank, text in enumerate(said):
        (line,) = [x for x in text.splitlines() if "error: " in x]
        assert line.startswith(f"error: rank {rank}: {told}"), line
        assert "train.stall_minutes" in line
        assert "Traceback" not in text and "failed: " not in text, text[-3000:]
    assert not list(output.glob("benchmarks/*.json"))


@pytest.mark.slow
def test_a_rank_that_dies_in_an_evaluation_is_named_with_its_phase(tmp_path):
    codes, said = pair(tmp_path / "out", tmp_path / "out", dies_in_answering, command=COMMAND)
    assert codes == [1, -signal.SIGKILL], "".join(said)[-3000:]
    (line,) = [x for x in said[0].splitlines() if "error: " in x]
    told = "error: rank 0: rank 1 is gone, last seen in 'digits: question 0 of 6'"
    assert line.startswith(told) and "Traceback" not in said[0] and "failed: " not in said[0], said
    assert not list((tmp_path / "out").glob("benchmarks/*.json"))
