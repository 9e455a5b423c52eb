"""What a run has learned, on handwriting that it was trained on and on other: by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

import hands
import tinyruns
from fair import models

from zipr1.core.errors import InputError
from zipr1.core.recipe import Recipe, Sparse
from zipr1.data import embedded
from zipr1.train.heldout import Result


def subject(seed: int = 0) -> models.Subject:
    recipe = Recipe().model_copy(update={"seed": seed})
    return models.Subject("runs/b", "b", None, recipe, Sparse(p=0.9), "tiny", "hash")


def test_gains_and_the_gap_by_hand(monkeypatch):
    """Of 40 questions the base has half right. The run has 10 more on known hands and 2 more on unknown ones; sparse it
    has as many as the base."""
    asked = []

    def ask(path, recipe, prompts, settings):
        asked.append((path, prompts[0].id.split("/")[1], settings))
        more = {"train": 10, "validation": 2}[prompts[0].id.split("/")[1]]
        found = []
        for setting in settings:
            right = 20 + more * (path != "tiny" and setting is None)
            correct = (np.arange(40) < right).astype(float)
            ratio = np.full(40, 1.0 if setting is None else 0.3)
            found.append(Result(prompts, correct, ratio, ratio[:, None], [""] * 40))
        return found

    monkeypatch.setattr(models, "find", lambda path: subject())
    monkeypatch.setattr(models, "ask", ask)
    lines = hands.measured("runs/b", "hard_digits", 40)
    assert [(path, split) for path, split, _ in asked] == [
        (path, split) for split in ("train", "validation") for path in ("tiny", "runs/b")
    ]
    assert asked[1][2] == [None, subject().sparse]
    assert lines[1].startswith("  known hands: base 50.0 %")
    assert lines[2].startswith("    dense: +25.0 points") and "at 100.0 % of" in lines[2]
    assert lines[3].startswith("    sparse: +0.0 points") and "at 30.0 % of" in lines[3]
    assert lines[5].startswith("    dense: +5.0 points")
    assert lines[7].startswith("  gap, dense: +20.0 points") and "+0.0" in lines[8]
    gap, error = hands.gap_of(0.25, 0.03, 0.05, 0.04)
    assert gap == pytest.approx(0.2) and error == pytest.approx(0.05)


def test_a_seed_of_the_fresh_pictures_is_refused(monkeypatch):
    monkeypatch.setattr(models, "find", lambda path: subject(hands.FRESH))
    with pytest.raises(InputError, match=r"trained with the seed 31337"):
        hands.measured("runs/b", "hard_digits", 40)


def test_the_second_stage_is_compared_with_the_base_of_the_first(tmp_path):
    first = tinyruns.make_run(tmp_path / "first")
    second = tinyruns.make_run(tmp_path / "second", model={"path": str(first)})
    assert models.find(str(second)).base == models.find(str(first)).base == "tiny"


def test_the_questions_are_of_hands_apart_and_fresh():
    known, unknown = (embedded.draw(s, "hard_digits", 8, hands.FRESH) for s in hands.HANDS.values())
    assert {p.id.split("/")[1] for p in known} == {"train"}
    assert {p.id.split("/")[1] for p in unknown} == {"validation"}
    trained = {p.media_key for p in embedded.draw("train", "hard_digits", 400, 0)}
    assert not trained & {p.media_key for p in known}
