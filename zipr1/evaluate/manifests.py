"""The entry point `lmms_eval.models`: makes `lmms-eval --model zipr1 ...` work. Imports nothing else."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval reads when it starts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("zipr1", chat_class_path="zipr1.evaluate.adapter.Adapter")]
