"""Roll out every prompt at every budget, all in few batches, and remember what was kept.

Everything random here is a function of (recipe seed, step, place of the prompt in the step), so the same step
gives the same rollouts on any number of processes, in any batch, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from zipr1.core import distributed
from zipr1.core.recipe import Recipe
from zipr1.core.types import Group, Prompt, Rollout
from zipr1.models.batching import by_length
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse import thresholds
from zipr1.models.sparse.request import Request
from zipr1.models.token_budget import most_tokens
from zipr1.rewards.registry import reward_of
from zipr1.train import advantages
from zipr1.train.controller import Check


@dataclass
class Batch:
    """One step's rollouts. `encoded` belongs to the groups' prompts, in their order; `features` and `reference` are
    the vision features of the policy and of the reference, by picture.

    low: lower end of the thresholds' range in this step. cut_logprobs: per group `(N,)` log-probability of the kept
    counts when sampled; None unless `cut` is used. checks: per prompt the greedy answer at the inference p beside the
    dense one; None where neither a target nor a constraint asks for it. heldout: mean mass kept for held-out probes,
    of one rollout of each prompt.
    With several ranks (`together`) groups are all of them, and `encoded` is None for other ranks' prompts.
    """

    groups: list[Group]
    encoded: list[Any]
    features: Features
    reference: Features
    probe_seed: int
    low: float
    cut_logprobs: list[torch.Tensor] | None = None
    checks: list[Check] | None = None
    heldout: float = 1.0
    accuracy: dict[str, float] = field(default_factory=dict)


def probe_seed(recipe: Recipe, step: int) -> int:
    """Probes are drawn anew in each training step; inference uses seed 0, which no step does."""
    return 1 + int(np.random.SeedSequence([recipe.seed, step]).generate_state(1)[0])


def roll_out(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    features: Features,
    step: int,
    reference: Features | None = None,
    known: dict[str, float] | None = None,
    places: Sequence[int] | None = None,
) -> Batch:
    """Sample `budgets.count` answers of each prompt; for a target or a constraint, one greedy one at `sparse.p` more.

    known: whether the dense reference answers a prompt right, by `fingerprint`; what is missing is added.
    places: of the prompts in the step (None: 0, 1, ...), on which their random numbers depend.
    """
    budgets, settings = recipe.budgets, recipe.train
    low = budgets.low_at(step, settings.steps)
    wanted = recipe.efficiency
    checked = wanted.max_accuracy_drop is not None or wanted.target is not None
    each = budgets.count + checked
    limits, uniforms = [], []
    for place in range(len(prompts)) if places is None else places:
        generator = torch.Generator().manual_seed(_seed(recipe.seed, step, place))
        drawn = thresholds.thresholds(
            budgets.count,
            policy.layers,
            low,
            budgets.high,
            budgets.per,
            budgets.sampling,
            generator,
        )
        noise = torch.rand(budgets.count, settings.max_new_tokens, generator=generator)
        if checked:
            drawn = torch.cat([drawn, torch.full((1, policy.layers), recipe.sparse.p)])
            noise = torch.cat([noise, torch.full((1, settings.max_new_tokens), -1.0)])
        limits.append(drawn)
        uniforms.append(noise)
    p, u = torch.cat(limits), torch.cat(uniforms)

    seed = probe_seed(recipe, step)
    owners = [encoded[row // each] for row in range(len(p))]
    # One rollout of each prompt is audited: the greedy one, or each budget in turn.
    audited = range(budgets.count if checked else step % budgets.count, len(p), each)
    made, cuts, heldout = policy.parallel.apart(
        lambda: sample(policy, recipe, owners, features, p, u, seed, low, audited), policy=True
    )
    groups = [Group(prompt, []) for prompt in prompts]
    greedy: list[Rollout] = []
    for place, group in enumerate(groups):
        own = made[place * each : (place + 1) * each]
        right = reward_of(group.prompt, recipe)
        for rollout in own:
            rollout.rewards["correct"] = right(rollout.text, group.prompt.answer)
        group.rollouts = own[: budgets.count]
        greedy.extend(own[budgets.count :])
    batch = Batch(
        groups,
        list(encoded),
        features,
        reference or features,
        seed,
        low,
        heldout=heldout,
    )
    if "cut" in thresholds.parse(wanted.method):
        batch.cut_logprobs = [c[: budgets.count] for c in cuts.split(each)]
    if checked:
        known = {} if known is None else known
        names = [fingerprint(prompt, e) for prompt, e in zip(prompts, encoded, strict=True)]
        new = [i for i, name in enumerate(names) if name not in known]
        asked, about = [prompts[i] for i in new], [encoded[i] for i in new]
        answered = policy.parallel.apart(
            lambda: dense_right(policy, recipe, asked, about, batch.reference), reference=True
        )
        known |= {names[i]: right for i, right in zip(new, answered, strict=True)}
        dense = [known[name] for name in names]
        batch.checks = [
            Check(
                prompt.task,
                prompt.task_kind,
                right - rollout.rewards["correct"],
                tuple(rollout.layer_ratios),
            )
            for prompt, right, rollout in zip(prompts, dense, greedy, strict=True)
        ]
        batch.accuracy = {
            "dense": float(np.mean(dense)),
            "sparse": float(np.mean([rollout.rewards["correct"] for rollout in greedy])),
        }
    return batch


def sample(
    policy: Policy,
    recipe: Recipe,
    encoded: Sequence[Encoded],
    features: Features,
    p: torch.Tensor,
    uniforms: torch.Tensor,
    seed: int,
    low: float,
    audited: Sequence[int],
) -> tuple[list[Rollout], torch.Tensor, float]:
    """One answer to each prompt at its thresholds p `(B, D)`, by its uniforms `(B, T)`; seed: of the probes.

    Returns the rollouts, the log-probabilities `(B,)` of their kept counts (0 unless `cut` is used; low: of the
    thresholds' range), and the mean mass that the audited rows kept for held-out probes.
    """
    settings, budgets = recipe.train, recipe.budgets
    wants_cut = "cut" in thresholds.parse(recipe.efficiency.method)
    made: dict[int, Rollout] = {}
    cuts, masses = torch.zeros(len(p)), []
    room = most_tokens(policy, recipe, update=False)
    lengths = [len(e) + settings.max_new_tokens for e in encoded]
    for rows in by_length(lengths, settings.micro_batch, room):
        request = Request(
            recipe.sparse, thresholds=p[rows], seed=seed, scores=wants_cut,
            audit=[b for b, row in enumerate(rows) if row in audited],
        )  # fmt: skip
        answers = policy.generate(
            [encoded[row] for row in rows], features, request, settings.max_new_tokens, uniforms[rows],
            settings.temperature,
        )  # fmt: skip
        assert answers.kept is not None and answers.counts is not None
        if answers.probe_audit_mass is not None:
            masses.append(answers.probe_audit_mass)
        if wants_cut:
            assert answers.record is not None
            layers = [layer for layer in answers.record.layers if layer.cut is not None]
            logp = thresholds.cut_log_prob(
                [layer.cut for layer in layers if layer.cut is not None],
                [layer.keep for layer in layers],
                low,
                budgets.high,
                budgets.per,
            )
            # Too short to be pruned: keeping everything was no choice.
            short = answers.record.lengths < recipe.sparse.dense_below
            cuts[rows] = logp.masked_fill(short, 0.0).cpu()
        for b, row in enumerate(rows):
            made[row] = Rollout(
                thresholds=p[row],
                tokens=answers.tokens[b],
                logprobs=answers.logprobs[b],
                kept=answers.kept[b],
                prompt_length=len(encoded[row]),
                token_ratio=float(answers.counts[b].double().mean() / len(encoded[row])),
                text=policy.processor.decode(answers.tokens[b]),
            )
    return [made[row] for row in range(len(p))], cuts, float(torch.cat(masses).mean())


def together(batch: Batch, drawn: Sequence[Prompt], places: Sequence[int]) -> Batch:
    """The groups of all ranks, in the order of the step's questions; alone, the batch as it is.

    drawn: the step's questions, places: which of them this rank rolled out. Prompts themselves are not sent: every
    rank has them.
    """
    if distributed.size() == 1:
        return batch
    count = len(places)
    own = {
        place: (
            batch.groups[i].rollouts,
            None if batch.cut_logprobs is None else batch.cut_logprobs[i],
            None if batch.checks is None else batch.checks[i],
        )
        for i, place in enumerate(places)
    }
    means = {"heldout": batch.heldout, **batch.accuracy}
    said = distributed.gather((own, count, means))
    everyone: dict[int, Any] = {place: made for part, _, _ in said for place, made in part.items()}
    order = sorted(everyone)
    media = dict(zip(places, batch.encoded, strict=True))
    shares = [n / len(order) for _, n, _ in said]
    mean = {k: sum(w * m[k] for w, (_, _, m) in zip(shares, said, strict=True)) for k in means}
    return replace(
        batch,
        groups=[Group(drawn[place], everyone[place][0]) for place in order],
        encoded=[media.get(place) for place in order],
        cut_logprobs=None
        if batch.cut_logprobs is None
        else [everyone[place][1] for place in order],
        checks=None if batch.checks is None else [everyone[place][2] for place in order],
        heldout=mean.pop("heldout"),
        accuracy=mean,
    )


def fingerprint(prompt: Prompt, encoded: Encoded) -> str:
    """What the reference's answer and its check depend on; ids will not do, for a user's rows may repeat them."""
    said = (encoded.ids.tolist(), encoded.picture, prompt.answer, prompt.accepted, prompt.reward)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def dense_right(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    features: Features,
) -> list[float]:
    """Whether the dense reference answers each prompt right, greedily."""
    right = [0.0] * len(prompts)
    with policy.reference() as model:
        lengths = [len(e) + recipe.train.max_new_tokens for e in encoded]
        room = most_tokens(policy, recipe, update=False)
        for rows in by_length(lengths, recipe.train.micro_batch, room):
            answers = policy.generate(
                [encoded[i] for i in rows], features, None, recipe.train.max_new_tokens, model=model
            )
            for b, i in enumerate(rows):
                said = policy.processor.decode(answers.tokens[b])
                right[i] = reward_of(prompts[i], recipe)(said, prompts[i].answer)
    return right


def score(
    groups: Sequence[Group], recipe: Recipe, relief: dict[str, float] | None = None
) -> torch.Tensor:
    """Rewards `(P, N)` that multiply answers' log-probabilities; each rollout's parts are kept in `rewards`.

    The part for saved tokens counts only if the method says that answers are paid for it; relief: what the constraint
    leaves of it for each task, in (0, 1].
    """
    correct = torch.tensor([[r.rewards["correct"] for r in g.rollouts] for g in groups])
    ratio = torch.tensor([[r.token_ratio for r in g.rollouts] for g in groups])
    methods = thresholds.parse(recipe.efficiency.method)
    paid = recipe.rewards.reduction if "answers" in methods else 0.0
    left = torch.tensor([[(relief or {}).get(g.prompt.task, 1.0)] for g in groups])
    total = advantages.group_reward(correct, paid * left * (1 - ratio), recipe.rewards.weight)
    saved = advantages.gate(correct > 0)[:, None] * (1 - ratio)
    for group, parts, totals in zip(groups, saved.tolist(), total.tolist(), strict=True):
        for rollout, part, value in zip(group.rollouts, parts, totals, strict=True):
            rollout.rewards["reduction"], rollout.rewards["total"] = part, value
    return total


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
