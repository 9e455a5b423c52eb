"""Metrics beside metrics.jsonl: what is sent, under which names, and what is said where a package is missing."""

from __future__ import annotations

import sys
import types

import pytest

from zipr1.errors import InputError
from zipr1.loggers import WRITERS, board, flat
from zipr1.recipe import Log, Recipe

METRICS = {
    "loss": 0.5,
    "seconds": {"rollout": 2, "update": 3.5},
    "inference": {"digits": {"gap": 0.25}},
    "token_ratio_by_layer": [0.1, 0.2],
    "note": "x",
}
SENT = {"loss": 0.5, "seconds/rollout": 2.0, "seconds/update": 3.5, "inference/digits/gap": 0.25}


def test_names_of_nested_numbers():
    assert dict(flat(METRICS)) == SENT


def test_every_writer_is_a_name_of_the_recipe_and_says_when_it_is_missing(tmp_path, monkeypatch):
    assert Recipe(log=Log(to=list(WRITERS))).log.to == list(WRITERS)
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    for name in WRITERS:
        monkeypatch.setitem(sys.modules, modules[name], None)
        wanted = Recipe(log=Log(to=[name]))
        with pytest.raises(InputError, match=rf"zipr1\[{name}\]"), board(wanted, tmp_path):
            raise AssertionError("opened")


def test_both_get_every_step_and_are_closed(tmp_path, monkeypatch):
    sent, events = [], []

    class SummaryWriter:
        def __init__(self, folder):
            events.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            events.append("closed")

        def add_scalar(self, name, value, step):
            sent.append(("tensorboard", step, name, value))

    class Run:
        def log(self, scalars, step):
            sent.extend(("wandb", step, name, value) for name, value in scalars.items())

        def finish(self):
            events.append("finished")

    def init(**options):
        events.append(options)
        return Run()

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    wanted = Recipe(log=Log(to=["tensorboard", "wandb"]))
    with board(wanted, tmp_path / "run") as write:
        write(3, METRICS)
    for name in ("tensorboard", "wandb"):
        assert {k: v for who, step, k, v in sent if who == name and step == 3} == SENT
    assert events[0] == str(tmp_path / "run" / "tensorboard")
    assert events[1]["name"] == "run" and events[1]["resume"] == "allow"
    assert events[1]["config"]["log"]["to"] == ["tensorboard", "wandb"]
    assert events[2:] == ["finished", "closed"]
    with board(wanted, tmp_path / "run"):
        pass
    assert events[5]["id"] == events[1]["id"]  # a resumed run goes on with its own
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with board(wanted, tmp_path / "run"):
        pass
    assert len(events) == 8  # of several ranks the first alone sends
