"""Tests are seeded and offline; those marked `gpu` are skipped where there is none."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is drawn for a terminal is tested; a dumb one, such as a log, is shown plain lines.
os.environ["TERM"] = "xterm-256color"

import random
import signal
import socket

import numpy as np
import pytest
import torch
from hypothesis import settings

# Before any kernel is decorated: without a GPU they run in Triton's interpreter, where a test asks for them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell without job control starts what runs in the background with Ctrl-C ignored; tests of it need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Shared machines are slow at times: no test may fail for that.
settings.register_profile("zipr1", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("zipr1")


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_log():
    """A command that a test runs logs to that test's streams, which are closed when it ends."""
    log = logging.getLogger("zipr1")
    before = log.handlers[:]
    yield
    log.handlers[:] = before


@pytest.fixture(autouse=True)
def offline(request, monkeypatch):
    """Any attempt to reach another machine fails, unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to reach {address}; tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def pytest_collection_modifyitems(items):
    mark, why = "gpu", "no CUDA device"
    if torch.cuda.is_available():
        mark, why = "interpreted", "kernels are not interpreted where there is a GPU"
    for item in items:
        if item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run directory of the embedded model; no test may change it."""
    import tinyruns

    return tinyruns.make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def exported(run, tmp_path_factory):
    """That run, exported; no test may change it."""
    from zipr1.export.session import export

    folder = tmp_path_factory.mktemp("exported") / "model"
    export(run, folder, device="cpu")
    return folder
