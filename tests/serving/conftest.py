"""vLLM has an environment of its own (`make vllm`); elsewhere its tests are left out.

The embedded model, exported as a run of its own: `folder` skips whole layers. Engines are made once for a file.
"""

import socket

import pytest
import tinyruns

from zipr1.export.session import export

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SPARSE = {**tinyruns.SPARSE, "p": 0.6}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """As for all tests, except that a server may be asked on the loopback interface."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test tried to reach {address}; tests run without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    export(tinyruns.make_run(root / "run", sparse=SPARSE), root / "folder")
    return root / "folder"
