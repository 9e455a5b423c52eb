"""What the plugin cannot do is refused before a model is loaded. What is known and was never tried is refused, too.

Every check reads vLLM's own configuration; nothing of vllm is imported.
"""

from __future__ import annotations

from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from zipr1.core.errors import RunError
from zipr1.core.text import reason

# The extra `vllm` of pyproject.toml is held to it by a test.
TESTED = ">=0.32,<0.33"
ARCHITECTURES = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
ON_GPU = "FLASH_ATTN"
BACKENDS = ("CPU_ATTN", ON_GPU)
PLAIN_CACHE = ("auto", "float16", "bfloat16", "float32")
DENSE = """--additional-config '{"zipr1": "dense"}'"""


def untested(version: str) -> str | None:
    """Why this version of vLLM cannot serve sparse, or None. What follows a plus sign (`+cpu`) does not count."""
    if Version(Version(version).public) in SpecifierSet(TESTED):
        return None
    return f"vLLM {version} was not tested; install vllm{TESTED}"


def lacking(version: str, error: Exception) -> str:
    """Why it cannot, where vLLM has no longer a name that the plugin stands on."""
    return f"vLLM {version} is not as it was tested ({reason(error)})"


def refusal(config: Any, platform: str) -> str | None:
    """Why a folder cannot be served sparse, or None if it can.

    config: a VllmConfig. platform: `cpu`, `cuda`, or another name.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if model.model_impl not in ("auto", "vllm"):
        return f"it cannot be joined with --model-impl {model.model_impl}; leave that out"
    if model.architecture not in ARCHITECTURES:
        return f"{model.architecture} is not known; {' and '.join(ARCHITECTURES)} are"
    if platform not in ("cpu", "cuda"):
        return f"the platform {platform} is not known; cpu and cuda are"
    text, attention = model.hf_text_config, config.attention_config
    backends = [attention.backend, *attention.backend_per_kind.values()]
    on_gpu = platform == "cuda"
    found = {
        f"--attention-backend other than {ON_GPU}": on_gpu
        and any(backend and backend.name != ON_GPU for backend in backends),
        f"--dtype float32, which {ON_GPU} does not take": on_gpu
        and str(model.dtype) == "torch.float32",
        "--runner pooling": model.runner_type != "generate",
        "--quantization": model.quantization is not None,
        "sliding windows (use_sliding_window in config.json)": getattr(
            text, "use_sliding_window", False
        ),
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in PLAIN_CACHE,
        "--cpu-offload-gb": config.offload_config.uva.cpu_offload_gb > 0,
        "--offload-group-size": config.offload_config.prefetch.offload_group_size > 0,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "--ec-transfer-config": config.ec_transfer_config is not None,
        "--speculative-config": config.speculative_config is not None,
        "--enable-lora": config.lora_config is not None,
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size": parallel.data_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--distributed-executor-backend ray": parallel.distributed_executor_backend == "ray",
        "--enable-dbo": parallel.use_ubatching,
        "--worker-cls": parallel.worker_cls != "auto",
        "--scheduler-cls": config.scheduler_config.scheduler_cls is not None,
        "--video-pruning-rate": model.get_multimodal_config().is_multimodal_pruning_enabled(),
    }
    cannot = [name for name, there in found.items() if there]
    return f"it cannot be joined with {', '.join(cannot)}; leave that out" if cannot else None


def refuse(why: str) -> RunError:
    """No ValueError: pydantic would bury the line in a report of its own."""
    return RunError(f"zipr1: this folder cannot be served sparse: {why}. Dense: {DENSE}")
