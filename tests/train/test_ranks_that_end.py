"""Two processes on gloo of which one dies, hears a signal or refuses: the other ends too, and says who is to blame."""

from __future__ import annotations

import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import tinymodels
from ranks import (
    NONE,
    TORCHRUN,
    alone,
    launch,
    pair,
    same,
    write,
)

from zipr1.core import distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


def count_wrappers() -> None:
    """Say at the end how many wrappers outlive the group: a reducer that holds it last can wait forever."""
    made: list[weakref.ref[Any]] = []
    wrap, destroy = distributed.DistributedDataParallel, distributed.dist.destroy_process_group

    def noted(model: Any) -> Any:
        wrapper = wrap(model)
        made.append(weakref.ref(wrapper))
        return wrapper

    def counted() -> None:
        print(f"{len(made)} wrapped, {sum(one() is not None for one in made)} left", flush=True)
        destroy()

    distributed.DistributedDataParallel, distributed.dist.destroy_process_group = noted, counted


def test_no_wrapper_outlives_the_group(tmp_path, model):
    recipe = write(
        tmp_path / "r.yaml", model, train={"stage": "supervised", "steps": 1}, evaluation=NONE
    )
    codes, said = pair(recipe, tmp_path / "out", count_wrappers)
    assert codes == [0, 0] and all("1 wrapped, 0 left" in one for one in said), said


def test_a_dead_rank_ends_the_run_and_is_named(tmp_path, model):
    """Killed in the rollouts: the other says in one line that it is not to blame, the launcher who is."""
    script = tmp_path / "main.py"
    script.write_text("""
import os, signal, time
import zipr1.train.loop
from pathlib import Path
from zipr1.core import distributed
real, calls, gather = zipr1.train.loop.roll_out, [], distributed.gather
waits = Path(__file__).with_name("waits")
def gathers(value):
    if os.environ["RANK"] == "0" and len(calls) == 2:
        waits.touch()
    return gather(value)
distributed.gather = gathers
def dies(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        while not waits.exists():
            time.sleep(0.05)
        time.sleep(1)  # the other waits, and knows before the launcher does, which looks once a second
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
zipr1.train.loop.roll_out = dies
from zipr1.cli import main; main()
""")
    recipe = write(tmp_path / "r.yaml", model, evaluation=NONE, train={"save_every": 1})
    done = launch([*TORCHRUN, "--monitor-interval=1"], [str(script)], recipe, tmp_path / "two")
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in report and "SIGKILL" in report
    said = done.stderr[: done.stderr.index("Traceback")]  # the launcher's own
    assert "error: rank 0: rank 1 is gone, last seen in 'step 2: rollout'" in said
    assert (tmp_path / "two" / "last").resolve().name == "step-000001"
    assert not (tmp_path / "two" / "summary.json").exists()


def die_in_the_update() -> None:
    parallel, calls = distributed.Parallel, []
    real = parallel.backward

    def dies(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments, **named)

    parallel.backward = dies


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_that_dies_in_the_update_ends_it(tmp_path, model, kind):
    recipe = write(tmp_path / "r.yaml", model, evaluation=NONE, train={"parallel": kind})
    codes, said = pair(recipe, tmp_path / "two", die_in_the_update)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 0: rank 1 is gone, last seen in '" in said[0] and "Traceback" not in said[0]
    assert not (tmp_path / "two" / "summary.json").exists()


def hear_sigterm() -> None:
    """One rank alone, in the middle of the second step."""
    import zipr1.train.update

    step, calls = zipr1.train.update.clipped_step, []

    def hears(*arguments: Any) -> float:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    zipr1.train.update.clipped_step = hears


def test_sigterm_saves_on_all_ranks_and_any_number_goes_on(tmp_path, model):
    train_ = {"parallel": "fsdp", "steps": 3, "save_every": 0}
    recipe = write(tmp_path / "r.yaml", model, train=train_, evaluation=NONE)
    alone(recipe, tmp_path / "one")
    codes, said = pair(recipe, tmp_path / "two", hear_sigterm)
    assert codes == [143, 143], "".join(said)[-3000:]
    assert (tmp_path / "two" / "last").resolve().name == "step-000002"
    shutil.copytree(tmp_path / "two", tmp_path / "fewer", symlinks=True)
    alone(recipe, tmp_path / "fewer")
    same(tmp_path / "one", tmp_path / "fewer")
    codes, said = pair(recipe, tmp_path / "two")
    assert codes == [0, 0], "".join(said)[-3000:]
    same(tmp_path / "one", tmp_path / "two")


def test_what_one_rank_refuses_all_refuse_with_its_number(tmp_path, model):
    recipe = write(tmp_path / "r.yaml", model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.jpg").touch()
    codes, said = pair(recipe, tmp_path / "full")
    assert codes == [2, 2]
    for rank, text in enumerate(said):
        assert f"error: rank {rank}: " in text and "not empty and holds no run" in text
