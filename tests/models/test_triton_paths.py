"""The policy's own tests once more with the Triton kernels forced; `ZIPR1_KERNELS=triton pytest` does so for all."""

import pytest
import test_policy
from zipr1_kernels import ran, use


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "arguments", "graded"),
    [
        ("everything_kept_is_the_dense_model", ("qwen2_5_vl", True), False),
        ("cached_decoding_is_the_teacher_forced_sparse_forward", ("qwen2_vl", "layer"), False),
        ("a_batch_is_its_samples_one_by_one", ("attention",), False),
        ("gradient_checkpointing_changes_no_gradient", ("layer",), True),
    ],
)
def test_the_policy_on_triton(name, arguments, graded):
    with use("triton"):
        getattr(test_policy, f"test_{name}")(*arguments)
    ops = ["probe_scores", "select_top_p", "pack_indices", "sparse_prefill"]
    if not graded:
        ops += ["kv_compact", "sparse_decode"]
    assert {op: ran(op) for op in ops} == dict.fromkeys(ops, "triton")
