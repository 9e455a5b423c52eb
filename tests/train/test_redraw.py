"""Questions whose answers all agree are dropped, and others of their task are asked in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import tinymodels
import tinyruns
import torch

from zipr1.core.recipe import Budgets, Efficiency, Ppo, Recipe
from zipr1.core.types import Group, Prompt, Rollout
from zipr1.data.sampler import PromptSampler
from zipr1.train import redraw as redrawing
from zipr1.train.minibatch import informative
from zipr1.train.rollout import Batch


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"{t}{i}", [], (), "", task=t, kind=str(i % 2)) for t in "ab" for i in range(count)
    ]


def group(prompt: Prompt, right: list[float], ratio: list[float] | None = None) -> Group:
    ratios = ratio or [0.5] * len(right)
    one = torch.tensor([1])
    rollouts = [
        Rollout(torch.ones(2), one, torch.zeros(1), [], 10, share, "", {"correct": r})
        for r, share in zip(right, ratios, strict=True)
    ]
    return Group(prompt, rollouts)


def test_what_teaches_the_policy_gradient_something():
    (prompt,) = prompts(1)[:1]
    groups = [
        group(prompt, right) for right in ([1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0])
    ]
    assert informative(groups, Recipe()) == [False, False, True, True]
    # Two budgets of two answers: the last one's answers agree within each, which `cut` alone can learn from.
    pairs = Budgets(num_generations=2, answers_per_budget=2)
    assert informative(groups, Recipe(budgets=pairs)) == [False, False, True, False]
    cut = Efficiency(method="cut+pathwise")
    assert informative(groups, Recipe(budgets=pairs, efficiency=cut)) == [False, False, True, True]
    # Answers that are paid for saved tokens differ in that, where one of them is right.
    paid = Recipe(efficiency=Efficiency(method="answers"))
    saving = [group(prompt, [r, r], [0.5, 0.4]) for r in (1.0, 0.0)]
    assert informative(saving, paid) == [True, False] and informative(saving, Recipe()) == [
        False,
        False,
    ]
    assert saving[0].rollouts[0].rewards == {"correct": 1.0}  # nothing is written


def test_questions_in_place_of_others_are_of_their_task_and_new():
    deck = PromptSampler(prompts(6), 3, 4)
    asked = deck.prompts[:4]  # four of six of task a
    got = deck.instead(7, 1, ["b", "a", "a", "b", "a"], asked)
    assert [p and p.task for p in got] == ["b", "a", "a", "b", None]
    assert {p.id for p in got if p and p.task == "a"} == {"a4", "a5"}
    assert len({p.id for p in got if p}) == 4
    assert deck.instead(7, 1, ["b", "a", "a", "b", "a"], asked) == got
    assert deck.instead(7, 1, ["a", "b"], deck.prompts[:6])[0] is None  # all of task a were asked
    many = {
        tuple(p.id for p in deck.instead(s, t, ["b", "b"], [])) for s in range(4) for t in (1, 2)
    }
    assert len(many) > 4
    # A weight of a kind moves draws within its task.
    drawn = [deck.instead(s, 1, ["b"], [], {"b/0": 9.0})[0] for s in range(300)]
    assert 0.84 < sum(p.kind == "0" for p in drawn) / 300 < 0.96


class Asked:
    """Rollouts that are right or wrong by what a test says of a question, in the order of its being asked."""

    def __init__(self, monkeypatch, outcomes):
        self.asked: list[tuple[str, int]] = []
        monkeypatch.setattr(redrawing, "roll_out", self)
        self.outcomes = outcomes

    def usable_at(self, prompts, places, least):
        asked = [prompts[i] for i in places]
        return asked, [f"encoded {p.id}" for p in asked], list(places)

    def look(self, encoded):
        return tinymodels_looked(encoded)

    def __call__(self, policy, recipe, asked, encoded, features, step, reference, known, places):
        self.asked += [(p.id, place) for p, place in zip(asked, places, strict=True)]
        groups = [group(p, self.outcomes[p.id]) for p in asked]
        return Batch(groups, list(encoded), features, reference, 1, 0.5)


def tinymodels_looked(encoded):
    from zipr1.models.encoder import Looked

    seen = {name: torch.ones(1) for name in encoded}
    return Looked(seen, seen)


def test_by_hand(monkeypatch):
    """Of three places the second teaches something at once, the first after one turn, the last never."""
    policy = tinymodels.shared()
    both = prompts(4)
    dull, good = [1.0, 1.0], [1.0, 0.0]
    outcomes = {p.id: dull for p in both}
    deck = PromptSampler(both, 0, 3)
    drawn = [both[0], both[1], both[4]]
    first = deck.instead(5, 1, ["a", "b"], drawn)
    outcomes[first[0].id] = good
    second = deck.instead(5, 2, ["b"], [*drawn, *first])
    groups = [group(drawn[0], dull), group(drawn[1], good), group(drawn[2], dull)]
    batch = Batch(groups, ["x", "y", "z"], {"x": torch.zeros(1)}, {}, 1, 0.5)
    settings = Recipe(
        ppo=Ppo(redraw=2), train=Recipe().train.model_copy(update={"prompts_per_step": 3})
    )
    pictures = Asked(monkeypatch, outcomes)
    made = redrawing.redraw(policy, settings, pictures, deck, batch, drawn, 5, {})
    assert [g.prompt.id for g in made.groups] == [first[0].id, drawn[1].id, second[0].id]
    # Places of their own for the random numbers: behind the three of the step, and the three of the first turn.
    assert pictures.asked == [(first[0].id, 3), (first[1].id, 5), (second[0].id, 8)]
    assert made.redrawn == 3 and made.drawn == groups
    assert made.encoded == [f"encoded {first[0].id}", "y", f"encoded {second[0].id}"]
    assert {"x", f"encoded {first[0].id}"} <= set(made.features)
    # Without turns, and where all teach something, the batch stays as it is.
    none = settings.model_copy(update={"ppo": Ppo(redraw=0)})
    for one, recipe in ((batch, none), (Batch(groups[1:2], ["y"], {}, {}, 1, 0.5), settings)):
        same = redrawing.redraw(policy, recipe, pictures, deck, one, drawn, 5, {})
        assert same.groups == one.groups and same.redrawn == 0 and same.drawn is None
    assert len(pictures.asked) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tinymodels.make().save(folder)
    return folder


# Right or wrong by the words that were said, so that a model that has learned nothing has both.
CHECK = "def check(said, right):\n    return float(sum(map(ord, said + right)) % 3 == 0)\n"


def sections(folder: Path) -> dict:
    (folder / "check.py").write_text(CHECK)
    return {
        "rewards": {"check": f"{folder / 'check.py'}:check"},
        "ppo": {"redraw": 2, "kl_coef": 1.0},
        "efficiency": {"target": 0.5},
        "budgets": {"low": 0.6, "high": 0.9, "num_generations": 1, "answers_per_budget": 2},
    }


def test_a_run_learns_from_other_questions_and_says_so(tmp_path, model):
    recipe = tinyruns.write(tmp_path / "r.yaml", model, **sections(tmp_path))
    tinyruns.start(recipe, tmp_path / "run")
    rows = tinyruns.steps(tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "rollouts.jsonl").open()]
    plain = tinyruns.write(
        tmp_path / "p.yaml", model, **{**sections(tmp_path), "ppo": {"kl_coef": 1.0}}
    )
    tinyruns.start(plain, tmp_path / "plain")
    before = tinyruns.steps(tmp_path / "plain")
    assert all(row["redrawn"] == 0 for row in before)
    assert 0 < sum(row["redrawn"] for row in rows) <= 3 * 2 * 3
    # The first step of both begins alike.
    assert rows[0]["accuracy"] == before[0]["accuracy"] and rows[0]["gate"] == before[0]["gate"]
    assert rows[0]["dense_accuracy"] == before[0]["dense_accuracy"]
    shares = [sum(row["informative"] for row in some) for some in (rows, before)]
    assert shares[0] > shares[1]
    for row in rows:
        own = [line["rewards"] for line in lines if line["step"] == row["step"]]
        differ = [len({r["total"] for r in rewards}) > 1 for rewards in own]
        assert row["informative"] == pytest.approx(sum(differ) / 3)


def test_two_ranks_ask_the_same_further_questions(tmp_path, model):
    """Three places on two ranks: in some turns one of them has nothing to ask."""
    recipe = ranks.write(tmp_path / "r.yaml", model, **sections(tmp_path))
    ranks.equals_alone(tmp_path, recipe)
    assert sum(row["redrawn"] for row in ranks.lines(tmp_path / "one")) > 0


def test_a_run_that_goes_on_asks_what_an_unbroken_one_asks(tmp_path, model, monkeypatch):
    from zipr1.train import loop

    recipe = tinyruns.write(tmp_path / "r.yaml", model, **sections(tmp_path))
    tinyruns.start(recipe, tmp_path / "one")
    real, calls = loop.redraw, []

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("broken in the third step")
        return real(*arguments)

    monkeypatch.setattr(loop, "redraw", breaks)
    with pytest.raises(KeyError):
        tinyruns.start(recipe, tmp_path / "two")
    tinyruns.start(recipe, tmp_path / "two")
    assert len(calls) == 4  # the third step alone was done again
    assert tinyruns.steps(tmp_path / "one") == tinyruns.steps(tmp_path / "two")
