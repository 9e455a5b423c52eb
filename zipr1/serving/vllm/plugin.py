"""What vLLM calls in each of its processes before a model is loaded (entry point `vllm.general_plugins`).

A tested vLLM gets our hook (hook.py). In any other, and in one that lacks a name that the plugin stands on, folders
that zipr1 exported are refused in one line: served dense without a word, nobody would notice. Other folders are not
touched. Nothing of vllm is imported before it is needed, or an ImportError of vLLM's log would be all that is said.
"""

from __future__ import annotations

import logging
from typing import Any

from zipr1.serving.vllm import limits
from zipr1.serving.vllm.settings import judged


def register() -> None:
    """Called once or several times in every process of vLLM."""
    import vllm

    reason = limits.untested(vllm.__version__)
    if reason is None:
        try:
            from zipr1.serving.vllm import hook

            hook.install()
        except Exception as error:  # noqa: BLE001 - vLLM logs whatever a plugin raises, and would go on dense
            reason = limits.lacking(vllm.__version__, error)
    if reason is not None:
        guard(reason)


def guard(reason: str) -> None:
    """Refuse what zipr1 exported and is not asked to be dense; stands on nothing but a configuration's initialiser."""
    from vllm.config import VllmConfig

    stock = VllmConfig.__post_init__

    def checked(self: Any, *given: Any, **named: Any) -> None:
        found = None if self.model_config is None else judged(self)
        if found is not None and found[0] is not None:
            raise limits.refuse(reason)
        if found is not None:
            logging.getLogger("vllm.zipr1").info("zipr1: dense: %s", found[1])
        stock(self, *given, **named)

    VllmConfig.__post_init__ = checked
