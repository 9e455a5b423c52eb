"""What a folder's config.json asks for, and what the one who starts the server wants of it. No vllm.

config.json of an exported folder holds `"zipr1": {"sparse": ...}`, the section `sparse` of its recipe. Stock
transformers and a vLLM without our plugin carry the key along and ignore it. The server's
`--additional-config '{"zipr1": ...}'` changes it: `"dense"`, or fields such as `{"p": 0.9}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipr1.core.errors import InputError, RunError
from zipr1.core.load import validate
from zipr1.core.recipe import Sparse
from zipr1.models import manifest

KEY = "zipr1"


def judged(config: Any) -> tuple[Sparse | None, str] | None:
    """What a VllmConfig with a model wants: settings, or None and why it is dense; None altogether for a folder that is
    not ours. Raises RunError: of an InputError, as of any ValueError, pydantic would make a report of many lines."""
    model = config.model_config
    try:
        sparse = asked(model.hf_config, model.model)
        return None if sparse is None else wanted(sparse, config.additional_config)
    except InputError as error:
        raise RunError(f"zipr1: {error}") from None


def marked(sparse: Sparse) -> dict[str, Any]:
    """What stands under `KEY` in config.json."""
    return {"sparse": sparse.model_dump(mode="json")}


def asked(config: Any, folder: str) -> Sparse | None:
    """What the folder's config asks for; None without our key.

    Raises InputError where the key is not ours, or where zipr1.json beside it speaks of other settings or weights.
    """
    key = getattr(config, KEY, None)
    if key is None:
        return None
    where = f"{folder}/config.json: {KEY}"
    if not isinstance(key, Mapping) or set(key) != {"sparse"}:
        raise InputError(
            f"{where}: not written by zipr1 export; export the run again, or serve with VLLM_PLUGINS=''"
        )
    sparse = validate(dict(key), where).sparse
    known = manifest.read(Path(folder)) if Path(folder).is_dir() else None
    if known is not None and Sparse.model_validate(known["sparse"]) != sparse:
        raise InputError(
            f"{where}: other settings than in {manifest.NAME} beside it; export the run again"
        )
    return sparse


def wanted(sparse: Sparse, additional: Any) -> tuple[Sparse | None, str]:
    """`sparse` as the server's additional config changes it, or None and why it is to be dense."""
    change = additional.get(KEY, {}) if isinstance(additional, Mapping) else {}
    if change == "dense":
        return None, "--additional-config says so"
    if not isinstance(change, Mapping):
        raise InputError(
            f'--additional-config: {KEY} is {change!r}; allowed: "dense", or fields of a recipe\'s section sparse such '
            'as {"p": 0.9}'
        )
    if change:
        values = {**sparse.model_dump(mode="json"), **change}
        if isinstance(values["p"], int) and not isinstance(values["p"], bool):
            values["p"] = float(values["p"])
        sparse = validate({"sparse": values}, "--additional-config").sparse
    if sparse.p >= 1:
        return None, "p is 1"
    return sparse, ""
