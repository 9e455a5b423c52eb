"""The hub as seen from here: why it cannot be reached, who is logged in, and what a message tells to do."""

import socket
import sys
import types

import pytest
from huggingface_hub import constants

from zipr1.core import hub


@pytest.fixture
def online(monkeypatch):
    """A machine that wants a network; returns a function that says whether the hub's host has an address."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "logged_in", lambda: True)

    def found(yes):
        def look_up(*_):
            if not yes:
                raise socket.gaierror("Name or service not known")
            return []

        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    found(True)
    return found


def test_why_the_hub_cannot_be_reached(online, monkeypatch):
    assert hub.unreachable() is None
    online(False)
    assert hub.unreachable() == "huggingface.co cannot be found from here"
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert hub.unreachable() is None, "a proxy finds hosts that this machine does not"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert hub.unreachable() is None


def test_what_is_to_be_done(online, monkeypatch):
    """A login is named where there is none and there is a network; the second machine where there is no network; and
    to unset a variable only where it is set."""
    reached = hub.how_to_get("me/vl", "model")
    assert "check the name and the network, or download it first (hf download me/vl)" in reached
    monkeypatch.setattr(hub, "logged_in", lambda: False)
    assert "hf auth login" in hub.how_to_get("me/vl", "model")
    online(False)
    assert hub.how_to_get("me/vl", "model") == (
        "on a machine with a network: hf download me/vl --local-dir FOLDER, copy FOLDER here, and set "
        "model.path=FOLDER"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = hub.how_to_get("me/rows", "dataset")
    assert told.startswith("unset HF_HUB_OFFLINE, or on a machine with a network: ")
    assert "hf download --repo-type dataset me/rows --local-dir FOLDER" in told
    assert "data.source=FOLDER" in told and "data.heldout=FOLDER:SPLIT" in told


@pytest.mark.parametrize("found", [True, False])
def test_libraries_are_offline_only_where_the_hub_cannot_be_reached(found, online, monkeypatch):
    copied = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "datasets.config", copied)
    online(found)
    seen = []

    def load():
        with hub.offline_if_unreachable():
            seen.append((constants.HF_HUB_OFFLINE, copied.HF_HUB_OFFLINE))
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        load()
    assert seen == [(not found, not found)]
    assert not constants.HF_HUB_OFFLINE and not copied.HF_HUB_OFFLINE


def test_what_the_user_wants_stays(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub.offline_if_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
