"""What serves on a GPU, as far as a CPU can run it: `python like_a_gpu.py FOLDER`, in a process of its own.

vLLM's second model runner, which is the one that a GPU gets, with its Triton kernels in Triton's interpreter; and
FlashAttention's own backend, builder and cache layout, with its three kernels in plain torch. What is not seen here:
these kernels themselves, streams, and speed.
"""

# ruff: noqa: E402 (vllm reads these settings where it is imported)
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import engines
import torch
import triton.backends

# vLLM asks whether this Triton can compile for a CPU; here nothing is compiled.
driver = SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import zipr1
from zipr1.data.digits import tasks

calls = {"write": 0, "attend": 0, "plan": 0}


def write(key, value, key_cache, value_cache, slots, kind, *scales):
    """`reshape_and_cache_flash`. key `(n, H, D)`; key_cache `(blocks, size, H, D)`; slots `(n,)`."""
    calls["write"] += 1
    size = key_cache.shape[1]
    assert slots.unique().numel() == slots.numel()
    key_cache[slots // size, slots % size] = key[: len(slots)]
    value_cache[slots // size, slots % size] = value[: len(slots)]


def attend(q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **rest):
    """`flash_attn_varlen_func` over blocks, one request at a time: the last query sees all of its keys."""
    calls["attend"] += 1
    assert causal is True
    bounds, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert len(bounds) == len(lengths) + 1 == len(block_table) + 1
    assert rest["max_seqlen_q"] == max(b - a for a, b in itertools.pairwise(bounds))
    assert rest["max_seqlen_k"] == max(lengths)
    for row, ((start, end), length) in enumerate(zip(itertools.pairwise(bounds), lengths)):
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in (k, v))
        ago = torch.arange(length) - torch.arange(length - (end - start), length)[:, None]
        out[start:end] = torch.nn.functional.scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=ago <= 0,
            scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return out


def plan(batch_size, max_seqlen_q, max_seqlen_k, cache_seqlens, cu_seqlens_q, **rest):
    """`get_scheduler_metadata` of FlashAttention 3: the numbers that it would be planned with."""
    calls["plan"] += 1
    assert batch_size == len(cache_seqlens) == len(cu_seqlens_q) - 1
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cache_seqlens.max()


flash_attn.reshape_and_cache_flash = write
flash_attn.flash_attn_varlen_func = attend
flash_attn.get_scheduler_metadata = plan
flash_attn.get_flash_attn_version = lambda *given, **named: 3
register_backend(
    AttentionBackendEnum.CPU_ATTN, "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
)


def main(folder):
    prompts = tasks.prompts("test", "digits", 8, 1, 0) + tasks.prompts(
        "test", "moving_digits", 2, 1, 0
    )
    tokens = 60
    model, processor = zipr1.load(folder)
    model.generation_config.eos_token_id = None
    wanted = engines.reference(model, processor, prompts, tokens)
    small = {"block_size": 32, "num_gpu_blocks_override": 22, "max_model_len": 640}
    with engines.engine(folder, max_num_seqs=16, **small) as served:
        assert served.worker.use_v2_model_runner
        names = {a.get_attn_backend().get_name() for a in served.attentions()}
        assert names == {"FLASH_ATTN"}
        found = served.ask(engines.questions(processor, prompts), tokens, ignore_eos=True)
        engines.agree(found, wanted)
        again = sum(len(reads) - 1 for reads in served.reads.values())
        assert again > 0
        assert min(calls.values()) > 0
        free = served.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert free == small["num_gpu_blocks_override"] - 1
        print(f"apart {engines.apart(found, wanted):.1e}, {again} read again, {calls}")


if __name__ == "__main__":
    main(sys.argv[1])
