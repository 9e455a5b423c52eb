"""Runs that several files of tests copy and damage."""

import pytest
import tinyruns
from test_doors import LORA


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One with whole weights and one with an adapter; no test may change them."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "whole": tinyruns.make_run(root / "whole"),
        "lora": tinyruns.make_run(root / "lora", model={"path": "tiny", "lora": LORA}),
    }
