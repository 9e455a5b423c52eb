"""Whether the regular expressions of an adapter's settings come to an end.

They may have come from anywhere, and some take longer than anyone waits on a name of a hundred letters (`(a+)+b`), in a
call that nothing can interrupt. So each is tried first in a process of its own, which can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zipr1.core.config import show
from zipr1.core.errors import InputError

# What adapters that are trained here have: the text decoder alone. A list of suffixes would also hit the vision tower's
# gate, up and down projections.
LORA_TARGETS = (
    r".*(?:language|text)_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
# Seconds for all patterns on all names of a model's modules: honest ones take hundredths, on the slowest machine too.
LIMIT = 60.0
# Settings of LoRA in which peft looks for patterns: texts, lists of them, or the keys of a mapping.
FIELDS = (
    "target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern",
)  # fmt: skip
_NAME = re.compile(r"[\w.-]*")
# Alone, at the end of a name, before a name's number: as peft asks. What is no pattern peft tells.
_TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for whole in (pattern, rf"(^|.*\.){pattern}($|\..*)", rf"(.*\.)?({pattern})$", rf"(?:^|.*?\.){pattern}\.\d+\."):
        try:
            asked = re.compile(whole)
        except Exception:
            continue
        for name in names:
            asked.fullmatch(name)
            asked.match(name)
"""


def check(folder: Path, settings: dict[str, Any], names: Sequence[str]) -> None:
    """Raises InputError for a pattern in an adapter's settings that takes too long on the `names` of modules."""
    patterns = [p for p in _texts(settings) if p != LORA_TARGETS and not _NAME.fullmatch(p)]
    if not patterns:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY],
            input=json.dumps([patterns, list(names)]),
            text=True,
            timeout=LIMIT,
            check=False,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{folder / 'adapter_config.json'}: its patterns of names take longer than {LIMIT:g} s "
            f"({', '.join(map(show, patterns))}); list the modules by name"
        ) from None


def _texts(settings: dict[str, Any]) -> list[str]:
    """What stands in FIELDS."""
    found: list[Any] = []
    for value in map(settings.get, FIELDS):
        found += (
            [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []
        )
    return [text for text in found if isinstance(text, str)]
