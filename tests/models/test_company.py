"""In float32 a row keeps the tokens and gives the answer that it would alone, whoever is in its batch: docs/usage.md
says so, of the trained model as of any, and says of no other dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinyruns
import torch

import zipr1
from zipr1.core.recipe import Model
from zipr1.data.digits import tasks
from zipr1.data.media import load_media
from zipr1.models.policy import Policy, load_policy
from zipr1.models.sparse.request import Request

USAGE = Path(__file__).resolve().parents[2] / "docs" / "usage.md"
LENGTH = 6  # tokens of an answer


def questions():
    """Pictures and clips in turn, each with questions of several lengths: 24 rows of many lengths."""
    kinds = [tasks.prompts("test", task, 6, 2, seed=5) for task in ("digits", "moving_digits")]
    return [prompt for pair in zip(*kinds, strict=True) for prompt in pair]


def test_what_the_documentation_says_is_what_is_tested_here():
    (said,) = [x for x in USAGE.read_text().splitlines() if "row of a padded batch" in x]
    assert (
        "in float32 it keeps the tokens and gives the answer that it would alone. In bfloat16"
        in said
    )


@pytest.fixture(scope="module")
def policy() -> Policy:
    made = load_policy(Model(path="tiny", dtype="float32"), "cpu")
    assert made.model.dtype == torch.float32
    return made


@pytest.fixture(scope="module")
def rows(policy):
    encoded = [policy.encode(p, [load_media(p.media[0], 8, 2.0)], 10_000) for p in questions()]
    assert len({len(e) for e in encoded}) > 5
    return encoded, policy.encode_vision(encoded)


# The rules that look at scores, how much they keep, and what layers do with the tokens that they leave out.
SETTINGS = [
    {"rule": rule, "p": p, "skip": skip}
    for rule, p in (("top_p", 0.9), ("top_p", 0.975), ("top_k", 0.6))
    for skip in ("attention", "layer")
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@torch.no_grad()
def test_a_row_keeps_the_same_tokens_in_company_as_alone(policy, rows, settings):
    encoded, features = rows
    sparse = tinyruns.recipe(sparse=tinyruns.SPARSE | settings).sparse

    def kept(chosen):
        answers = policy.generate([encoded[b] for b in chosen], features, Request(sparse), LENGTH)
        places = [[layer.tolist() for layer in row] for row in answers.kept]
        return dict(
            zip(chosen, zip(places, [x.tolist() for x in answers.tokens], strict=True), strict=True)
        )

    every = range(len(encoded))
    alone = {b: found for b in every for _, found in kept([b]).items()}
    ratios = {len(layer) / len(encoded[b]) for b, (places, _) in alone.items() for layer in places}
    assert min(ratios) < 0.9 and len(ratios) > 5  # there is something to choose
    for company in (list(every), list(reversed(every)), list(every)[::3]):
        together = kept(company)
        for b in company:
            assert together[b] == alone[b], b


def test_so_do_the_rows_of_generate(exported):
    model, processor = zipr1.load(exported, device="cpu")
    assert model.dtype == torch.float32

    def ask(prompts):
        inputs = processor.apply_chat_template(
            [tinyruns.chat(p) for p in prompts],
            add_generation_prompt=True, tokenize=True, return_dict=True,
        )  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        said = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return list(zip([x.strip() for x in said], zipr1.stats(model).kept.tolist(), strict=True))

    prompts = [p for p in questions() if p.media[0].kind == "image"][:8]
    assert ask(prompts) == [found for p in prompts for found in ask([p])]
