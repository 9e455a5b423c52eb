"""The hook where vLLM lets an architecture change the configuration, and our model classes beside vLLM's.

The hook leaves folders without our key in config.json alone. A folder with it gets our model, worker and scheduler
classes, or is refused, or runs dense; one line of the log says which. Imported where vLLM was tested (plugin.py): what
it imports of vllm need not be there in another version.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from zipr1.core.recipe import Sparse
from zipr1.serving.vllm import clips, limits
from zipr1.serving.vllm.settings import KEY, asked, marked, wanted

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
    for name in (*limits.ARCHITECTURES, *limits.OTHERS):
        stock = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if not issubclass(stock, Hook):
            MODELS_CONFIG_MAP[name] = type("Zipr1Hook", (Hook, stock), {})


class Hook(VerifyAndUpdateConfig):
    """Called by vLLM with the whole configuration, once, where an engine is set up."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        super().verify_and_update_config(vllm_config)
        model = vllm_config.model_config
        sparse = asked(model.hf_config, model.model)
        if sparse is None:
            return
        chosen, why = wanted(sparse, vllm_config.additional_config)
        if chosen is None:
            logger.info("zipr1: dense: %s", why)
            return
        platform = "cpu" if current_platform.is_cpu() else current_platform.device_name
        try:
            reason = limits.refusal(vllm_config, platform)
            if reason is None:
                prepare(vllm_config, chosen)
        except AttributeError as error:
            reason = limits.lacking(vllm.__version__, error)
        if reason is not None:
            raise limits.refuse(reason)
        logger.info("%s", said(vllm_config, chosen))


def prepare(config: VllmConfig, sparse: Sparse) -> None:
    """Our classes in the places of vLLM's, and off with what would split or share prompts."""
    model, scheduler = config.model_config, config.scheduler_config
    setattr(model.hf_config, KEY, marked(sparse))  # our model class reads it in the worker
    put(model.hf_config, architectures=[PREFIX + model.architecture])
    side = "cpu" if current_platform.is_cpu() else "gpu"
    put(config.parallel_config, worker_cls=f"{HERE}.worker_{side}.Worker")
    put(model, enforce_eager=True)
    put(config.cache_config, enable_prefix_caching=False)
    # A prompt is read in one step, or its tokens could not be chosen before they run.
    tokens = max(scheduler.max_num_batched_tokens, model.max_model_len)
    put(
        scheduler,
        scheduler_cls=f"{HERE}.scheduler.Scheduler",
        async_scheduling=False,
        enable_chunked_prefill=False,
        long_prefill_token_threshold=0,
        max_num_batched_tokens=tokens,
        # Were there no room for a picture, the scheduler would read the text in front of it alone.
        max_num_encoder_input_tokens=tokens,
        encoder_cache_size=2 * tokens,
    )
    # Unless the server was told how to read clips.
    model.get_multimodal_config().media_io_kwargs.setdefault("video", clips.options(model.model))


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
        line += f"; the weights are float32 and run in {str(model.dtype).removeprefix('torch.')}: --dtype float32"
    return line
