"""Roll out every prompt at every budget, all in few batches, and remember what was kept.

One function for each part: thresholds and random numbers are drawn, answers sampled, graded, and the greedy ones at the
inference p checked against the dense reference. What rewards become is zipr1/train/minibatch.py.

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

from zipr1.core import distributed, watch
from zipr1.core.methods import parse
from zipr1.core.recipe import Recipe
from zipr1.core.types import Group, Prompt, Rollout
from zipr1.models.batching import by_length
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse import thresholds
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import Request, dense_below
from zipr1.models.token_budget import token_budget
from zipr1.rewards.registry import reward_of
from zipr1.train.controller import Check


@dataclass
class Batch:
    """One step's rollouts. `encoded` belongs to the groups' prompts, in their order; `features` and `reference` are
    the vision features of the policy and of the reference, by picture.

    low: lower end of the thresholds' range in this step. cut_logprobs: per group `(N,)` log-probability of the kept
    counts when sampled; None unless `cut` is used. checks: per prompt the greedy answer at the inference p beside the
    dense one; None where neither a target nor a constraint asks for it. dense: per prompt how right the dense reference
    answers; None where nobody asks. probe_audit_mass: mean score mass of other,
    held-out probes that the kept tokens hold, of one rollout of each prompt. accuracy: of the greedy answers, `dense`
    and `sparse`.
    With several ranks (`together`) groups are all of them, and `encoded` is None for other ranks' prompts.
    drawn: the groups of the step's questions before others took the place of some (redraw.py); None: none did. redrawn:
    how many further questions were asked.
    """

    groups: list[Group]
    encoded: list[Any]
    features: Features
    reference: Features
    probe_seed: int
    low: float
    cut_logprobs: list[torch.Tensor] | None = None
    checks: list[Check] | None = None
    dense: list[float] | None = None
    probe_audit_mass: float = 1.0
    accuracy: dict[str, float] = field(default_factory=dict)
    drawn: list[Group] | None = None
    redrawn: int = 0


@dataclass(frozen=True)
class Draws:
    """What the answers are sampled with: U prefills, those of a prompt after each other, and B answers read from them.

    thresholds `(U, D)` float32: the p of each layer. greedy `(U,)` bool: prefills whose one answer takes the likeliest
    word; its uniforms are not read. owner `(B,)` int64, ascending: the prefill of each answer. uniforms `(B, T)`
    float32 in [0, 1): answer b samples its t-th word by uniforms[b, t]. low: lower end of the range of the thresholds.
    """

    thresholds: torch.Tensor
    greedy: torch.Tensor
    owner: torch.Tensor
    uniforms: torch.Tensor
    low: float


@dataclass(frozen=True)
class Sampled:
    """All answers of `Draws`. cut_logprobs `(B,)`: log-probability of the kept counts, 0 unless `cut` is used.
    probe_audit_mass: as in `Batch`, the mean over the audited rows."""

    rollouts: list[Rollout]
    cut_logprobs: torch.Tensor
    probe_audit_mass: float


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
    """`budgets.group` answers of each prompt, those of a budget after each other, graded; for a target or a constraint,
    one greedy one at `sparse.p` more, checked against the dense reference. Of no prompts at all nothing comes.

    known: whether the dense reference answers a prompt right, by `fingerprint`; what is missing is added.
    places: of the prompts in the step (None: 0, 1, ...), on which their random numbers depend.
    """
    budgets, count, seed = (
        recipe.budgets.num_generations,
        recipe.budgets.group,
        probe_seed(recipe, step),
    )
    checked = has_greedy_rows(recipe)
    prefills, each = budgets + checked, count + checked
    # 1. thresholds and random numbers for every answer
    draws = draw(recipe, policy.layers, step, range(len(prompts)) if places is None else places)
    # 2. the answers; one prefill of each prompt is audited: the greedy one, or each budget in turn
    rows = [one for one in encoded for _ in range(prefills)]
    audited = range(budgets if checked else step % budgets, len(rows), prefills)
    sampled = policy.parallel.run_unsharded(
        lambda: sample(policy, recipe, rows, features, draws, seed, audited), policy=True
    )
    made = [sampled.rollouts[i * each : (i + 1) * each] for i in range(len(prompts))]
    # 3. graded
    for prompt, own in zip(prompts, made, strict=True):
        grade(prompt, own, recipe)
        for rollout in own[:count]:
            if rollout.truncated and recipe.rewards.truncated == "zero":
                rollout.rewards["correct"] = 0.0
    batch = Batch(
        [Group(prompt, own[:count]) for prompt, own in zip(prompts, made, strict=True)],
        list(encoded),
        features,
        reference or features,
        seed,
        draws.low,
        probe_audit_mass=sampled.probe_audit_mass,
    )
    if "cut" in parse(recipe.efficiency.method):
        cuts = sampled.cut_logprobs.unflatten(0, (len(prompts), each))
        batch.cut_logprobs = list(cuts[:, :count])
    # 4. the greedy answers at the inference p, beside those of the dense reference
    if checked or gates_kl(recipe):
        known = {} if known is None else known
        dense = dense_correct(policy, recipe, prompts, encoded, batch.reference, known)
        batch.dense = dense
    if checked:
        greedy = [own[count] for own in made]
        batch.checks = [check(*three) for three in zip(prompts, greedy, dense, strict=True)]
        right = [rollout.rewards["correct"] for rollout in greedy]
        if prompts:
            batch.accuracy = {"dense": float(np.mean(dense)), "sparse": float(np.mean(right))}
    return batch


def has_greedy_rows(recipe: Recipe) -> bool:
    """Whether each prompt gets a greedy answer at the inference p too: a target or a constraint needs it."""
    return recipe.efficiency.max_accuracy_drop is not None or recipe.efficiency.target is not None


def gates_kl(recipe: Recipe) -> bool:
    """Whether the KL asks how right the dense reference is."""
    return recipe.ppo.kl_gate == "dense_right" and recipe.ppo.kl_coef > 0


def draw(recipe: Recipe, layers: int, step: int, places: Sequence[int]) -> Draws:
    """Of prompts at these places in the step: for each its budgets, then its greedy prefill if it has one."""
    budgets, length = recipe.budgets, recipe.train.max_new_tokens
    low, checked = budgets.low_at(step, recipe.train.steps), has_greedy_rows(recipe)
    limits, uniforms = [torch.empty(0, layers)], [torch.empty(0, length)]
    answers = torch.tensor([budgets.answers_per_budget] * budgets.num_generations + [1] * checked)
    for place in places:
        generator = torch.Generator().manual_seed(_seed(recipe.seed, step, place))
        limits.append(
            thresholds.thresholds(
                budgets.num_generations,
                layers,
                low,
                budgets.high,
                budgets.per,
                budgets.sampling,
                generator,
            )
        )
        uniforms.append(torch.rand(budgets.group, length, generator=generator))
        if checked:
            limits.append(torch.full((1, layers), recipe.sparse.p))
            uniforms.append(torch.zeros(1, length))
    greedy = torch.tensor([False] * budgets.num_generations + [True] * checked)
    answers = answers.repeat(len(places))
    owner = torch.arange(len(answers)).repeat_interleave(answers)
    return Draws(torch.cat(limits), greedy.repeat(len(places)), owner, torch.cat(uniforms), low)


def sample(
    policy: Policy,
    recipe: Recipe,
    encoded: Sequence[Encoded],
    features: Features,
    draws: Draws,
    seed: int,
    audited: Sequence[int],
) -> Sampled:
    """The answers of `draws`; encoded: the prompt of each prefill, seed: of the probes. audited: of the prefills.

    A prefill's answers are read from it together, in the passes that follow: rows of those are answers.
    """
    settings, wants_cut = recipe.train, "cut" in parse(recipe.efficiency.method)
    made: dict[int, Rollout] = {}
    cuts, masses = torch.zeros(len(draws.owner)), []
    answers_of: list[list[int]] = [[] for _ in encoded]
    for row, prefill in enumerate(draws.owner.tolist()):
        answers_of[prefill].append(row)
    lengths = [len(e) + settings.max_new_tokens for e in encoded]
    room, most = token_budget(policy, recipe, update=False), recipe.budgets.answers_per_budget
    room = None if room is None else room // most
    for prefills in by_length(lengths, max(1, settings.micro_batch // most), room):
        p = draws.thresholds[prefills]
        request = Request(
            recipe.sparse, thresholds=p, seed=seed, scores=wants_cut,
            audit=[b for b, prefill in enumerate(prefills) if prefill in audited],
        )  # fmt: skip
        rows = [row for prefill in prefills for row in answers_of[prefill]]
        owner = torch.tensor([b for b, i in enumerate(prefills) for _ in answers_of[i]])
        answers = policy.generate(
            [encoded[i] for i in prefills], features, request, settings.max_new_tokens,
            draws.uniforms[rows], settings.temperature, greedy=draws.greedy[prefills][owner],
            owner=owner if most > 1 else None,
        )  # fmt: skip
        assert answers.kept is not None and answers.counts is not None
        if answers.probe_audit_mass is not None:
            masses.append(answers.probe_audit_mass)
        if wants_cut:
            cuts[rows] = cut_logprobs(answers.record, recipe, draws.low)[owner]
        for b, (row, prefill) in enumerate(zip(rows, owner.tolist(), strict=True)):
            length = len(encoded[prefills[prefill]])
            made[row] = Rollout(
                thresholds=p[prefill],
                tokens=answers.tokens[b],
                logprobs=answers.logprobs[b],
                kept=answers.kept[b],
                prompt_length=length,
                token_ratio=float(answers.counts[b].double().mean() / length),
                text=policy.processor.decode(answers.tokens[b]),
                truncated=int(answers.tokens[b][-1]) not in policy.processor.end_ids,
            )
    rollouts = [made[row] for row in range(len(draws.owner))]
    return Sampled(rollouts, cuts, float(torch.cat(masses).mean()) if masses else 1.0)


def cut_logprobs(record: Record | None, recipe: Recipe, low: float) -> torch.Tensor:
    """Log-probability `(B,)` of the kept counts of a pass that kept its scores; low: of the thresholds' range."""
    assert record is not None
    layers = [layer for layer in record.layers if layer.cut is not None]
    logp = thresholds.cut_log_prob(
        [layer.cut for layer in layers if layer.cut is not None],
        [layer.keep for layer in layers],
        low,
        recipe.budgets.high,
        recipe.budgets.per,
    )
    # Too short to be pruned: keeping everything was no choice.
    short = record.lengths < dense_below(recipe.sparse, record.candidates.device)
    return logp.masked_fill(short, 0.0).cpu()


def grade(prompt: Prompt, rollouts: Sequence[Rollout], recipe: Recipe) -> None:
    """How right the answers are, as `rewards["correct"]`."""
    reward = reward_of(prompt, recipe)
    for rollout in rollouts:
        rollout.rewards["correct"] = reward(rollout.text, prompt.answer)
        watch.alive()  # a check of the user's own may take long


def check(prompt: Prompt, greedy: Rollout, dense: float) -> Check:
    """A greedy answer at the inference p beside the dense one. dense: how right that is."""
    gap = dense - greedy.rewards["correct"]
    return Check(prompt.task, prompt.task_kind, gap, tuple(greedy.layer_ratios), dense)


def dense_correct(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    features: Features,
    known: dict[str, float],
) -> list[float]:
    """How right the dense reference answers each prompt. features: its own. known: by `fingerprint`; it grows. All
    ranks must ask."""
    names = [fingerprint(prompt, e) for prompt, e in zip(prompts, encoded, strict=True)]
    new = [i for i, name in enumerate(names) if name not in known]

    def answer() -> list[tuple[float, float]]:
        with policy.reference() as model:
            return answer_greedily(policy, recipe, prompts, encoded, features, new, model=model)

    found = policy.parallel.run_unsharded(answer, reference=True)
    known |= {names[i]: right for i, (right, _) in zip(new, found, strict=True)}
    return [known[name] for name in names]


def answer_greedily(
    policy: Policy,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    encoded: Sequence[Encoded],
    features: Features,
    which: Sequence[int],
    request: Request | None = None,
    model: Any = None,
) -> list[tuple[float, float]]:
    """Of each of the prompts `which`, how right its greedy answer is and the share of its tokens that was kept.

    request: sparse; None: dense. model: the reference's; None: the policy's own.
    """
    length = recipe.train.max_new_tokens
    found = [(0.0, 1.0)] * len(which)
    room = token_budget(policy, recipe, update=False)
    lengths = [len(encoded[i]) + length for i in which]
    for rows in by_length(lengths, recipe.train.micro_batch, room):
        few = [encoded[which[row]] for row in rows]
        answers = policy.generate(few, features, request, length, model=model)
        for b, row in enumerate(rows):
            prompt, text = prompts[which[row]], policy.processor.decode(answers.tokens[b])
            right, kept = reward_of(prompt, recipe)(text, prompt.answer), 1.0
            watch.alive()
            if answers.counts is not None:
                kept = float(answers.counts[b].double().mean()) / len(few[b])
            found[row] = right, kept
    return found


def fingerprint(prompt: Prompt, encoded: Encoded) -> str:
    """What the reference's answer and its check depend on; ids will not do, for a user's rows may repeat them."""
    parts = (encoded.ids.tolist(), encoded.picture, prompt.answer, prompt.accepted, prompt.reward)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def together(batch: Batch, drawn: Sequence[Prompt], places: Sequence[int]) -> Batch:
    """The groups of all ranks, in the order of the step's questions; alone, the batch as it is.

    drawn: the step's questions, places: which of them this rank rolled out. Prompts themselves are not sent: every
    rank has them.
    """
    if distributed.size() == 1:
        return batch
    own = by_place(batch, places)
    means = {"audit": batch.probe_audit_mass, **batch.accuracy}
    parts = distributed.gather((own, len(places), means))
    everyone: dict[int, Any] = {place: made for part, _, _ in parts for place, made in part.items()}
    order = sorted(everyone)
    media = dict(zip(places, batch.encoded, strict=True))
    shares = [n / len(order) for _, n, _ in parts]
    mean = {k: sum(w * m[k] for w, (_, _, m) in zip(shares, parts, strict=True)) for k in means}
    return replace(
        batch,
        groups=[Group(drawn[place], everyone[place][0]) for place in order],
        encoded=[media.get(place) for place in order],
        cut_logprobs=None
        if batch.cut_logprobs is None
        else [everyone[place][1] for place in order],
        checks=None if batch.checks is None else [everyone[place][2] for place in order],
        dense=None if batch.dense is None else [everyone[place][3] for place in order],
        probe_audit_mass=mean.pop("audit"),
        accuracy=mean,
    )


def by_place(batch: Batch, places: Sequence[int]) -> dict[int, tuple[Any, ...]]:
    """What other ranks must know of each prompt that was rolled out here, by its place in the step: its rollouts, and
    its cut_logprobs, check and dense answer, None where the step has none. places: of the batch's prompts."""
    lists = (batch.cut_logprobs, batch.checks, batch.dense)
    return {
        place: (batch.groups[i].rollouts, *(None if one is None else one[i] for one in lists))
        for i, place in enumerate(places)
    }


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
