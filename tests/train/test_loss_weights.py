"""What a token, an answer and a clipped token weigh in the gradient: by the recipe, and however rows are split."""

from __future__ import annotations

import pytest
import tinymodels
import torch
from tinysteps import even, gradients, moved, recipe, roll, with_train

from zipr1.core.recipe import Efficiency, Optim, Ppo, Rewards, Train
from zipr1.models.sparse.patch import sparse_attention
from zipr1.train import optim
from zipr1.train.minibatch import flatten, pad
from zipr1.train.reference import look_up, token_scores
from zipr1.train.update import replaying, update

WHOLE = Optim(max_grad_norm=1e6)  # gradients as they are


def uneven(**changes):
    """A policy that has left its reference, and answers of one to five tokens, right and wrong ones in each group."""
    settings = recipe(
        **{
            "efficiency": Efficiency(method="answers", max_accuracy_drop=None),
            "optim": WHOLE,
            **changes,
        }
    )
    policy, batch = moved(settings)
    for i, group in enumerate(batch.groups):
        for j, one in enumerate(group.rollouts):
            length = 1 + (i * i + j) % 5  # 2.875 in the mean
            one.tokens = torch.cat([one.tokens, torch.tensor([50, 51, 52, 53])])[:length]
            one.logprobs = torch.full((length,), -3.0)
            one.rewards["correct"] = float(j == i % 2)
    return settings, policy, batch


def by_hand(settings, policy, batch):
    """The loss of all rows in one pass: gains and divergences of tokens, summed over what the recipe says."""
    rows = flatten(batch, settings, even(0.0, policy.layers))
    chosen = list(range(len(rows.tokens)))
    reference = look_up(policy, batch, rows, chosen)
    encoded = [batch.encoded[i] for i in rows.prompt]
    with sparse_attention(policy.model, replaying(policy, settings, batch, rows, chosen)) as run:
        states, mask = policy.answer_states(encoded, batch.features, rows.tokens, run)
        tokens, old = (pad(part, mask.shape[1]) for part in (rows.tokens, rows.old))
        new, kl = token_scores(policy, settings, states, tokens, mask, reference)
        ratio = (new - old).exp()
        advantage = rows.advantage[:, None]
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        each = (settings.ppo.kl_coef * kl - settings.ppo.policy_gradient * gain) * mask
        if settings.ppo.loss_per == "token":
            loss = each.sum() / mask.sum()
        else:
            loss = (each.sum(1) / mask.sum(1)).mean()
        for _, parameter in policy.trainable():
            parameter.grad = None
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in policy.trainable() if p.grad is not None}


def far(one, other):
    """The largest difference of two gradients, against their size."""
    size = max(float(value.abs().max()) for value in one.values())
    return max(float((value - other[name]).abs().max()) for name, value in one.items()) / size


@pytest.mark.parametrize("per", ["token", "answer"])
def test_tokens_count_as_the_recipe_says_however_rows_are_split(per):
    settings, policy, batch = uneven(ppo=Ppo(loss_per=per, kl_coef=0.7))
    assert len({len(r.tokens) for g in batch.groups for r in g.rollouts}) == 5
    loss, wanted = by_hand(settings, policy, batch)
    for size in (64, 3):
        said, got = gradients(with_train(settings, micro_batch=size), policy, batch, 0.0)
        assert said["loss"] == pytest.approx(loss, rel=1e-4)
        assert far(wanted, got) < 1e-4
    other = settings.model_copy(
        update={"ppo": Ppo(loss_per="answer" if per == "token" else "token", kl_coef=0.7)}
    )
    assert far(wanted, gradients(other, policy, batch, 0.0)[1]) > 1e-2


def test_tokens_of_the_dense_pass_count_alike_too():
    """However its rows are split; and another way of counting is another gradient."""
    ppo = {"policy_gradient": 0.0, "kl_coef": 1.0, "dense_kl_fraction": 0.5}
    found = {}
    for per, size in (("token", 64), ("token", 3), ("answer", 64)):
        settings, policy, batch = uneven(ppo=Ppo(loss_per=per, **ppo))
        found[per, size] = gradients(with_train(settings, micro_batch=size), policy, batch, 0.0)
    (one, first), (two, second), (three, third) = found.values()
    # Were tokens not counted in the dense pass, the two would be equal; to 1e-4 is what rounding leaves, below.
    assert abs(one["kl_dense"] / three["kl_dense"] - 1) > 1e-3
    assert one["kl_dense"] == pytest.approx(two["kl_dense"], rel=1e-4)
    assert far(first, second) < 1e-4 < 1e-2 < far(first, third)


def test_clipped_tokens_are_counted_and_pull_no_more():
    """All answers e times as likely as when they were sampled: right ones are paid enough, wrong ones are not."""
    settings = recipe(
        ppo=Ppo(kl_coef=0.0),
        optim=WHOLE,
        efficiency=Efficiency(method="answers", max_accuracy_drop=None),
        rewards=Rewards(reduction=0.0),
    )
    found = {}
    for which in ("both", "right", "wrong"):
        policy, batch = roll(settings, tinymodels.mixed())
        for group in batch.groups:
            for j, one in enumerate(group.rollouts):
                one.rewards["correct"] = float(j == 0)
                if which == "both" or (which == "right") == (j == 0):
                    one.logprobs -= 1.0
        found[which] = gradients(settings, policy, batch, 0.0)
    said = found["both"][0]
    assert said["clip_fraction"] == 1 and said["ratio_max"] == pytest.approx(2.71828, rel=1e-3)
    plain = roll(settings, tinymodels.mixed())
    for group in plain[1].groups:
        for j, one in enumerate(group.rollouts):
            one.rewards["correct"] = float(j == 0)
    _, whole = gradients(settings, *plain, 0.0)
    # The right ones' part is gone, that of the wrong ones is e times as large.
    both, right, wrong = (found[k][1] for k in ("both", "right", "wrong"))
    for name, value in both.items():
        torch.testing.assert_close(
            value, wrong[name] - (whole[name] - right[name]), atol=1e-5, rtol=1e-3
        )
        torch.testing.assert_close(value, 2.7182818 * right[name], atol=1e-5, rtol=1e-3)


def test_with_epochs_and_minibatches_the_clip_acts():
    settings = recipe(
        optim=Optim(lr=1e-2), ppo=Ppo(epochs=2, minibatches=2, kl_coef=0.0),
        efficiency=Efficiency(method="answers", max_accuracy_drop=None),
    )  # fmt: skip
    policy, batch = roll(settings, tinymodels.mixed())
    for group in batch.groups:
        group.rollouts[0].rewards["correct"] = 1.0
    optimizer = optim.build(policy.trainable(), settings.optim)
    order = torch.Generator().manual_seed(0)
    said = update(policy, settings, batch, optimizer, even(0.0, policy.layers), order)
    assert said["ratio_max"] > 1 + settings.ppo.clip and 0 < said["clip_fraction"] < 1
    # Once over all rows at once, weights are those that sampled.
    once = settings.model_copy(update={"ppo": Ppo(kl_coef=0.0)})
    said, _ = gradients(once, *roll(once, tinymodels.mixed()), 0.0)
    assert said["ratio_max"] == pytest.approx(1, abs=1e-4) and said["clip_fraction"] == 0


def test_the_kl_holds_where_the_reference_is_right():
    """The gradient is that of these rows' share of the loss; the reference is asked though neither target nor
    constraint asks it."""
    free = {"efficiency": Efficiency(method="answers", max_accuracy_drop=None, target=None)}
    ppo = {"policy_gradient": 0.0, "kl_coef": 1.0, "dense_kl_fraction": 0.5}
    everywhere = recipe(ppo=Ppo(**ppo), optim=WHOLE, **free)
    gated = recipe(ppo=Ppo(kl_gate="dense_right", **ppo), optim=WHOLE, **free)
    policy, batch = moved(gated)
    assert batch.checks is None and batch.dense == [0.0] * 4  # a random model
    assert moved(everywhere)[1].dense is None
    assert all(not bool(g.any()) for g in gradients(gated, policy, batch, 0.0)[1].values())
    _, whole = gradients(everywhere, policy, batch, 0.0)
    parts = []
    for dense in ([1.0, 0.0, 0.4, 0.0], [0.0, 1.0, 0.0, 1.0]):
        batch.dense = dense
        rows = flatten(batch, gated, even(0.0, policy.layers))
        assert rows.held.tolist() == [float(right > 0) for right in dense for _ in range(4)]
        parts.append(gradients(gated, policy, batch, 0.0)[1])
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, atol=1e-5, rtol=1e-3)
    assert far(whole, parts[0]) > 1e-2 and far(whole, parts[1]) > 1e-2


def test_an_answer_without_its_end_is_counted_and_kept_masked_or_worth_nothing(tmp_path):
    """Of answers of a model that has learned nothing some end within forty tokens."""
    check = tmp_path / "check.py"
    check.write_text("def check(said, right):\n    return 1.0\n")
    made = {}
    for how in ("keep", "mask", "zero"):
        settings = recipe(
            rewards=Rewards(check=f"{check}:check", truncated=how),
            train=Train(prompts_per_step=4, max_new_tokens=40),
            efficiency=Efficiency(max_accuracy_drop=0.0),
        )
        policy, batch = roll(settings, tinymodels.mixed())
        rollouts = [r for g in batch.groups for r in g.rollouts]
        for one in rollouts:
            ended = int(one.tokens[-1]) in policy.processor.end_ids
            assert one.truncated == (not ended) and (ended or len(one.tokens) == 40)
        assert 0 < sum(r.truncated for r in rollouts) < len(rollouts)
        # The greedy answer and the reference's are judged alike, as they stand.
        assert batch.accuracy == {"dense": 1.0, "sparse": 1.0}
        made[how] = policy, batch, settings, rollouts
    for how, (_, _, _, rollouts) in made.items():
        for one in rollouts:
            assert one.rewards["correct"] == float(how != "zero" or not one.truncated)
    policy, batch, settings, rollouts = made["mask"]
    for group in batch.groups:
        for j, one in enumerate(group.rollouts):
            one.rewards["correct"] = float(j % 2)
    masked = flatten(batch, settings, even(0.0, policy.layers))
    kept = flatten(batch, made["keep"][2], even(0.0, policy.layers))
    cut = torch.tensor([r.truncated for r in rollouts])
    assert bool((kept.advantage != 0).all()) and not bool(masked.advantage[cut].any())
    assert torch.equal(masked.advantage[~cut], kept.advantage[~cut])
