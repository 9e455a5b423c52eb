"""What a process knows of the others, before and after they have met."""

from __future__ import annotations

import os

import pytest
import torch

from zipr1.core import distributed, launcher
from zipr1.core.errors import InputError


def test_accelerate_must_have_started_what_was_asked(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launcher.check("ddp")  # one process, as asked
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="started one; add --multi_gpu"):
        launcher.check("ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher.check("ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launcher.check("fsdp")
    with pytest.raises(InputError, match=r"--use_fsdp and train\.parallel is ddp"):
        launcher.check("ddp")


def test_processes_that_cannot_meet_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(InputError, match=r"WORLD_SIZE is 2 .* start them with torchrun"),
        distributed.joined(lambda: torch.device("cpu"), 1.0),
    ):
        pass


def test_each_rank_has_a_question_and_a_gpu(monkeypatch):
    assert distributed.evened([[0, 3], [1, 4], [5]]) == [[0, 3], [1, 4], [5]]
    assert distributed.evened([[0, 3], [], [2, 5, 8], []]) == [[0], [8], [2, 5], [3]]
    with pytest.raises(InputError, match="only 1 of the step's questions"):
        distributed.evened([[0], []])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device(None) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 3 of this machine has no GPU of its own"):
        distributed.device(None)


def test_alone_nothing_is_asked_of_anybody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.gather(3) == [3] and distributed.deal(5) == [0, 1, 2, 3, 4]
    assert distributed.first(lambda: 7) == 7 and distributed.device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert distributed.deal(5) == [1, 4] and not distributed.is_first()


@pytest.fixture
def second_of_three():
    """A process group in which this process is the second of three; the others are imagined."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


def test_processes_that_have_met_count_each_other_whatever_the_environment_says(
    monkeypatch, second_of_three
):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.size(), distributed.rank()) == (3, 1) and not distributed.is_first()
    assert distributed.deal(7) == [1, 4]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    assert (distributed.size(), distributed.rank()) == (3, 1)


def test_a_launcher_can_be_hidden_from_libraries_but_not_from_us(monkeypatch, second_of_three):
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with distributed.hidden_launcher():
        assert not set(told) & set(os.environ)
        assert (distributed.size(), distributed.rank()) == (3, 1)
    assert {name: os.environ[name] for name in told} == told
    with pytest.raises(KeyError), distributed.hidden_launcher():
        raise KeyError
    assert {name: os.environ[name] for name in told} == told


def test_ranks_may_share_a_gpu_while_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed.shared_device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.shared_device() == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.shared_device() is None
