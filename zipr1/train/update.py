"""One PPO update from one step's rollouts: losses are put together here, the mathematics is in zipr1/train/losses.py
and zipr1/models/sparse/thresholds.py.

Kept sets are replayed, never chosen again, so a ratio compares two models on the same computation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

import torch

from zipr1.core import distributed
from zipr1.core.methods import parse
from zipr1.core.recipe import Recipe
from zipr1.models.batching import by_length, replay_masks
from zipr1.models.policy import Features, Policy
from zipr1.models.processors import Encoded
from zipr1.models.sparse import thresholds
from zipr1.models.sparse.patch import SparseRun, sparse_attention
from zipr1.models.sparse.record import Record
from zipr1.models.sparse.request import Request, dense_below
from zipr1.models.token_budget import token_budget
from zipr1.models.transfer import send
from zipr1.train import losses
from zipr1.train.controller import EfficiencyController
from zipr1.train.minibatch import Rows, flatten, pad
from zipr1.train.optim import Optimizers, clipped_step
from zipr1.train.reference import Reference, look_up, token_scores
from zipr1.train.rollout import Batch

# A loss, and scalars about it for metrics.jsonl. They stay on the device until the step has ended: a GPU that had to
# tell them after each pass would be waited for.
Stats = dict[str, torch.Tensor]
# Of the first minibatch alone, whose weights are still the sampler's: later ones have been learned from.
FIRST = "sampler_mismatch"
Loss = tuple[torch.Tensor, Stats]

LAYERS = 4  # of the embedded model, on which the gains of `efficiency.controller` were found


def update(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    optimizer: Optimizers,
    controller: EfficiencyController,
    order: torch.Generator,
) -> dict[str, float]:
    """All epochs and minibatches of one step. controller: weights of the expected token ratio, by task and layer.

    order: shuffles rows into minibatches. Returns means over rows of what metrics.jsonl logs: among them
    `sampler_mismatch`, by how much the sampler and the first minibatch's pass differ on the log-probability of the same
    tokens, before any step changed the weights (that is what kernels and rounding make of it); `grad_norm`, before
    clipping; `grad_clipped`, the share of that norm that clipping took.
    Raises RunError if the loss is not finite; weights are then those of before the failing minibatch.

    Several ranks share the minibatches: each works on the rows whose pictures it has, and all make the same number of
    passes, the missing ones with weight 0, for the passes are where ranks wait for each other.
    """
    rows = flatten(batch, recipe, controller)
    # Of each pass, with its rows and those of its minibatch; the dense ones with their share of the minibatch's.
    noted: list[tuple[Stats, int, int]] = []
    dense_kl: list[tuple[torch.Tensor, float]] = []
    norms = clipped = 0.0
    updates = 0
    here = [b for b, i in enumerate(rows.prompt) if batch.encoded[i] is not None]
    room = token_budget(policy, recipe, update=True)
    count = min(recipe.ppo.minibatches, len(rows.tokens))
    steps = recipe.ppo.epochs * count
    for _ in range(recipe.ppo.epochs):
        shuffled = torch.randperm(len(rows.tokens), generator=order)
        for part in shuffled.tensor_split(count):
            # In order, so that rollouts of one prompt meet in a micro-batch and share their reference.
            mini = sorted(part.tolist())
            optimizer.zero_grad()
            lost = torch.zeros((), device=policy.device)
            dense = dense_rows(recipe, batch, mini)
            each, dense_each = (rows.tokens_each(some, recipe) for some in (mini, dense))
            own = [b for b in mini if batch.encoded[rows.prompt[b]] is not None]
            places = by_length([rows.lengths[b] for b in own], recipe.train.micro_batch, room)
            micro = [[own[i] for i in part] for part in places]
            passes = max(distributed.gather(len(micro)))
            for turn in range(passes):
                chosen = micro[turn] if turn < len(micro) else here[:1]
                share = len(chosen) / len(mini) if turn < len(micro) else 0.0
                some = [b for b in chosen if b in dense and share]
                if some or (dense and policy.parallel.sharded):
                    part_of = len(some) / len(dense)
                    kl = backward_dense(
                        policy, recipe, batch, rows, some or chosen[:1], part_of, dense_each
                    )
                    dense_kl.append((kl, part_of))
                stats = backward(
                    policy, recipe, batch, rows, chosen, share, turn + 1 == passes, each
                )
                if updates:
                    del stats[FIRST]
                if share:
                    noted.append((stats, len(chosen), len(mini)))
                    lost += stats["loss"]
            most = recipe.optim.max_grad_norm
            norm = clipped_step(optimizer, policy.trainable(), most, lost)
            updates += 1
            norms += norm / steps
            clipped += max(0.0, 1 - most / norm) / steps if norm else 0.0
    means = over_ranks(means_of(noted, dense_kl, steps))
    return {**means, "grad_norm": norms, "grad_clipped": clipped}


def means_of(
    noted: Sequence[tuple[Stats, int, int]],
    dense_kl: Sequence[tuple[torch.Tensor, float]],
    steps: int,
) -> dict[str, float]:
    """Means over a step's rows of what its passes noted, and the largest ratio; a GPU is waited for once."""
    scalars = [kl for kl, _ in dense_kl] + [x for stats, _, _ in noted for x in stats.values()]
    values = torch.stack(scalars).tolist() if scalars else []
    told = iter(values)
    means: dict[str, float] = defaultdict(float)
    for _, share in dense_kl:
        means["kl_dense"] += next(told) * share / steps
    for stats, own, all_rows in noted:
        for name in stats:
            if name == "ratio_max":
                means[name] = max(means[name], next(told))
            else:
                share = own / all_rows / (1 if name == FIRST else steps)
                means[name] += next(told) * share
    return means


def dense_rows(recipe: Recipe, batch: Batch, mini: Sequence[int]) -> set[int]:
    """Which rows of a minibatch also get a dense forward pass: `ppo.dense_kl_fraction` of them, evenly spaced, others
    in each step."""
    if not recipe.ppo.dense_kl:
        return set()
    share, first = recipe.ppo.dense_kl_fraction, batch.probe_seed % 2**20
    # Where the count of rows that the share asks for goes up by one: exact for any share, not for 1 / n alone.
    return {b for b in mini if floor((first + b) * share) > floor((first + b - 1) * share)}


def over_ranks(means: Mapping[str, float]) -> dict[str, float]:
    """The sums of all ranks, and the largest ratio."""
    parts = distributed.gather(dict(means))
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
    each: float | None = None,
) -> Stats:
    """The gradient of the sparse loss of some rows, times `share`, added to the parameters'. Returns its stats.

    last: whether the ranks' gradients are summed after it. each: `Rows.tokens_each` of the minibatch."""
    reference = None
    if recipe.ppo.kl_coef > 0:
        # Before the sparse context: with adapters the reference is this very model.
        reference = policy.parallel.reference_forward(lambda: look_up(policy, batch, rows, chosen))
    request = replaying(policy, recipe, batch, rows, chosen)
    with sparse_attention(policy.model, request) as run, policy.recomputing():
        return policy.parallel.backward(
            lambda: sparse_loss(policy, recipe, batch, rows, chosen, run, reference, share, each),
            last,
        )


def backward_dense(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    rows: Rows,
    chosen: Sequence[int],
    share: float,
    each: float | None,
) -> torch.Tensor:
    """The mean divergence from the reference of some rows, run dense. Its gradient times `ppo.dense_kl` and `share` is
    added to the parameters'; the ranks' are not yet summed. each: `Rows.tokens_each` of the minibatch's dense rows."""
    reference = policy.parallel.reference_forward(lambda: look_up(policy, batch, rows, chosen))
    with policy.recomputing():
        return policy.parallel.backward(
            lambda: dense_loss(policy, recipe, batch, rows, chosen, reference, share, each), False
        )


def replaying(
    policy: Policy, recipe: Recipe, batch: Batch, rows: Rows, chosen: Sequence[int]
) -> Request:
    """The sparse forward of some rows with the tokens that their rollouts kept."""
    methods = parse(recipe.efficiency.method)
    width = max(rows.lengths[b] for b in chosen)
    return Request(
        recipe.sparse,
        seed=batch.probe_seed,
        replay=replay_masks([rows.kept[b] for b in chosen], width),
        scores=bool(methods & {"pathwise", "cut", "through"}),
        through=(batch.low, recipe.budgets.high) if "through" in methods else None,
    )


def sparse_loss(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    rows: Rows,
    chosen: Sequence[int],
    run: SparseRun,
    reference: Reference | None,
    share: float,
    each: float | None,
) -> Loss:
    """The loss of some rows under their sparse attention, times `share`, and its stats (as they are without it)."""
    encoded, tokens = _of(batch, rows, chosen)
    states, mask = policy.answer_states(encoded, vision(policy, batch, encoded), tokens, run)
    answers, stats = answer_loss(policy, recipe, rows, chosen, states, mask, reference, each)
    tokens_kept, more = efficiency_loss(policy, recipe, batch, rows, chosen, run.record)
    loss = answers + tokens_kept
    stats = stats | more | {"loss": loss.detach()}
    return with_tower(policy, encoded, loss * share), stats


def dense_loss(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    rows: Rows,
    chosen: Sequence[int],
    reference: Reference,
    share: float,
    each: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ppo.dense_kl` times `share` times the mean divergence of some rows from the reference, run dense, and the mean
    itself."""
    encoded, tokens = _of(batch, rows, chosen)
    states, mask = policy.answer_states(encoded, vision(policy, batch, encoded), tokens)
    held = _counts(rows, chosen, each) * rows.held[list(chosen)]
    padded, lengths, held = send(policy.device, pad(tokens, mask.shape[1]), mask.sum(1), held)
    _, apart = token_scores(policy, recipe, states, padded, mask, reference)
    kl = (held * apart.sum(1) / lengths).mean()
    return with_tower(policy, encoded, recipe.ppo.dense_kl * kl * share), kl.detach()


def answer_loss(
    policy: Policy,
    recipe: Recipe,
    rows: Rows,
    chosen: Sequence[int],
    states: torch.Tensor,
    mask: torch.Tensor,
    reference: Reference | None,
    each: float | None = None,
) -> Loss:
    """The clipped surrogate of the answers' tokens, and the divergence from the reference. states `(B, T, hidden)`;
    mask `(B, T)` bool on the CPU; each: as of `backward`.

    Both are a mean over rows of the mean over a row's tokens, times what the row counts. Where that is its number of
    tokens over the mean number, all tokens of the minibatch count alike, however its rows are split into passes."""
    settings = recipe.ppo
    tokens, old = (
        pad([part[b] for b in chosen], mask.shape[1]) for part in (rows.tokens, rows.old)
    )
    counts = _counts(rows, chosen, each)
    pull, held = counts * rows.advantage[chosen], counts * rows.held[chosen]
    tokens, old, pull, held, real = send(policy.device, tokens, old, pull, held, mask)
    new, apart = token_scores(policy, recipe, states, tokens, mask, reference)
    surrogate, stats = losses.clipped_surrogate(new, old, pull, real, settings.clip)
    kl = (held * apart.sum(1) / real.sum(1)).mean()
    loss = settings.policy_gradient * surrogate + settings.kl_coef * kl
    return loss, stats | {"kl": kl.detach(), FIRST: losses.difference(new, old, real)}


def efficiency_loss(
    policy: Policy,
    recipe: Recipe,
    batch: Batch,
    rows: Rows,
    chosen: Sequence[int],
    record: Record | None,
) -> Loss:
    """What lowers the token ratio: `pathwise` and `cut`, from the record of the sparse forward pass; 0 without them."""
    methods, budgets, device = parse(recipe.efficiency.method), recipe.budgets, policy.device
    loss, stats = torch.zeros((), device=device), Stats()
    layers = record.layers if record is not None else []
    cuts = [layer.cut for layer in layers if layer.cut is not None]
    # Prompts too short to be pruned have no choice to learn.
    lengths = [len(batch.encoded[rows.prompt[b]]) for b in chosen]
    # An all-wrong group is not paid for saving, here as in the reward.
    short, weights = send(
        device,
        torch.tensor(lengths) < dense_below(recipe.sparse, device),
        rows.weights[:, chosen] * rows.opened[chosen],
    )
    if "pathwise" in methods:
        assert record is not None
        expected = torch.stack(
            [thresholds.expected_ratio(c, batch.low, budgets.high, record.candidates) for c in cuts]
        ).masked_fill(short, 1.0)
        # As many times as there are layers more than the controller's gains were found for: of the mean over 28 layers
        # each would feel a seventh of what it feels of four.
        loss = loss + (expected * weights).mean() * (len(cuts) / LAYERS)
        stats["expected_ratio"] = expected.detach().mean()
    if "cut" in methods:
        assert rows.cut_old is not None
        kept = [layer.keep for layer in layers]
        logp = thresholds.cut_log_prob(cuts, kept, batch.low, budgets.high, budgets.per)
        old, advantage = send(device, rows.cut_old[chosen], rows.cut_advantage[chosen])
        surrogate, found = losses.clipped_action(
            logp.masked_fill(short, 0.0), old, advantage, recipe.ppo.clip
        )
        loss = loss + surrogate
        stats["cut_clip_fraction"] = found["clip_fraction"]
        stats["cut_ratio_mean"] = found["ratio_mean"]
    return loss, stats


def vision(policy: Policy, batch: Batch, encoded: Sequence[Encoded]) -> Features:
    """The features of some prompts: those of the step, or with a gradient where the tower is trained."""
    return policy.encode_vision(encoded) if policy.settings.train_vision else batch.features


def with_tower(policy: Policy, encoded: Sequence[Any], loss: torch.Tensor) -> torch.Tensor:
    """The loss, with a gradient of 0 for a trained tower that these rows do not look through: the other ranks wait."""
    shown = any(e.visuals for e in encoded)
    if distributed.size() > 1 and policy.settings.train_vision and not shown:
        return loss + policy.blank()
    return loss


def _counts(rows: Rows, chosen: Sequence[int], each: float | None) -> torch.Tensor:
    """`(B,)`: what each answer counts. each: as of `backward`."""
    counts = rows.counts[list(chosen)]
    if each is None:
        return counts
    return counts * torch.tensor([len(rows.tokens[b]) for b in chosen]) / each


def _of(
    batch: Batch, rows: Rows, chosen: Sequence[int]
) -> tuple[list[Encoded], list[torch.Tensor]]:
    """The prompts and the answers of some rows."""
    return [batch.encoded[rows.prompt[b]] for b in chosen], [rows.tokens[b] for b in chosen]
