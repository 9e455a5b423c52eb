"""lmms-eval's own tasks beside the thirteen, by their own names."""

from __future__ import annotations

import io
import json

import pytest
import standins
from rich.console import Console

pytest.importorskip("lmms_eval")

from zipr1.evaluate import session
from zipr1.evaluate.session import EvalRequest


def test_a_task_by_its_own_name(tmp_path, monkeypatch):
    """RealWorldQA, unmodified: a folder of the data set's name stands in for the hub."""
    rows = [
        {
            "image": standins.picture(n),
            "question": f"Which letter is it, {n}? A. this B. that",
            "answer": "A",
        }
        for n in range(4)
    ]
    standins.write(tmp_path / "lmms-lab-encoder" / "RealWorldQA", None, "test", rows)
    monkeypatch.chdir(tmp_path)
    request = EvalRequest(
        "tiny", output=tmp_path / "out", tasks=["realworldqa"], p_values=[1.0, 0.975], limit=3
    )
    session.run(request, ["zipr1", "eval"], Console(file=io.StringIO(), width=120))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["task"], r["metric"], r["p"], r["n"]) for r in found["rows"]] == [
        ("realworldqa", "exact_match", p, 3) for p in (1.0, 0.975)
    ]
    # `tiny` names colours and digits, never a letter.
    assert [r["sparse"] for r in found["rows"]] == [0, 0] and found["errors"] == []
