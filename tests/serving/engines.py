"""vLLM in the process of the test, what it said and kept, and what zipr1 says and keeps of the same questions."""

import contextlib
import os
import warnings
from dataclasses import dataclass
from typing import Any

# Read when vllm is first imported: one process, a small cache, and no tales of threads.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
import tinyruns
import torch

import zipr1
from zipr1.core.recipe import Sparse
from zipr1.core.types import Prompt
from zipr1.data.digits import tasks
from zipr1.data.media import load_media

# Both compute in float32 and add in different orders.
NEAR = 5e-5


@dataclass
class Said:
    """ids of the prompt (their number) and of the answer, log-probability of each of these, tokens kept by layer."""

    prompt: int
    ids: list[int]
    logprobs: list[float]
    kept: list[int] | None


@contextlib.contextmanager
def engine(folder, **options):
    """An `LLM` that is gone when the block ends, and its ledger's entries by request, prefill by prefill."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {
        "dtype": "float32",
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 2, "video": 1},
        "disable_log_stats": True,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = LLM(model=str(folder), **given)
    try:
        yield Engine(made)
    finally:
        del made
        cleanup_dist_env_and_memory()


class Engine:
    """What tests do with an `LLM`."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.worker = core.model_executor.driver_worker.worker
        self.model = self.worker.get_model()
        self.reads: dict[str, list[tuple[int, int, list[int]]]] = {}
        if hasattr(self.model, "ledger"):
            self._watch(self.model.ledger)

    def attentions(self) -> list[Any]:
        """vLLM's attention of each decoder layer."""
        return [layer.self_attn.attn for layer in self.model.language_model.model.layers]

    def _watch(self, ledger: Any) -> None:
        end = ledger.end

        def watched() -> None:
            for entry in ledger.read:
                name = entry.name.rsplit("-", 1)[0]
                found = (entry.prompt, entry.length, list(entry.kept))
                self.reads.setdefault(name, []).append(found)
            end()

        ledger.end = watched

    @contextlib.contextmanager
    def settings(self, **changed: Any):
        """Other settings than the folder's, in the block."""
        decoder = self.model.decoder
        before = decoder.settings
        decoder.settings = Sparse.model_validate({**before.model_dump(), **changed})
        try:
            yield
        finally:
            decoder.settings = before

    def ask(
        self, prompts: list[Any], tokens: int = 6, together: bool = True, **options: Any
    ) -> list[Said]:
        """prompts: as vLLM takes them. together: all at once, else one by one."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, **options)
        groups = [prompts] if together else [[p] for p in prompts]
        found = []
        for group in groups:
            for out in self.llm.generate(group, params, use_tqdm=False):
                found.append(self.said(out))
        return found

    def said(self, output: Any) -> Said:
        answer = output.outputs[0]
        chosen = [step[i].logprob for i, step in zip(answer.token_ids, answer.logprobs)]
        reads = self.reads.get(output.request_id)
        return Said(
            len(output.prompt_token_ids),
            list(answer.token_ids),
            chosen,
            reads[0][2] if reads else None,
        )


def questions(processor: Any, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """Prompts as vLLM takes them: the rendered chat, and the pixels that zipr1 reads from the media."""
    made = []
    for prompt in prompts:
        text = processor.apply_chat_template(tinyruns.chat(prompt), add_generation_prompt=True)
        data: dict[str, list[Any]] = {}
        for media in prompt.media:
            pixels, fps = load_media(media, processor.max_frames, processor.fps)
            if media.kind == "image":
                from PIL import Image

                data.setdefault("image", []).append(Image.fromarray(pixels))
            else:
                known = {
                    "fps": fps,
                    "duration": len(pixels) / fps,
                    "total_num_frames": len(pixels),
                    "frames_indices": list(range(len(pixels))),
                    "do_sample_frames": False,
                    "video_backend": "opencv",
                }
                data.setdefault("video", []).append((np.asarray(pixels), known))
        made.append({"prompt": text, "multi_modal_data": data} if data else {"prompt": text})
    return made


def others() -> list[Prompt]:
    """Text alone, two pictures, and several turns."""
    some = tasks.prompts("test", "digits", 2, 1, 3)
    words = [{"role": "user", "content": [{"type": "text", "text": "which digit is green?" * 9}]}]
    two = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, *some[0].messages[0]["content"][1:]],
        }
    ]
    turns = [
        *some[0].messages,
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "what color is the two?"}]},
    ]
    return [
        Prompt("text", words, (), "", "digits"),
        Prompt("two", two, (some[0].media[0], some[1].media[0]), "", "digits"),
        Prompt("turns", turns, some[0].media, "", "digits"),
    ]


@torch.no_grad()
def reference(model: Any, processor: Any, prompts: list[Prompt], tokens: int = 6) -> list[Said]:
    """`zipr1.load(...)` and its `generate`, one by one."""
    found = []
    for prompt in prompts:
        inputs = processor.apply_chat_template(
            tinyruns.chat(prompt), add_generation_prompt=True, tokenize=True
        )
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        length = inputs["input_ids"].shape[1]
        ids = out.sequences[0, length:].tolist()
        logprobs = [
            scores[0].log_softmax(-1)[i].item() for i, scores in zip(ids, out.scores, strict=True)
        ]
        kept = zipr1.stats(model).kept[0].tolist()
        found.append(Said(length, ids, logprobs, kept))
    return found


def agree(found: list[Said], wanted: list[Said], kept: bool = True) -> None:
    """The same prompts, answers and kept counts, and log-probabilities within float32 rounding."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert one.prompt == other.prompt
        assert one.ids == other.ids
        if kept:
            assert one.kept == other.kept
    assert apart(found, wanted) < NEAR


def apart(found: list[Said], wanted: list[Said]) -> float:
    """The largest difference of log-probabilities, over the answers that agree."""
    gaps = [
        abs(a - b)
        for one, other in zip(found, wanted)
        if one.ids == other.ids
        for a, b in zip(one.logprobs, other.logprobs)
    ]
    return max(gaps)


def running(made, counts):
    """In place of a scheduler's `update_from_output`: notes how many requests hold blocks in each step."""
    scheduler = made.scheduler
    update = scheduler.update_from_output

    def watched(*args):
        counts.append(len(scheduler.running))
        return update(*args)

    return watched
