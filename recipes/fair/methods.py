"""The methods of the table, each as overrides of recipes/tiny.yaml as it is, or as a rule without training.

The paper's estimator has no target, no constraint and no dense pass, and draws a question's threshold for all layers at
once from a wide range; which lower end, is chosen by seed 0 on validation questions. It is then read at the thresholds
at which it keeps as many tokens as the others.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache

from fair.models import RECIPE, weights_hash
from zipr1.core.load import load
from zipr1.core.recipe import Recipe, Sparse
from zipr1.models.open import resolve

LOWER_ENDS = (0.15, 0.3, 0.5)
# What is asked of a run by itself is left out: recipes/compare.py asks more. And a row is measured however it goes.
UNASKED = (
    "evaluation.before=false",
    "evaluation.after=false",
    "data.heldout_prompts=40",
    "alarms.max_drift=null",
    "alarms.max_token_mass=null",
    "alarms.min_heldout_mass=null",
    "alarms.min_movement=null",
)
PAPER = (
    "efficiency.method=answers",
    "efficiency.target=null",
    "efficiency.max_accuracy_drop=null",
    "data.hard_kind_boost=0",
    "budgets.low_end=null",
    "budgets.per=rollout",
    "ppo.dense_kl_fraction=0",
)
ATTENTION = "sparse.skip=attention"
NO_POLICY_GRADIENT = "ppo.policy_gradient=0"


@dataclass(frozen=True)
class Method:
    """title: of its row. overrides: of recipes/tiny.yaml. rule: None for what is trained, else the rule of the
    untrained base."""

    title: str
    overrides: tuple[str, ...] = ()
    rule: str | None = None

    def recipe(self, seed: int) -> Recipe:
        return _recipe(self.overrides, seed)

    def sparse(self) -> Sparse:
        """How its tokens are chosen, but for p. Without training, all MLPs see all tokens: that loses least."""
        sparse = self.recipe(0).sparse
        if self.rule is None:
            return sparse
        return sparse.model_copy(update={"rule": self.rule, "skip": "attention"})

    def hashes(self, seed: int) -> tuple[str, str]:
        """`recipe_sha256` of a run, and a hash that runs share which differ by their seed alone. Without training, both
        are of the base's weights and of how its tokens are chosen."""
        if self.rule is None:
            return self.recipe(seed).sha256(), self.recipe(0).sha256()
        parts = [self.sparse().model_dump(mode="json"), _base_hash()]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return digest, digest


@cache
def _recipe(overrides: tuple[str, ...], seed: int) -> Recipe:
    return load(RECIPE, [f"seed={seed}", *overrides])


@cache
def _base_hash() -> str:
    return weights_hash(resolve("tiny"))


def paper(low: float) -> dict[str, Method]:
    """The paper's estimator with thresholds from `low` on, and its variants."""
    title = f"the paper's estimator, p from {low:g}"
    wide = (*UNASKED, *PAPER, f"budgets.low={low}")
    return {
        f"paper-{low:g}": Method(title, wide),
        f"paper-no-pg-{low:g}": Method(f"{title}, no policy gradient", (*wide, NO_POLICY_GRADIENT)),
        f"paper-attention-{low:g}": Method(f"{title}, attention alone", (*wide, ATTENTION)),
        f"paper-attention-no-pg-{low:g}": Method(
            f"{title}, attention alone, no policy gradient", (*wide, ATTENTION, NO_POLICY_GRADIENT)
        ),
    }


METHODS: dict[str, Method] = {
    "ours": Method("ours"),
    "no-policy-gradient": Method("ours, no policy gradient", (*UNASKED, NO_POLICY_GRADIENT)),
    "no-kl": Method("ours, no KL", (*UNASKED, "ppo.kl_coef=0")),
    "nothing-pressed": Method(
        "ours, nothing pressed", (*UNASKED, "efficiency.weight=0", "efficiency.target=null")
    ),
    **{name: method for low in LOWER_ENDS for name, method in paper(low).items()},
    "cut": Method(
        "`cut`",
        (*UNASKED, "efficiency.method=cut", "efficiency.weight=2", "budgets.sampling=independent"),
    ),
    "top_p": Method("no training, top-p", rule="top_p"),
    "top_k": Method("no training, top-k", rule="top_k"),
    "random": Method("no training, random", rule="random"),
}
BASE = "top_p"  # whose rows at `dense` are the untouched base's own answers
TRIES = tuple(f"paper-{low:g}" for low in LOWER_ENDS)
