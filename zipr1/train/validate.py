"""What can be known wrong with a recipe before anything is loaded. Light: no torch here."""

from __future__ import annotations

from collections.abc import Sequence

from zipr1.core import launcher
from zipr1.core.errors import InputError
from zipr1.core.methods import parse
from zipr1.core.recipe import Recipe
from zipr1.core.runs import names_nothing
from zipr1.data import readers
from zipr1.data.embedded import SOURCES, check_mix
from zipr1.rewards.registry import find
from zipr1.train import loggers


def check(recipe: Recipe) -> None:
    """What can be known wrong before anything is loaded. Raises InputError."""
    launcher.check(recipe.train.parallel)
    methods = parse(recipe.efficiency.method)
    find(recipe.rewards.check)
    loggers.check(recipe)
    check_mix(recipe.data.mix)
    _check_sizes(recipe)
    path = recipe.model.path
    if path != "scratch" and names_nothing(path):
        raise InputError(
            f"model.path: {path} does not exist; give a model folder, a run, a hub id or 'tiny'"
        )
    if recipe.model.lora and recipe.model.train_vision:
        raise InputError(
            "model.lora trains adapters alone; set model.train_vision false, or leave lora out"
        )
    if recipe.model.dtype in ("bfloat16", "float16") and recipe.model.lora is None:
        raise InputError(
            f"model.dtype {recipe.model.dtype} cannot be trained in full: steps as small as optim.lr "
            f"{recipe.optim.lr:g} get lost in rounding; use float32 or auto, or train adapters with model.lora={{}}"
        )
    sharded = recipe.train.parallel == "fsdp"
    if sharded and recipe.optim.name == "muon":
        raise InputError(
            "optim.name muon works on whole matrices and train.parallel fsdp cuts them up; use adamw, or parallel ddp"
        )
    if not sharded and recipe.train.param_dtype is not None:
        raise InputError(
            f"train.param_dtype {recipe.train.param_dtype} is what sharded weights are gathered in and train.parallel "
            "is ddp; use parallel fsdp, or leave param_dtype out"
        )
    if recipe.train.stage == "rl":
        if recipe.train.prompts_per_step < launcher.size():
            raise InputError(
                f"train.prompts_per_step {recipe.train.prompts_per_step} leaves some of {launcher.size()} ranks "
                "without a question; raise it, or start fewer"
            )
        if recipe.model.path == "scratch":
            raise InputError(
                "train.stage rl needs a trained model and model.path is scratch; name a model"
            )
        wanted = recipe.efficiency
        if wanted.target is not None and not methods & {"cut", "pathwise"}:
            raise InputError(
                f"efficiency.target {wanted.target} needs a method that presses tokens down and efficiency.method is "
                f"{wanted.method}; use pathwise or cut, or set efficiency.target=null"
            )
        if (
            recipe.data.hard_kind_boost
            and wanted.target is None
            and wanted.max_accuracy_drop is None
        ):
            raise InputError(
                f"data.hard_kind_boost {recipe.data.hard_kind_boost} needs the greedy answers of a target or a "
                "constraint; set efficiency.target or efficiency.max_accuracy_drop, or data.hard_kind_boost=0"
            )
        several = recipe.budgets.answers_per_budget > 1 and recipe.rewards.reduction > 0
        if "answers" in methods and several:
            raise InputError(
                f"efficiency.method {wanted.method} pays answers for the tokens that they saved, and those of one "
                f"budget saved the same: budgets.answers_per_budget {recipe.budgets.answers_per_budget} leaves nothing "
                "to learn; use 1, or method pathwise or cut, or rewards.reduction=0 to press nothing"
            )
        if recipe.budgets.sampling == "grid" and methods - {"answers"}:
            raise InputError(
                f"efficiency.method {wanted.method} needs thresholds that are drawn and budgets.sampling is grid; use "
                f"{'independent' if 'cut' in methods else 'stratified'}, or method answers"
            )
        if "cut" in methods and recipe.budgets.sampling == "stratified":
            raise InputError(
                f"efficiency.method {wanted.method} needs thresholds that do not depend on each other and "
                "budgets.sampling is stratified, where a question's rollouts share out the range; use independent, or "
                "method pathwise"
            )
        if methods & {"cut", "pathwise", "through"} and recipe.sparse.rule != "top_p":
            raise InputError(
                f"efficiency.method {recipe.efficiency.method} differentiates top_p and sparse.rule is "
                f"{recipe.sparse.rule}; use rule top_p or method answers"
            )


def check_sources(recipe: Recipe) -> None:
    """Raise InputError for files of rows that are not here; nothing is opened, and nothing asked of the hub."""
    data = recipe.data
    for source in (data.source, data.heldout):
        if source is not None and source != "validation" and source not in SOURCES:
            readers.place(source)


# Embedded questions that one run may ask for: each takes 12 (digits) to 78 KB (pages) of memory.
MOST_EMBEDDED = 100_000
# Answers of one step, all of which are in memory at once.
MOST_ROLLOUTS = 2**20


def _check_sizes(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    sources = {"prompts": data.source, "heldout_prompts": data.heldout or data.source}
    for key, source in sources.items():
        number = getattr(data, key)
        embedded = source in SOURCES or (source == "validation" and data.source in SOURCES)
        if embedded and number > MOST_EMBEDDED:
            raise InputError(
                f"data.{key}: got {number:,}; embedded questions are drawn into memory, {MOST_EMBEDDED:,} or less is "
                "allowed"
            )
    rollouts = train.prompts_per_step * recipe.budgets.group
    if train.stage == "rl" and rollouts > MOST_ROLLOUTS:
        raise InputError(
            f"train.prompts_per_step {train.prompts_per_step:,} x budgets.num_generations "
            f"{recipe.budgets.num_generations:,} x budgets.answers_per_budget {recipe.budgets.answers_per_budget:,} "
            f"are {rollouts:,} answers a step; {MOST_ROLLOUTS:,} or less are allowed"
        )


def check_positions(recipe: Recipe, positions: int) -> None:
    """InputError if an answer may be longer than what the model has positions for."""
    longest = recipe.train.max_new_tokens
    if longest >= positions:
        raise InputError(
            f"train.max_new_tokens: got {longest:,}; the model has {positions:,} positions for prompt and answer: "
            "less is allowed"
        )


# Prompts that are encoded before anything starts.
FIRST = 16


def check_lengths(recipe: Recipe, lengths: Sequence[int], limit: int) -> None:
    """InputError if not one of the first prompts is long enough to be sparse: nothing could be learned. limit: tokens
    below which a prompt stays dense."""
    if recipe.train.stage == "rl" and lengths and max(lengths) < limit:
        raise InputError(
            f"the first {len(lengths)} prompts have {max(lengths)} tokens at most and stay dense below "
            f"sparse.dense_below = {limit}; use larger pictures, or set sparse.dense_below=0 to prune short prompts too"
        )


def needs_prompts(recipe: Recipe) -> bool:
    """Embedded lessons of the supervised stage are made step by step."""
    return recipe.train.stage == "rl" or recipe.data.source not in SOURCES
