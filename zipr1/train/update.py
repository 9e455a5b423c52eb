"""One PPO update from one step's rollouts: losses are summed here, the mathematics is in losses and efficiency.

Kept sets are replayed, never chosen again, so a ratio compares two models on the same computation. The dense
reference scores each distinct (prompt, answer) once, whatever the number of budgets that gave it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zipr1.core import distributed
from zipr1.core.recipe import Recipe
from zipr1.models.batching import by_length, replay_masks
from zipr1.models.policy import Policy
from zipr1.models.shared_prefill import ANSWERS, shared_states
from zipr1.models.sparse import thresholds
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.models.token_budget import most_tokens
from zipr1.train import advantages, losses
from zipr1.train.controller import Pressure
from zipr1.train.optim import Optimizers, clipped_step
from zipr1.train.rollout import Batch, score


@dataclass
class Rows:
    """The rollouts of a step, flat: row b is rollout `b % N` of prompt `b // N`. weights: `(D, B)`."""

    prompt: list[int]
    tokens: list[torch.Tensor]
    kept: list[list[torch.Tensor]]
    old: list[torch.Tensor]
    advantage: torch.Tensor
    cut_old: torch.Tensor | None
    cut_advantage: torch.Tensor
    opened: torch.Tensor
    weights: torch.Tensor
    lengths: list[int]


def flatten(batch: Batch, recipe: Recipe, pressure: Pressure) -> Rows:
    """Rewards to advantages, groups to rows. pressure: of saved tokens in the reward of the `cut` action."""
    settings = recipe.ppo
    total = score(batch.groups, recipe, pressure.relief)
    correct = torch.tensor([[r.rewards["correct"] for r in g.rollouts] for g in batch.groups])
    count = total.shape[1]
    rollouts = [r for g in batch.groups for r in g.rollouts]
    prompt = [i for i in range(len(batch.groups)) for _ in range(count)]
    weights = pressure.rows(batch.groups[i].prompt.task for i in prompt)
    ratios = torch.tensor([r.layer_ratios for r in rollouts])
    saved = (weights.T * (1 - ratios)).mean(1).reshape(total.shape)
    worth = advantages.group_reward(correct, saved, recipe.rewards.weight)
    return Rows(
        prompt=prompt,
        tokens=[r.tokens for r in rollouts],
        kept=[r.kept for r in rollouts],
        old=[r.logprobs for r in rollouts],
        advantage=advantages.advantages(total, settings.baseline, settings.scale).flatten(),
        cut_old=None if batch.cut_logprobs is None else torch.cat(batch.cut_logprobs),
        cut_advantage=advantages.advantages(worth, settings.baseline, settings.scale).flatten(),
        opened=advantages.gate(correct > 0).repeat_interleave(count),
        weights=weights,
        lengths=[r.prompt_length + len(r.tokens) for r in rollouts],
    )


def update(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    optimizer: Optimizers,
    pressure: Pressure,
    order: torch.Generator,
) -> dict[str, float]:
    """All epochs and minibatches of one step. pressure: weights of the expected token ratio, by task and layer.

    order: shuffles rows into minibatches. Returns means over rows of what metrics.jsonl logs.
    Raises RunError if the loss is not finite; weights are then those of before the failing minibatch.

    Several ranks share the minibatches: each works on the rows whose pictures it has, and all make the same number of
    passes, the missing ones with weight 0, for the passes are where ranks wait for each other.
    """
    rows = flatten(batch, recipe, pressure)
    said: dict[str, float] = defaultdict(float)
    norms = 0.0
    here = [b for b, i in enumerate(rows.prompt) if batch.encoded[i] is not None]
    room = most_tokens(policy, recipe, update=True)
    count = min(recipe.ppo.minibatches, len(rows.tokens))
    steps = recipe.ppo.epochs * count
    for _ in range(recipe.ppo.epochs):
        shuffled = torch.randperm(len(rows.tokens), generator=order)
        for part in shuffled.tensor_split(count):
            # In order, so that rollouts of one prompt meet in a micro-batch and share their reference.
            mini = sorted(part.tolist())
            optimizer.zero_grad()
            dense = dense_rows(recipe, batch, mini)
            own = [b for b in mini if batch.encoded[rows.prompt[b]] is not None]
            places = by_length([rows.lengths[b] for b in own], recipe.train.micro_batch, room)
            micro = [[own[i] for i in part] for part in places]
            passes = max(distributed.gather(len(micro)))
            for turn in range(passes):
                chosen = micro[turn] if turn < len(micro) else here[:1]
                share = len(chosen) / len(mini) if turn < len(micro) else 0.0
                some = [b for b in chosen if b in dense and share]
                if some or (dense and policy.parallel.sharded):
                    asked = len(some) / len(dense)
                    kl = backward_dense(policy, recipe, batch, rows, some or chosen[:1], asked)
                    said["kl_dense"] += kl * asked / steps
                parts = backward(policy, recipe, batch, rows, chosen, share, turn + 1 == passes)
                for name, value in parts.items() if share else ():
                    if name == "ratio_max":
                        said[name] = max(said[name], value)
                    else:
                        said[name] += value * len(chosen) / len(mini) / steps
            norm = clipped_step(
                optimizer, policy.trainable(), recipe.optim.max_grad_norm, said["loss"]
            )
            norms += norm / steps
    return {**totals(said), "grad_norm": norms}


def dense_rows(recipe: Recipe, batch: Batch, mini: Sequence[int]) -> set[int]:
    """Which rows of a minibatch are read at p = 1, too: one in `1 / ppo.dense`, others in each step."""
    if not recipe.ppo.dense or not recipe.ppo.kl:
        return set()
    every = round(1 / recipe.ppo.dense)
    return {b for b in mini if (b + batch.probe_seed) % every == 0}


def totals(said: dict[str, float]) -> dict[str, float]:
    """The sums of all ranks, and the largest ratio."""
    parts = distributed.gather(dict(said))
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: (max if name == "ratio_max" else sum)(part.get(name, 0.0) for part in parts)
        for name in names
    }


def backward(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    rows: Rows,
    chosen: Sequence[int],
    share: float,
    last: bool = True,
) -> dict[str, float]:
    """Loss of some rows, its gradient times `share` added to the parameters'. Returns the parts.

    last: whether the ranks' gradients are summed after it."""
    methods = thresholds.parse(recipe.efficiency.method)
    settings, budgets = recipe.ppo, recipe.budgets
    encoded = [batch.encoded[rows.prompt[b]] for b in chosen]
    tokens = [rows.tokens[b] for b in chosen]
    reference = None
    if settings.kl > 0:
        # Before the sparse context: with adapters the reference is this very model.
        reference = policy.parallel.refer(lambda: look_up(policy, batch, rows, chosen))
    width = max(rows.lengths[b] for b in chosen)
    request = Request(
        recipe.sparse,
        seed=batch.probe_seed,
        replay=replay_masks([rows.kept[b] for b in chosen], width, policy.device),
        scores=bool(methods & {"pathwise", "cut", "through"}),
        through=(batch.low, budgets.high) if "through" in methods else None,
    )
    parts: dict[str, float] = {}

    def work() -> torch.Tensor:
        features = batch.features
        if policy.settings.train_vision:
            features = policy.look(encoded)
        states, mask = policy.answer_states(encoded, features, tokens, run)
        padded = pad(tokens, mask.shape[1]).to(policy.device)
        new, each = token_scores(policy, recipe, states, padded, mask, reference)
        old = pad([rows.old[b] for b in chosen], mask.shape[1]).to(policy.device)
        advantage = rows.advantage[chosen].to(policy.device)
        surrogate, stats = losses.clipped_surrogate(new, old, advantage, mask, settings.clip)
        parts.update({name: float(value) for name, value in stats.items()})
        kl = (each.sum(1) / mask.sum(1)).mean()
        loss = settings.policy_gradient * surrogate + settings.kl * kl
        layers = run.record.layers if run.record is not None else []
        cuts = [layer.cut for layer in layers if layer.cut is not None]
        # Prompts too short to be pruned have no choice to learn.
        short = torch.tensor([len(e) < recipe.sparse.dense_below for e in encoded])
        short = short.to(policy.device)
        if "pathwise" in methods:
            assert run.record is not None
            prompt = run.record.candidates
            expected = torch.stack(
                [thresholds.expected_ratio(c, batch.low, budgets.high, prompt) for c in cuts]
            ).masked_fill(short, 1.0)
            # An all-wrong group is not paid for saving, here as in the reward.
            weights = rows.weights[:, chosen] * rows.opened[chosen]
            loss = loss + (expected * weights.to(policy.device)).mean()
            parts["expected_ratio"] = float(expected.detach().mean())
        if "cut" in methods:
            assert rows.cut_old is not None
            kept = [layer.keep for layer in layers]
            logp = thresholds.cut_log_prob(cuts, kept, batch.low, budgets.high, budgets.per)
            logp = logp.masked_fill(short, 0.0)
            gain = rows.cut_advantage[chosen].to(policy.device)
            surrogate, stats = losses.clipped_action(
                logp, rows.cut_old[chosen].to(policy.device), gain, settings.clip
            )
            loss = loss + surrogate
            parts["cut_clip_fraction"] = float(stats["clip_fraction"])
            parts["cut_ratio_mean"] = float(stats["ratio_mean"])
        parts["loss"], parts["kl"] = float(loss.detach()), float(kl.detach())
        return with_tower(policy, encoded, loss * share)

    with sparse_attention(policy.core, request) as run, policy.recomputing():
        policy.parallel.backward(work, last)
    return parts


def with_tower(policy: Policy, encoded: Sequence[Any], loss: torch.Tensor) -> torch.Tensor:
    """The loss, with a gradient of 0 for a trained tower that these rows do not look through: the other ranks wait."""
    shown = any(e.visuals for e in encoded)
    if distributed.size() > 1 and policy.settings.train_vision and not shown:
        return loss + policy.blank()
    return loss


def backward_dense(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    rows: Rows,
    some: Sequence[int],
    share: float,
) -> float:
    """The mean divergence from the reference of some rows, run dense. Its gradient times `ppo.kl` and `share` is added
    to the parameters'; the ranks' are not yet summed."""
    encoded = [batch.encoded[rows.prompt[b]] for b in some]
    tokens = [rows.tokens[b] for b in some]
    reference = policy.parallel.refer(lambda: look_up(policy, batch, rows, some))
    said: list[float] = []

    def work() -> torch.Tensor:
        features = batch.features
        if policy.settings.train_vision:
            features = policy.look(encoded)
        states, mask = policy.answer_states(encoded, features, tokens)
        padded = pad(tokens, mask.shape[1]).to(policy.device)
        _, each = token_scores(policy, recipe, states, padded, mask, reference)
        kl = (each.sum(1) / mask.sum(1)).mean()
        said.append(float(kl.detach()))
        return with_tower(policy, encoded, recipe.ppo.kl * kl * share)

    with policy.recomputing():
        policy.parallel.backward(work, False)
    return said[0]


@dataclass(frozen=True)
class Reference:
    """The dense reference's view of some rows. states `(U * T, hidden)` of U distinct (prompt, answer) pairs;
    place `(B * T,)` int64: which of them each token of each row is."""

    states: torch.Tensor
    place: torch.Tensor
    model: Any

    @torch.no_grad()
    def logits(self, policy: Policy, part: slice) -> torch.Tensor:
        """`(n, V)` of these tokens of the flattened rows; tokens that rows share go through the head once."""
        distinct, back = self.place[part].unique(return_inverse=True)
        return policy.head(self.states[distinct], self.model)[back]


@torch.no_grad()
def look_up(policy: Policy, batch: Batch, rows: Rows, chosen: Sequence[int]) -> Reference:
    """What the dense reference says about some rows; each distinct (prompt, answer) is run once, and where prompts have
    many answers, each prompt."""
    keys = [(rows.prompt[b], tuple(rows.tokens[b].tolist())) for b in chosen]
    distinct = list(dict.fromkeys(keys))
    prompts = list(dict.fromkeys(i for i, _ in distinct))
    answers = [torch.tensor(t) for _, t in distinct]
    # Sharded, all ranks must make the same number of passes.
    share = len(distinct) >= ANSWERS * len(prompts) and not policy.parallel.sharded
    with policy.reference() as model:
        if share:
            encoded = [batch.encoded[i] for i in prompts]
            owner = [prompts.index(i) for i, _ in distinct]
            states, mask = shared_states(policy, encoded, owner, batch.reference, answers, model)
        else:
            encoded = [batch.encoded[i] for i, _ in distinct]
            states, mask = policy.answer_states(encoded, batch.reference, answers, None, model)
    row = {key: place for place, key in enumerate(distinct)}
    width = mask.shape[1]
    back = torch.tensor([row[key] for key in keys], device=states.device)
    place = back[:, None] * width + torch.arange(width, device=states.device)
    return Reference(states.flatten(0, 1), place.flatten(), model)


def token_scores(
    policy: Policy,
    recipe: Recipe,
    states: torch.Tensor,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    reference: Reference | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answers' tokens and the divergence from the reference there, both `(B, T)` float32.

    states `(B, T, hidden)` with gradient; tokens `(B, T)` int64; mask `(B, T)` bool. The divergence is 0 where the
    mask is False, and everywhere without a reference. Logits exist a chunk at a time, forward and backward.
    """
    flat, said, real = states.flatten(0, 1), tokens.flatten(), mask.flatten()
    scale, estimator = recipe.train.temperature, recipe.ppo.kl_estimator

    def work(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = real[part]
        if not bool(wanted.any()):
            nothing = flat.new_zeros(len(wanted), dtype=torch.float32)
            return nothing, nothing
        logits = policy.head(flat[part])
        new = losses.token_logprobs(logits, said[part], scale)
        each = torch.zeros_like(new)
        if reference is None:
            return new, each
        dense = reference.logits(policy, part)
        if estimator in losses.FORWARD:
            forward = losses.FORWARD[estimator]
            each[wanted] = losses.kl_full(logits[wanted] / scale, dense[wanted] / scale, forward)
        else:
            old = losses.token_logprobs(dense, said[part], scale)
            each = losses.kl_k2(new, old).masked_fill(~wanted, 0)
        return new, each

    new, each = losses.in_chunks(work, len(said), policy.words)
    return new.view(mask.shape), each.view(mask.shape)


def pad(values: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """`(T,)` tensors -> `(B, width)`, zeros on the right."""
    out = values[0].new_zeros(len(values), width)
    for b, v in enumerate(values):
        out[b, : len(v)] = v
    return out
