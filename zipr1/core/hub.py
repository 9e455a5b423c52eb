"""Hugging Face's hub, as seen from here: whether it can be reached, whether there is a login, and what to do without.

Nothing is sent by asking. Downloads are the libraries' own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlparse

# What has to be set in a recipe to the folder that something was copied to.
KEYS = {
    "model": "model.path=FOLDER",
    "dataset": "data.source=FOLDER and data.heldout=FOLDER:SPLIT",
}
LOGIN = "hf auth login, or set HF_TOKEN"


def asked_offline() -> bool:
    """Whether the user wants no network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def unreachable() -> str | None:
    """Why nothing can be asked of the hub, in words, or None: the user's wish, or a host name without an address."""
    if asked_offline():
        return "HF_HUB_OFFLINE is set"
    from huggingface_hub import constants

    host = urlparse(constants.ENDPOINT).hostname or ""
    if urllib.request.getproxies().keys() & {"https", "all"}:
        return None  # the proxy looks for the address
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"{host} cannot be found from here"
    return None


def how_to_get(name: str, kind: Literal["model", "dataset"]) -> str:
    """What to do about a model or a data set of the hub that did not load, after `unreachable` or because of it."""
    download = f"hf download {'--repo-type dataset ' if kind == 'dataset' else ''}{name}"
    if unreachable() is not None:
        unset = "unset HF_HUB_OFFLINE, or " if asked_offline() else ""
        return (
            f"{unset}on a machine with a network: {download} --local-dir FOLDER, copy FOLDER here, and set "
            f"{KEYS[kind]}"
        )
    login = "" if logged_in() else f", log in if it is not open to all ({LOGIN})"
    return f"check the name and the network{login}, or download it first ({download})"


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Within it, where the hub cannot be reached, the libraries take what was downloaded before instead of trying again
    for a minute. Afterwards they are as they were: the next thing may be on a network that works by then.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or unreachable() is None:
        yield
        return
    # `datasets` copies the constant when it is imported.
    modules = [constants, *(sys.modules[n] for n in ("datasets.config",) if n in sys.modules)]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for module in modules:
            module.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]
