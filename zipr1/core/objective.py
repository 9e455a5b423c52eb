"""The sections of a recipe that say what is learned: budgets, rewards, the promise about answers, losses, optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from zipr1.core.section import Fraction, Positive, Rate, Section, Share


class Budgets(Section):
    """Thresholds of the rollouts of one question: values of p over [low, high].

    low, high: the ends of the range.
    low_end: where `low` has moved to, linearly, after half of the steps (not set: it stays). A wide range starts
        diffuse layers moving, a narrow one below the inference p finishes the job.
    num_generations: thresholds of one question, one draw for each.
    answers_per_budget: answers that are sampled at each of them, from one prefill: they share what is kept of the
        prompt. A group is num_generations * answers_per_budget rollouts.
    per: `layer` draws for each decoder layer, `rollout` shares one value among the layers.
    sampling: `stratified` jitters one value in each of `num_generations` equal cells, `independent` draws each
        uniformly, `grid` takes the cells' centres (of [0.9375, 0.9775] in 8 cells: 0.940, 0.945, ... 0.975, those of
        the paper). The method `cut` needs `independent`: a baseline of the other rollouts must not depend on this one's
        threshold.
    """

    low: Share = 0.9375
    high: Share = 0.9775
    low_end: Share | None = None
    num_generations: Annotated[int, Field(ge=1, le=1024)] = 8
    answers_per_budget: Annotated[int, Field(ge=1, le=1024)] = 1
    per: Literal["layer", "rollout"] = "layer"
    sampling: Literal["stratified", "independent", "grid"] = "stratified"

    @model_validator(mode="after")
    def _ordered(self) -> Budgets:
        for name, value in (("low", self.low), ("low_end", self.low_end)):
            if value is not None and value >= self.high:
                raise ValueError(
                    f"budgets.{name} ({value}) must be below budgets.high ({self.high})"
                )
        return self

    @property
    def group(self) -> int:
        """Rollouts of one question."""
        return self.num_generations * self.answers_per_budget

    def low_at(self, step: int, steps: int) -> float:
        """Lower end of the range in `step` of `steps`."""
        if self.low_end is None:
            return self.low
        return self.low + (self.low_end - self.low) * min(1.0, step / max(1.0, steps / 2))


class Rewards(Section):
    """What an answer is worth.
    check: of the answer, where its row names none: a name in `zipr1.rewards.registry.REWARDS` or `path.py:function`,
        and the code of that file is run.
    tolerance: relative, of the check `number`.
    weight: of a correct answer.
    reduction: weight of the share of dropped tokens, for the method `answers`.
    truncated: what becomes of a sampled answer that had not ended after `train.max_new_tokens`: `keep` takes it as it
        stands, `mask` takes it out of the policy gradient, `zero` makes it worth nothing.
    """

    check: str = "exact"
    tolerance: Annotated[float, Field(ge=0, le=1)] = 1e-6
    weight: Rate = 1.0
    reduction: Rate = 1.0
    truncated: Literal["keep", "mask", "zero"] = "keep"


class Controller(Section):
    """Gains of the PI controller that follows `efficiency.target`, for each task and layer.

    proportional: with e the kept share less the one that the schedule asks for: while e > 0, the weight of a layer is
        this times e, plus a sum.
    integral, integral_max: the sum grows by `integral` * e each step, to `integral_max` at most.
    decay: a layer at or ahead of the schedule gets no weight, and its sum is multiplied by this in each step.
    kind_ema_rate: how far one question moves the running accuracy gap of its kind of question (0.02: about the last
        fifty count).
    """

    proportional: Rate = 10.0
    integral: Rate = 0.5
    integral_max: Rate = 30.0
    decay: Fraction = 0.9
    kind_ema_rate: Share = 0.02


class Guard(Section):
    """Questions that are never trained on, by which `efficiency.max_accuracy_drop` is held. They are asked of the
    average of the weights, at `sparse.p`, and every second one with all tokens too.

    questions: of each task, at most. Embedded ones are drawn besides, of other handwriting than what is trained on; of
        rows from files a tenth at most is taken away from training.
    per_step: questions in each step, over all tasks; a task whose answers vary more is asked more.
    early_drop, strict_at: what a task may lose falls geometrically from `early_drop` to `max_accuracy_drop`, which is
        reached after this share of the steps.
    max_answer_weight: a task that loses more than it may is drawn more often, and its answers count more, both at most
        so many times.
    """

    # All are in memory, and those of a step are decoded and asked together.
    questions: Annotated[int, Field(ge=1, le=10_000)] = 1000
    per_step: Annotated[int, Field(ge=1, le=1024)] = 24
    early_drop: Annotated[float, Field(ge=0, le=1)] = 0.08
    strict_at: Share = 0.7
    max_answer_weight: Annotated[float, Field(ge=1, le=1000)] = 2.0


class Efficiency(Section):
    """What lowers the kept share, and how hard.

    method: a name in METHODS, or a sum such as `cut+pathwise`.
    weight: of E[kept share]; with a target, of what the controller gives.
    target: kept share to come down to at `sparse.p`, for each task and layer; not set: `weight` alone lowers it.
    target_at: share of the steps after which the target is to be reached.
    max_accuracy_drop: fraction (0.005 = half a point) that a task's answers at `sparse.p` may lose against the model as
        it was before training, judged on guard questions; null turns the constraint off.
    """

    method: str = "pathwise"
    weight: Rate = 3.0
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    target_at: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1)] | None = 0.005
    controller: Controller = Controller()
    guard: Guard = Guard()


class Ppo(Section):
    """The clipped surrogate, and the KL terms.

    policy_gradient: its weight (0 switches it off).
    clip: how far the ratio of probabilities may go from 1.
    epochs, minibatches: how often the answers of a step are learned from, and in how many optimizer steps each time.
    loss_per: how the tokens of a minibatch's answers are weighed, for the policy gradient and the KL alike: `token`
        counts all alike, the end tokens among them, over their number (arXiv 2503.14476, 2503.20783); `answer` takes
        the mean of each answer, so that a token of a long one counts less, and half of a one-word answer is its end.
    kl_coef: weight of KL(policy || dense).
    kl_gate: which questions' answers are held to the reference: `all`, or those that it answers right, `dense_right`.
    kl_estimator: at each answer token: `full` sums KL(policy || dense) over the vocabulary, `forward` sums
        KL(dense || policy), `jeffreys` is the mean of the two, `k2` half the squared log-ratio of the sampled word.
    dense_kl_fraction: share of the rollouts that also get a dense forward pass (p = 1) with a KL term to the dense
        reference: trained without, the model forgets how to answer dense. 0: none.
    dense_kl_coef: weight of that term, the mean divergence over these rollouts, whatever their share: half as many give
        the same pull, with more noise. Not set: kl_coef.
    baseline: of the advantages: `leave_one_out` or `mean` of the group. Several answers at a budget are a group for
        their tokens, and the budgets' means one for what `cut` kept; single ones are compared across the budgets.
    scale_rewards: `none`, or divide by the group's `std`.
    redraw: how often in a step other questions of the same task are asked in place of those whose answers all agree in
        reward, and so teach the policy gradient nothing (dynamic sampling, arXiv 2503.14476). 0: never.
    """

    policy_gradient: Rate = 1.0
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    minibatches: Positive = 1
    loss_per: Literal["token", "answer"] = "token"
    kl_coef: Rate = 0.5
    kl_gate: Literal["all", "dense_right"] = "all"
    kl_estimator: Literal["full", "forward", "jeffreys", "k2"] = "full"
    dense_kl_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    dense_kl_coef: Rate | None = None
    baseline: Literal["leave_one_out", "mean"] = "leave_one_out"
    scale_rewards: Literal["none", "std"] = "none"
    redraw: Annotated[int, Field(ge=0, le=100)] = 0

    @property
    def dense_kl(self) -> float:
        """Weight of the KL term of the dense passes; 0 where there are none."""
        if not self.dense_kl_fraction:
            return 0.0
        return self.kl_coef if self.dense_kl_coef is None else self.dense_kl_coef


class Optim(Section):
    """The optimizer and its learning rate.

    name: `adamw` or `muon`.
    lr: the highest learning rate.
    lr_ratio_rest: all trained weights but the projections of queries and keys learn at this share of lr. Which tokens
        are kept depends on queries and keys alone; the others need to follow in small steps, or answers drift.
    betas: of AdamW.
    lr_scheduler_type: how it goes on after the warm-up, by the names of Hugging Face: `cosine` falls to 0,
        `cosine_with_min_lr` to `min_lr_ratio` of lr, `constant_with_warmup` stays.
    min_lr_ratio: share of lr at which `cosine_with_min_lr` ends.
    warmup: share of the steps over which the learning rate rises.
    weight_decay: of the optimizer.
    max_grad_norm: gradients are scaled down to it.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-5
    lr_ratio_rest: Annotated[float, Field(ge=0, le=1)] = 1.0
    betas: list[Fraction] = Field(default=[0.9, 0.98], min_length=2, max_length=2)
    lr_scheduler_type: Literal["cosine", "cosine_with_min_lr", "constant_with_warmup"] = "cosine"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
