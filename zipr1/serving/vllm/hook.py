"""The place where vLLM settles its configuration, and our model classes beside vLLM's.

Folders without our key in config.json are left alone. A folder with it gets our model, worker and scheduler classes, or
is refused, or runs dense; one line of the log says which. Imported where vLLM was tested (plugin.py): what it imports
of vllm need not be there in another version.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.config import model as model_config
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from zipr1.core.recipe import Sparse
from zipr1.serving.vllm import clips, limits
from zipr1.serving.vllm.settings import KEY, judged, marked

logger = init_logger("vllm.zipr1")  # vLLM shows the lines of its own name alone
PREFIX = "Zipr1"
HERE = "zipr1.serving.vllm"


def install() -> None:
    """Once or several times in every process of vLLM."""
    ModelRegistry.register_model(
        f"{PREFIX}{limits.ARCHITECTURES[0]}", f"{HERE}.model:SparseQwen2VL"
    )
    ModelRegistry.register_model(
        f"{PREFIX}{limits.ARCHITECTURES[1]}", f"{HERE}.model:SparseQwen25VL"
    )
    # vLLM's hooks of single architectures would miss a folder that an option serves by another one.
    stock = VllmConfig.try_verify_and_update_config
    if stock.__module__ != __name__:

        def try_verify_and_update_config(self: VllmConfig) -> None:
            model = self.model_config
            new = model is not None and not model.config_updated
            stock(self)
            if new and not (model.architecture or "").startswith(PREFIX):
                serve(self)

        named = functools.wraps(stock, assigned=("__doc__",))(try_verify_and_update_config)
        VllmConfig.try_verify_and_update_config = named
    settled = model_config._get_and_verify_dtype
    if settled.__module__ != __name__:

        def _get_and_verify_dtype(
            name: str, stored: Any, dtype: Any, **options: Any
        ) -> torch.dtype:
            if dtype == "auto" and whole(stored):
                dtype = torch.float32
            return settled(name, stored, dtype, **options)  # type: ignore[no-any-return]

        model_config._get_and_verify_dtype = functools.wraps(settled, assigned=("__doc__",))(
            _get_and_verify_dtype
        )


def whole(stored: Any) -> bool:
    """Whether what was exported is float32 and stays so where `--dtype` says nothing: on a CPU. vLLM takes bfloat16."""
    return (
        platform() == "cpu"
        and getattr(stored, KEY, None) is not None
        and getattr(stored, "dtype", None) == torch.float32
    )


def serve(config: VllmConfig) -> None:
    """The whole configuration, once, where an engine is set up. Raises RunError where it cannot be served sparse."""
    found = judged(config)
    if found is None:
        return
    sparse, why = found
    if sparse is None:
        read_as_trained(config.model_config)
        logger.info("zipr1: dense: %s", why)
        return
    try:
        reason = limits.refusal(config, platform())
        if reason is None:
            read_as_trained(config.model_config)
            prepare(config, sparse)
    except AttributeError as error:
        reason = limits.lacking(vllm.__version__, error)
    if reason is not None:
        raise limits.refuse(reason)
    logger.info("%s", said(config, sparse))


def read_as_trained(model: Any) -> None:
    """Clips by zipr1's reader, unless the server was told how to read them."""
    media = model.multimodal_config
    if media is not None and model.architecture in limits.ARCHITECTURES:
        media.media_io_kwargs.setdefault("video", clips.options(model.model))


def platform() -> str:
    """`cpu`, `cuda`, or another."""
    return "cpu" if current_platform.is_cpu() else str(current_platform.device_name)


def prepare(config: VllmConfig, sparse: Sparse) -> None:
    """Our classes in the places of vLLM's, and off with what would split or share prompts."""
    model, scheduler = config.model_config, config.scheduler_config
    setattr(model.hf_config, KEY, marked(sparse))  # our model class reads it in the worker
    put(model.hf_config, architectures=[PREFIX + model.architecture])
    side = "cpu" if platform() == "cpu" else "gpu"
    put(config.parallel_config, worker_cls=f"{HERE}.worker_{side}.Worker")
    if side == "gpu":  # where some GPUs would get another one
        put(config.attention_config, backend=AttentionBackendEnum[limits.ON_GPU])
    put(model, enforce_eager=True)
    put(config.cache_config, enable_prefix_caching=False)
    # A prompt is read in one step, or its tokens could not be chosen before they run.
    # Beside the longest there is room for those that answer meanwhile, or it would wait until they have ended.
    tokens = max(scheduler.max_num_batched_tokens, model.max_model_len + scheduler.max_num_seqs)
    put(
        scheduler,
        scheduler_cls=f"{HERE}.scheduler.Scheduler",
        async_scheduling=False,
        enable_chunked_prefill=False,
        long_prefill_token_threshold=0,
        max_num_batched_tokens=tokens,
        max_num_scheduled_tokens=None,  # a prompt above it would wait for ever
        # Were there no room for a picture, the scheduler would read the text in front of it alone.
        max_num_encoder_input_tokens=tokens,
        encoder_cache_size=2 * tokens,
    )


def put(owner: Any, **values: Any) -> None:
    """Sets fields that are there. Raises AttributeError for others, which vLLM would ignore without a word."""
    for name, value in values.items():
        getattr(owner, name)
        setattr(owner, name, value)


def said(config: VllmConfig, sparse: Sparse) -> str:
    """One line about what is served."""
    model = config.model_config
    depth = model.hf_text_config.num_hidden_layers
    skipped = "the whole layer" if sparse.skip == "layer" else "attention"
    short = "prompts too short to gain"
    if sparse.dense_below is not None:
        short = f"prompts below {sparse.dense_below} tokens"
    line = (
        f"zipr1: sparse: rule {sparse.rule}, p {sparse.p:g}, in all {depth} layers; dropped tokens skip {skipped}; "
        f"{short} stay dense; prefix caching, chunked prefill, compilation, CUDA "
        "graphs and asynchronous scheduling are off"
    )
    stored = getattr(model.hf_config, "dtype", None)
    if stored == torch.float32 and model.dtype != stored:
        line += f"; the weights are float32 and run in {str(model.dtype).removeprefix('torch.')}"
        if platform() == "cpu":
            line += ": --dtype float32"
    return line
