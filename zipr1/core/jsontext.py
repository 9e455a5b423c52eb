"""JSON, written so that any reader takes it and read so that nothing in it can end a program.

Whoever reads JSON or lines of it does so here: `loads`, and `lines` for .jsonl files, in which a line ends at a line
feed and nowhere else (str.splitlines would cut a text at U+2028, U+2029 and U+0085).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Lists and objects inside of each other, at most. Real files have ten; repr and copies end at about a thousand.
MAX_DEPTH = 100

_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")


def loads(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8 where it is bytes.

    Raises ValueError, whose message is one line, for what is not JSON, and for JSON that Python reads but nobody can go
    on with: nested more than MAX_DEPTH deep, integers of thousands of digits, halves of a character (`"\\ud800"`).
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's limit, which protects it from quadratic work
        raise ValueError("an integer of thousands of digits; write it as text") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"half of a character ({half}), which no text can hold") from None
    return value


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a .jsonl file, without the line feed at their end; the last one may be cut short."""
    with path.open("rb") as file:
        for line in file:
            yield line.removesuffix(b"\n")


def dumps(value: Any, indent: int | None = None) -> str:
    """One JSON text, without NaN and infinity (null). Halves of characters, as in the names of files that are not
    UTF-8, become question marks."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def plain(value: Any) -> Any:
    """`value` as dict, list, str, int, float, bool or None: numbers of NumPy and torch become plain ones."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _deeper_than(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper than `most`; goes down a level at a time, without recursion."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for one in level
            if isinstance(one, list | dict)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return any(isinstance(one, list | dict) for one in level)
