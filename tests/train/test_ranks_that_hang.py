"""Two or three processes on gloo of which one stands still, or refuses alone: all end, and tell which one and where."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tinymodels
from ranks import LIMIT, NONE, alone, at_call, impatient, pair, same, write

from zipr1.core import lock


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


def in_opening_the_model() -> None:
    from zipr1.train import loop

    at_call(1, loop, "load_policy", 1)


def in_opening_the_data() -> None:
    from zipr1.data import sources

    at_call(0, sources, "load", 1)


def in_rollout() -> None:
    from zipr1.train import loop

    at_call(1, loop, "roll_out", 2)


def in_update() -> None:
    from zipr1.train import update

    at_call(0, update, "backward", 2)


def in_saving() -> None:
    from zipr1.core import checksums
    from zipr1.train import loop

    at_call(0, checksums, "write", 2)
    at_call(1, loop, "save", 2, impatient)


def before_it_comes() -> None:
    from zipr1.core import distributed

    at_call(2, distributed, "_store", 1, others=nothing)


def frozen() -> None:
    """With all its threads: it can neither tell nor hear anything, and its connections stay open."""
    from zipr1.core import watch
    from zipr1.train import loop

    watch.GRACE = 2.0

    def stop() -> None:
        watch._watches[-1]._tell()  # where it is
        os.kill(os.getpid(), signal.SIGSTOP)

    at_call(1, loop, "rl_step", 1, stop)


@dataclass
class Case:
    """who: the rank that hangs. where: the phase that the line names. lost: whether it can be reached no more. soon:
    whether the recipe has the limit."""

    before: Callable[[], None]
    who: int
    where: str
    ranks: int = 2
    lost: bool = False
    soon: int = 0
    parallel: str = "ddp"


CASES = {
    "opening the model": Case(in_opening_the_model, 1, "opening "),
    "opening the data": Case(in_opening_the_data, 0, "reading the questions'"),
    "rollout": Case(in_rollout, 1, "step 2: rollout", ranks=3),
    "update": Case(in_update, 0, "step 1: update"),
    "sharded update": Case(in_update, 0, "step 1: update", parallel="fsdp"),
    "saving": Case(in_saving, 0, "step 2: page and checkpoint"),
    "coming": Case(before_it_comes, 2, "", ranks=3, lost=True, soon=20),
    "frozen": Case(frozen, 1, "step 1: data", lost=True),
}


@pytest.fixture(scope="module")
def hung(tmp_path_factory, model) -> dict[str, Any]:
    """All cases at once, for they mostly wait: exit codes, what was said, the recipe and the run's folder."""
    folder = tmp_path_factory.mktemp("hung")

    def one(name: str) -> Any:
        case = CASES[name]
        train = {"steps": 2, "save_every": 1, "stall_minutes": (case.soon or 300) / 60}
        train["parallel"] = case.parallel
        recipe = write(folder / f"{name}.yaml", model, train=train, evaluation=NONE)
        lost = case.who if case.lost else None
        said = pair(recipe, folder / name, case.before, 300, case.ranks, lost)
        return (*said, recipe, folder / name)

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(one, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_rank_that_hangs_is_named_with_its_phase_by_all(hung, name):
    case = CASES[name]
    codes, said, _, _ = hung[name]
    told = f"rank {case.who} has shown no sign of life for {case.soon or LIMIT} s, last seen in '{case.where}"
    if not case.where:
        told = f"rank {case.who} did not come within {case.soon} s"
    for rank, text in enumerate(said):
        if case.lost and rank == case.who:
            continue
        assert codes[rank] == 1 and "Traceback" not in text, text[-3000:]
        (line,) = [x for x in text.splitlines() if "error: " in x]
        assert line.startswith(f"error: rank {rank}: {told}"), line
        assert " in '" in line.partition("; rank")[2] and "train.stall_minutes" in line


@pytest.fixture(scope="module")
def unbroken(hung, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    alone(hung["saving"][2], output)
    return output


@pytest.mark.parametrize(("name", "done"), [("saving", 1), ("opening the data", 0)])
def test_the_run_goes_on_after_a_rank_has_hung(hung, unbroken, name, done):
    """With the same command, and with another limit: that is no part of what a run is."""
    _, _, recipe, output = hung[name]
    if done:
        assert (output / "last").resolve().name == f"step-{done:06d}"
    else:
        assert [path.name for path in output.iterdir()] == [
            ".lock"
        ]  # let go of by the process's end
    recipe.write_text(recipe.read_text().replace("stall_minutes: 5.0", "stall_minutes: 1.5"))
    alone(recipe, output)
    assert "stall_minutes: 1.5" in (output / "recipe.yaml").read_text()
    assert not list(output.rglob(".tmp-*"))
    same(unbroken, output)


def nothing() -> None:
    pass


def slow_and_alive() -> None:
    """The first rank reads slowly, and writes slowly, while the other waits for it twice the limit."""
    from zipr1.core import checksums
    from zipr1.train import loop

    def moves() -> None:
        with Path(os.devnull).open("wb") as sink:
            for _ in range(20 * LIMIT):
                sink.write(bytes(10**6))
                time.sleep(0.1)

    at_call(0, loop, "load_policy", 1, moves, nothing)
    at_call(0, checksums, "write", 1, moves, nothing)
    at_call(1, loop, "save", 1, impatient)


def test_a_rank_that_reads_and_writes_slowly_is_waited_for(tmp_path, model):
    recipe = write(tmp_path / "r.yaml", model, train={"steps": 1}, evaluation=NONE)
    codes, said = pair(recipe, tmp_path / "out", slow_and_alive)
    assert codes == [0, 0], "".join(said)[-3000:]


def refuses_in_reading() -> None:
    from zipr1.core.errors import InputError
    from zipr1.train import loop

    def no() -> None:
        raise InputError("cat.jpg: not on this machine")

    at_call(1, loop, "load_questions", 1, no, nothing)


def refuses_in_the_update() -> None:
    from zipr1.train import update

    def no() -> None:
        raise RuntimeError("a bug")

    at_call(1, update, "clipped_step", 2, no, nothing)


def refuses_before_all_have_come() -> None:
    from zipr1.core.errors import InputError
    from zipr1.train import loop

    def no() -> None:
        raise InputError("process 2 of this machine has no GPU of its own")

    at_call(1, loop, "check", 1, no, nothing)
    at_call(0, loop, "check", 1, lambda: time.sleep(2), nothing)


@pytest.mark.parametrize(
    ("before", "code", "line"),
    [
        (refuses_in_reading, 2, "rank 1 ended, in 'opening MODEL': cat.jpg: not on this machine"),
        (refuses_in_the_update, 1, "rank 1 ended, in 'step 1: update': RuntimeError: a bug"),
        (refuses_before_all_have_come, 2, "rank 1 ended, in 'starting': process 2 of this machine"),
    ],
    ids=["reading", "update", "before"],
)
def test_what_one_rank_refuses_alone_ends_all_with_its_reason(tmp_path, model, before, code, line):
    recipe = write(tmp_path / "r.yaml", model, evaluation=NONE)
    codes, said = pair(recipe, tmp_path / "out", before)
    bug = before is refuses_in_the_update  # its own traceback is told, by the rank that has it
    assert codes == [code, code], "".join(said)[-3000:]
    line = line.replace("MODEL", str(model))
    assert line in said[0] and line.rpartition(": ")[2] in said[1]
    assert "Traceback" not in said[0] and ("Traceback" in said[1]) == bug
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob(".tmp-*"))


def test_a_folder_that_another_process_writes_is_refused_by_all(tmp_path, model):
    """The first rank alone claims it."""
    recipe, output = write(tmp_path / "r.yaml", model, evaluation=NONE), tmp_path / "out"
    output.mkdir()
    with lock.locked(output / lock.NAME, output):
        codes, said = pair(recipe, output)
    assert codes == [2, 2], "".join(said)[-3000:]
    for rank, text in enumerate(said):
        (line,) = [x for x in text.splitlines() if "error: " in x]
        told = f"error: rank {rank}: {output}: another zipr1 writes here (process {os.getpid()} on "
        assert line.startswith(told) and "Traceback" not in text
    assert not list(output.iterdir())
