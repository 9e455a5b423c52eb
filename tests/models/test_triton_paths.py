"""The policy's checks once more with the Triton kernels forced; `ZIPR1_KERNELS=triton pytest` does so for all tests."""

import policychecks
import pytest
from zipr1_kernels import ran, use


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("check", "arguments", "graded"),
    [
        (policychecks.everything_kept_is_the_dense_model, ("qwen2_5_vl", True), False),
        (
            policychecks.cached_decoding_is_the_teacher_forced_sparse_forward,
            ("qwen2_vl", "layer"),
            False,
        ),
        (policychecks.a_batch_is_its_samples_one_by_one, ("attention",), False),
        (policychecks.gradient_checkpointing_changes_no_gradient, ("layer",), True),
    ],
)
def test_the_policy_on_triton(check, arguments, graded):
    with use("triton"):
        check(*arguments)
    ops = ["probe_scores", "select_top_p", "pack_indices", "sparse_prefill"]
    if not graded:
        ops += ["kv_compact", "sparse_decode"]
    assert {op: ran(op) for op in ops} == dict.fromkeys(ops, "triton")
