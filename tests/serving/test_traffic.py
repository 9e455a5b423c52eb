"""Requests that come and go, are given up, lose their blocks and get others': each is answered as if it were alone."""

import random

import engines
import pytest

import zipr1

pytest.importorskip("vllm")

BLOCKS, SIZE = 22, 32


@pytest.fixture(scope="module")
def served(folder):
    with engines.engine(
        folder, max_num_seqs=16, block_size=SIZE, num_gpu_blocks_override=BLOCKS, max_model_len=640
    ) as made:
        yield made


@pytest.fixture(scope="module")
def asked(folder):
    """Forty prompts of 12 to 380 tokens, some with pictures and clips."""
    from zipr1.data.digits import tasks

    _, processor = zipr1.load(str(folder))
    shown = tasks.prompts("test", "digits", 8, 1, 0) + tasks.prompts(
        "test", "moving_digits", 4, 1, 0
    )
    prompts = engines.questions(processor, shown)
    rng = random.Random(0)
    words = sorted(processor.tokenizer.get_vocab().values())[10:]
    lengths = [12 + int(368 * rng.random() ** 2) for _ in range(28)]
    prompts += [{"prompt_token_ids": rng.choices(words, k=n)} for n in lengths]
    return prompts


@pytest.mark.parametrize("skip", ["layer", "attention"])
def test_a_thousand_requests_are_answered_as_if_alone(served, asked, skip, monkeypatch):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    total = 1000 if skip == "layer" else 200
    longest, rng = 80, random.Random(1)
    engine = served.llm.llm_engine
    with served.settings(skip=skip, p=0.5):
        alone = served.ask(asked, tokens=longest, together=False, ignore_eos=True)
        aborted, finished = 0, {}
        waiting = {}
        served.reads.clear()
        sent = 0
        while sent < total or waiting:
            while sent < total and len(waiting) < rng.choice((2, 12, 20)):
                index, tokens = rng.randrange(len(asked)), 1 + int(longest * rng.random() ** 2)
                name = f"r{sent}"
                params = SamplingParams(
                    temperature=0,
                    max_tokens=tokens,
                    logprobs=0,
                    ignore_eos=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                (prompt,) = served.llm._preprocess_cmpl([asked[index]])
                engine.add_request(name, prompt, params)
                waiting[name] = (index, tokens)
                sent += 1
            for out in engine.step():
                if out.finished:
                    finished[out.request_id] = (served.said(out), *waiting.pop(out.request_id))
            if waiting and rng.random() < 0.02:
                name = rng.choice(sorted(waiting))
                engine.abort_request([name])
                waiting.pop(name)
                aborted += 1
    again = sum(len(reads) - 1 for reads in served.reads.values())
    late = sum(r[1] > r[0] for reads in served.reads.values() for r in reads)
    print(
        f"{len(finished)} finished, {aborted} aborted, {again} read again, {late} of them had said something"
    )
    assert len(finished) + aborted == total
    assert aborted > total / 100
    assert late > total / 50
    worst = 0.0
    for name, (found, index, tokens) in finished.items():
        wanted = alone[index]
        assert found.ids == wanted.ids[:tokens]
        assert found.kept == wanted.kept
        again_kept = [
            [kept - (length - prompt) for kept in layers]
            for prompt, length, layers in served.reads[name]
        ]
        assert again_kept == [wanted.kept] * len(again_kept)
        worst = max(worst, *(abs(a - b) for a, b in zip(found.logprobs, wanted.logprobs)))
    print("apart", worst)
    assert worst < engines.NEAR
    assert served.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def test_a_request_read_again_has_said_what_it_would_have(served, asked, folder):
    """Long answers in a small pool, against zipr1's own decoding: what was said is never chosen from."""
    model, processor = zipr1.load(str(folder))
    from zipr1.data.digits import tasks

    prompts = tasks.prompts("test", "digits", 8, 1, 0)
    with zipr1.sparse(model, 0.5):
        model.generation_config.eos_token_id = None
        wanted = engines.reference(model, processor, prompts, tokens=100)
    served.reads.clear()
    with served.settings(p=0.5):
        found = served.ask(engines.questions(processor, prompts), 100, ignore_eos=True)
    assert any(len(reads) > 1 for reads in served.reads.values())
    engines.agree(found, wanted)


@pytest.mark.parametrize("blocks", [BLOCKS, 4 * BLOCKS])
def test_blocks_come_back_and_more_requests_fit(folder, blocks, monkeypatch):
    """Prompts of 380 tokens and answers of 40, 14 blocks each: dense, and with a quarter kept."""
    prompts = [
        {"prompt_token_ids": random.Random(n).choices(range(10, 400), k=380)} for n in range(24)
    ]
    pool = {"block_size": SIZE, "num_gpu_blocks_override": blocks, "max_model_len": 640}
    peaks, answers = {}, {}
    with engines.engine(folder, max_num_seqs=32, **pool) as served:
        for name, settings in (
            ("dense", {"dense_below": 10_000}),
            ("sparse", {"rule": "top_k", "p": 0.25, "dense_below": 0}),
        ):
            counts = []
            update = engines.running(served, counts)
            monkeypatch.setattr(served.scheduler, "update_from_output", update)
            with served.settings(**settings):
                answers[name] = served.ask(prompts, tokens=40, ignore_eos=True)
                monkeypatch.undo()
                alone = served.ask(prompts, tokens=40, ignore_eos=True, together=False)
            engines.agree(answers[name], alone)
            peaks[name] = max(counts), sum(counts) / len(counts)
        assert served.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == blocks - 1
    print(blocks - 1, "blocks; in flight, most and mean:", peaks)
    assert peaks["sparse"][0] >= 2 * peaks["dense"][0]
    assert {k for one in answers["sparse"] for k in one.kept} == {95}
