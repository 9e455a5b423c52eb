"""Metrics beside metrics.jsonl: what is sent, under which names, and what is said where a package is missing."""

from __future__ import annotations

import sys
import types

import pytest

from zipr1.core.errors import InputError
from zipr1.core.recipe import Log, Recipe
from zipr1.train.loggers import MODULES, WRITERS, board, check, flat

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


def settings(*names):
    return Recipe(log=Log(to=list(names)))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"started": "2026-01-01"}')
    return tmp_path / "run"


def test_every_writer_is_a_name_of_the_recipe_and_says_when_it_is_missing(monkeypatch):
    assert settings(*WRITERS).log.to == list(WRITERS) == list(MODULES)
    for name in WRITERS:
        monkeypatch.setitem(sys.modules, MODULES[name], None)
        with pytest.raises(
            InputError, match=rf"log.to has {name}, which is not installed; pip install"
        ):
            check(settings(name))
    check(settings())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    check(settings(*WRITERS))  # of several ranks the first alone sends


def test_a_folder_that_is_called_like_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setitem(sys.modules, "wandb", None)
    del sys.modules["wandb"]  # what is imported instead is forgotten afterwards
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=r"log.to has wandb, which is not installed; pip install"):
        check(settings("wandb"))


def test_both_get_every_step_and_are_closed(root, monkeypatch):
    sent, events = [], []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            events.append((log_dir, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            events.append("closed")

        def add_scalar(self, name, value, step):
            sent.append(("tensorboard", step, name, value))

    class Run:
        def log(self, data, step):
            sent.extend(("wandb", step, name, value) for name, value in data.items())

        def finish(self, exit_code=None):
            events.append(("finished", exit_code))

    # The names and defaults of wandb 0.31, and a refusal of its own kind.
    def init(*, dir, name, id, resume, config):
        events.append({"name": name, "id": id, "resume": resume, "config": config, "dir": dir})
        return Run()

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    library = types.SimpleNamespace(init=init, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", library)
    wanted = settings("tensorboard", "wandb")
    with board(wanted, root) as write:
        write(3, METRICS)
    for name in ("tensorboard", "wandb"):
        assert {k: v for who, step, k, v in sent if who == name and step == 3} == SENT
    assert events[0] == (str(root / "tensorboard"), 0)
    assert events[1]["name"] == "run" and events[1]["resume"] == "allow"
    assert events[1]["dir"] == str(root)
    assert events[1]["config"]["log"]["to"] == ["tensorboard", "wandb"]
    assert events[2:] == [("finished", None), "closed"]
    with pytest.raises(KeyboardInterrupt), board(wanted, root, start=5):
        raise KeyboardInterrupt
    assert events[4] == (str(root / "tensorboard"), 5)
    assert events[5]["id"] == events[1]["id"]  # a resumed run goes on with its own
    assert events[6] == ("finished", 1)  # and one that broke off is not shown as a success
    (root / "run.json").write_text('{"started": "2026-01-02"}')
    with board(wanted, root):
        pass
    assert events[9]["id"] != events[1]["id"]  # a new one in the same place is another
    count = len(events)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with board(wanted, root):
        pass
    assert len(events) == count
    monkeypatch.undo()

    def refuse(**options):
        raise OSError("No API key configured. Use `wandb login` to log in.")

    library.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", library)
    with (
        pytest.raises(InputError, match=r"does not start \(No API .* log in\); run `wandb login`"),
        board(settings("wandb"), root),
    ):
        raise AssertionError("opened")


def test_wandb_itself_takes_what_it_is_given(root, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with board(settings("wandb"), root) as write:
        write(3, METRICS)
    (record,) = root.glob("wandb/offline-run-*/*.wandb")
    assert all(name.encode() in record.read_bytes() for name in SENT)


def test_trackio_gets_every_step_and_a_resumed_run_goes_on(root, monkeypatch):
    sent, opened, ended = [], [], []

    # The names of trackio 0.43.
    def init(*, project, name, config, resume):
        opened.append((project, name, resume))
        return types.SimpleNamespace(log=lambda data, step: sent.append((step, data)))

    library = types.SimpleNamespace(init=init, finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "trackio", library)
    for step in (3, 4):
        with board(settings("trackio"), root, start=step) as write:
            write(step, METRICS)
    assert sent == [(3, SENT), (4, SENT)] and ended == [True, True]
    assert opened[0] == opened[1] and opened[0][0] == "zipr1" and opened[0][2] == "allow"
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    (root / "run.json").write_text('{"started": "2026-01-02"}')
    with board(settings("trackio"), root):
        pass
    assert opened[2][0] == "mine" and opened[2][1] != opened[0][1]
