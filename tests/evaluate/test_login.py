"""A missing login is not a missing network, and a report of failures alone is no result."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

pytest.importorskip("lmms_eval")

import datasets
import huggingface_hub
from huggingface_hub import constants

from zipr1.core import hub
from zipr1.core.errors import RunError
from zipr1.evaluate import harness, session
from zipr1.evaluate.harness import _register, measure
from zipr1.evaluate.session import EvalRequest
from zipr1.evaluate.suites import GROUPS, SUITES, WITH_LOGIN


@pytest.fixture
def without_login(tmp_path, monkeypatch):
    """A machine on which the hub's name is found and nobody is logged in. Tests cannot reach it all the same."""
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert huggingface_hub.get_token() is None


class Nobody:
    """Stands in for an Answerer that is never asked."""

    variants = (None,)


def test_which_benchmarks_ask_for_a_login(tmp_path, monkeypatch):
    """By lmms-eval's own task files."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # some of them read it when they load
    asking = set()
    for name in GROUPS["paper13"]:
        for task in SUITES[name].tasks:
            settings = _register()._get_config(task.name).get("dataset_kwargs") or {}
            if settings.get("token"):
                asking.add(name)
    assert tuple(name for name in GROUPS["paper13"] if name in asking) == WITH_LOGIN
    assert len(WITH_LOGIN) == 11


def test_a_missing_login_is_said_and_how_to_log_in(without_login):
    """lmms-eval asks for the token before it asks for the data, and is not told to wait and try again."""
    with pytest.raises(RunError) as error:
        measure(SUITES["mmstar"], Nobody(), None, None, None)
    said = str(error.value)
    assert (
        "asks for a login to the hub, and nobody is logged in here: hf auth login, or set" in said
    )
    assert "--data-root" in said and "is not here" not in said


def test_without_a_network_no_login_is_asked_for(monkeypatch):
    with pytest.raises(RunError) as error:
        measure(SUITES["mmstar"], Nobody(), None, None, None)
    said = str(error.value)
    assert "is not here, and HF_HUB_OFFLINE is set; on a machine with a network: hf down" in said
    assert "login" not in said


@pytest.mark.parametrize(
    ("kind", "text", "login", "said"),
    [
        ("GatedRepoError", "401 Client Error", False, "hf auth login"),
        ("DatasetNotFoundError", "is a gated dataset", True, "accept its terms"),
        ("HfHubHTTPError", "403 Forbidden", True, "accept its terms"),
        ("HfHubHTTPError", "502 Bad Gateway", False, "is not here, and 502 Bad Gateway"),
        ("ConnectTimeout", "timed out", False, "is not here, and timed out"),
    ],
)
def test_what_the_hub_refuses_and_what_fails_on_the_way(kind, text, login, said, monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(hub, "logged_in", lambda: login)
    suite = SUITES["mmstar"]
    line = harness._reason(type(kind, (OSError,), {})(text), suite, suite.tasks[0], None)
    assert said in line and "Lin-Chen/MMStar" in line and text in line


def asked(tasks, folder):
    out = io.StringIO()
    with pytest.raises(RunError) as error:
        session.run(
            EvalRequest("tiny", tasks, [0.9], limit=4, output=folder),
            ["zipr1", "eval"],
            Console(file=out, width=140),
        )
    return out.getvalue(), str(error.value)


def test_failures_alone_are_no_result(tmp_path, without_login):
    folder = tmp_path / "eval"
    printed, error = asked(["mmstar", "chartqa"], folder)
    assert "2 of 2 benchmarks have no result (mmstar, chartqa); no report is written" in error
    assert "the others" not in error and "report:" not in printed
    first = printed[: printed.index("failed:")]
    assert "nobody is logged in to the hub" in first and "mmstar, chartqa: hf auth login" in first
    assert not [p for p in folder.iterdir() if p.name.startswith(("results", "report"))]
    # What failed is tried again by the same command, and one result makes a report, with what failed named.
    printed, error = asked(["mmstar", "digits"], folder)
    assert f"1 of 2 benchmarks have no result (mmstar); what was measured is in {folder}" in error
    results = json.loads((folder / "results.json").read_text())
    assert [row["task"] for row in results["rows"]] == ["digits"]
    assert [e["task"] for e in results["errors"]] == ["mmstar"]


def test_nobody_is_told_to_log_in_for_what_needs_none(tmp_path, without_login, monkeypatch):
    def line(tasks, **more):
        request = EvalRequest("tiny", tasks, [0.9], **more)
        return session.without_login(request, [SUITES[name] for name in tasks])

    assert line(["digits", "textvqa", "mmmu_pro"]) == ""
    assert "mme: hf auth login" in line(["digits", "mme"])
    assert line(["mme"], data_root=tmp_path) == ""
    monkeypatch.setattr(hub, "logged_in", lambda: True)
    assert line(["mme"]) == ""
