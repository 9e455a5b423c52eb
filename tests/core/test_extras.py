"""What a message says to install exists: the packages of an extra, not `zipr1[...]`, which no index need know."""

import importlib.metadata
import shlex
import tomllib
from pathlib import Path

import pytest

from zipr1.core import extras

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize("extra", ["data", "eval", "tensorboard", "wandb", "vllm"])
def test_all_packages_of_an_extra_where_none_is_there(extra, monkeypatch):
    declared = [f'{package} ; extra == "{extra}"' for package in EXTRAS[extra]]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.11", *declared])
    monkeypatch.setattr(extras, "_installed", lambda requirement: False)
    assert shlex.split(extras.install(extra)) == ["pip", "install", *EXTRAS[extra]]


def test_only_what_is_missing_is_named(monkeypatch):
    declared = ["numpy>=1; extra == 'data'", "no-such-package>=4,<5; extra == 'data'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: declared)
    assert extras.install("data") == "pip install 'no-such-package>=4,<5'"
