"""The first step checks itself: answers are scored again as the update will score them, and must come out alike.

The sampler makes an answer token by token over a KV cache of left-padded prompts; the update shows prompt and answer
at once, padded on the right, and replays which tokens were kept. Both compute the same numbers up to rounding. Where
they do not, every ratio of the update is wrong and nothing else would say so: positions of a family that are off by
one, a cache that lost a token, a kernel that errs on this GPU.

Three comparisons, each of which leaves fewer causes to the next: dense answers, all tokens kept by the sparse
operations beside dense attention, and the rollouts with what they kept. Not here: whether a prompt has a placeholder
for each visual feature, which `MediaEncoder.encode_vision` checks of every prompt that it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch

from zipr1.core.errors import RunError
from zipr1.core.recipe import Recipe
from zipr1.models.batching import by_length
from zipr1.models.policy import Policy
from zipr1.models.sparse.patch import sparse_attention
from zipr1.models.sparse.request import Request
from zipr1.models.token_budget import token_budget
from zipr1.train import losses
from zipr1.train.controller import EfficiencyController
from zipr1.train.minibatch import Rows, flatten, pad
from zipr1.train.rollout import Batch
from zipr1.train.update import replaying

# Rows that are scored again, and tokens of a dense answer: enough to see a fault, at a small part of a step's cost.
ROWS, TOKENS = 4, 32
# What rounding may make of it: the mean over tokens of the difference of two log-probabilities. float32 on a GPU is
# multiplied as TF32, whose mantissa is float16's. Half and double steps of the mantissa add up over some thirty layers.
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32 = 2e-2


@dataclass(frozen=True)
class Comparison:
    """Two accounts of the same answers. what: which; sampler, trainer: mean log-probability of a token; difference: the
    mean of its size; allowed: what rounding may make of it."""

    what: str
    sampler: float
    trainer: float
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether only rounding parts them. NaN does not agree with anything."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return f"{self.what} {self.difference:.1e}"


def check_sampler(policy: Policy, recipe: Recipe, batch: Batch) -> str:
    """Compare sampler and trainer on the first rollouts of `batch`; nothing is changed. Returns a line of what was
    found. Raises RunError, with both numbers and the likely cause, where more than rounding parts them."""
    free = recipe.efficiency.model_copy(update={"weight": 0.0})
    rows = flatten(batch, recipe, EfficiencyController(free, policy.layers))
    room = token_budget(policy, recipe, update=True)
    most = min(ROWS, recipe.train.micro_batch)
    chosen = by_length(rows.lengths, most, room)[0]
    found = policy.parallel.run_unsharded(
        lambda: compare(policy, recipe, batch, rows, chosen), policy=True
    )
    for comparison in found:
        if not comparison.agrees:
            raise RunError(trouble(comparison, policy))
    parts = ", ".join(str(c) for c in found)
    return f"sampler and trainer agree: {parts} (mean difference of a log-probability; rounding: {found[0].allowed:g})"


@torch.no_grad()
def compare(
    policy: Policy, recipe: Recipe, batch: Batch, rows: Rows, chosen: Sequence[int]
) -> list[Comparison]:
    """The three comparisons, on prompts and answers of the rows `chosen`."""
    encoded = [batch.encoded[rows.prompt[b]] for b in chosen]
    allowed = rounding(policy, recipe)
    count = min(TOKENS, recipe.train.max_new_tokens)
    drawn = torch.rand(len(encoded), count, generator=torch.Generator().manual_seed(recipe.seed))
    made = policy.generate(encoded, batch.features, None, count, drawn, recipe.train.temperature)

    def scored(tokens: Sequence[torch.Tensor], request: Request | None) -> list[torch.Tensor]:
        with sparse_attention(policy.model, request) as run:
            states, mask = policy.answer_states(encoded, batch.features, tokens, run)
            padded = pad(tokens, mask.shape[1]).to(policy.device)
            # A row at a time: logits of all of them could be more than the update ever holds.
            each = [
                losses.token_logprobs(policy.head(states[b]), padded[b], recipe.train.temperature)
                for b in range(len(tokens))
            ]
        return [line[: len(answer)].cpu() for line, answer in zip(each, tokens, strict=True)]

    dense = scored(made.tokens, None)
    whole = Request(recipe.sparse.model_copy(update={"p": 1.0}), force=True)
    everything = scored(made.tokens, whole)
    tokens, old = ([part[b] for b in chosen] for part in (rows.tokens, rows.old))
    replayed = scored(tokens, replaying(policy, recipe, batch, rows, chosen))
    return [
        comparison("dense", made.logprobs, dense, allowed),
        comparison("all tokens kept", dense, everything, allowed),
        comparison("sparse", old, replayed, allowed),
    ]


def comparison(
    what: str, sampler: Sequence[torch.Tensor], trainer: Sequence[torch.Tensor], allowed: float
) -> Comparison:
    """Of the `(T,)` log-probabilities of some answers."""
    one, other = torch.cat(list(sampler)).double(), torch.cat(list(trainer)).double()
    difference = float((one - other).abs().mean())
    return Comparison(what, float(one.mean()), float(other.mean()), difference, allowed)


def rounding(policy: Policy, recipe: Recipe) -> float:
    """What rounding may make of a log-probability, in the dtype that the model computes in."""
    dtype = next(policy.decoder.parameters()).dtype
    if policy.parallel.sharded and recipe.train.param_dtype:
        dtype = getattr(torch, recipe.train.param_dtype)
    if dtype == torch.float32 and policy.device.type == "cuda":
        return TF32
    return ROUNDING[dtype]


def trouble(found: Comparison, policy: Policy) -> str:
    """One line: both numbers, and what most likely parts them, given that the comparisons before this one agreed."""
    family = policy.model.config.model_type
    names = ("sampler", "trainer")
    if found.what == "dense":
        cause = (
            f"decoding over a KV cache and one pass over the answer part without any sparsity: transformers "
            f"{version('transformers')} may treat {family} in another way than the tested 5.17 to 5.23, or the "
            "model's code was changed"
        )
    elif found.what == "all tokens kept":
        names = ("dense attention", "sparse operations")
        cause = (
            "dense passes agree, so a sparse operation errs on this machine; set ZIPR1_KERNELS=torch, and report it "
            "with the output of make gpu"
        )
    elif getattr(policy.model.config.get_text_config(), "num_experts", None):
        cause = (
            "dense passes agree; a mixture of experts sends tokens to other experts where rounding tips the balance; "
            "use model.dtype: float32, or sparse.skip: attention"
        )
    else:
        cause = (
            "dense passes agree, so the replayed tokens are not those that were sampled with: ZIPR1_KERNELS=torch "
            "tells whether a kernel is the cause; please report it"
        )
    return (
        f"the first step's check ({found.what}): {names[0]} {found.sampler:.4f} and {names[1]} {found.trainer:.4f}, "
        f"the mean log-probabilities of the same tokens, part by {found.difference:.2g} a token, and rounding explains "
        f"{found.allowed:g}; {cause}"
    )
