"""A source of rows -> Prompts, one question a row, whatever their format (formats.py) and place (readers.py).

Everything is checked when the rows are loaded, so that a run does not stop at a bad one hours later: columns,
placeholders and answers in the order of the rows (prompts.py), then every picture and clip once, several at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

from zipr1.core import activity
from zipr1.core.errors import InputError
from zipr1.core.recipe import Data
from zipr1.core.types import Media, Prompt
from zipr1.data import media
from zipr1.data.cache import kept_picture
from zipr1.data.formats import Format, detect, renamed
from zipr1.data.prompts import to_prompt, without_nulls
from zipr1.data.readers import read

log = logging.getLogger("zipr1")

SHARED = 1000  # characters of a text from which on it is looked for among the others
Size = tuple[int, int, int, float]  # as Media.size


def load(source: str | Path, data: Data) -> list[Prompt]:
    """All rows of a source, in its order. A bad row stops with its number, or is counted (`data.on_bad_row`)."""
    name, folder, rows = read(str(source), data)
    root = Path(expanduser(data.media_root)) if data.media_root else folder
    bad_rows = _BadRows(name, data.on_bad_row)
    formats_seen: set[Format] = set()
    parsed: list[tuple[int, Prompt]] = []
    texts: dict[str, str] = {}
    count = 0
    for number, get_row in rows:
        count += 1
        activity.tell(f"reading {name}: row", count)
        try:
            row = _with_our_names(get_row(), data)
            row_format = detect(row)
            if row_format not in formats_seen:
                log.info("%s: read as %s (columns: %s)", name, row_format.name, ", ".join(row))
                formats_seen.add(row_format)
            common_row = row_format.plain(without_nulls(row))
            default_id = f"{Path(name).stem}/{number}"
            prompt = to_prompt(common_row, default_id, root, data.instruction)
            prompt = _light(prompt, texts)
            parsed.append((number, replace(prompt, row=f"{name}: row {number}")))
        except InputError as error:
            bad_rows.add(number, error)
    sizes, faults = _check_media([prompt for _, prompt in parsed], data)
    good: list[Prompt] = []
    for number, prompt in parsed:
        fault = next((faults[m.key] for m in prompt.media if m.key in faults), None)
        if fault is None:
            sized = tuple(replace(m, size=sizes.get(m.key)) for m in prompt.media)
            good.append(replace(prompt, media=sized))
        else:
            bad_rows.add(number, fault)
    bad_rows.report(count)
    if not good:
        reason = "no rows"
        if bad_rows.messages:
            reason = f"all {len(bad_rows.messages)} rows are bad; the first: {bad_rows.first()}"
        raise InputError(f"{name}: {reason}; give at least one question with an answer")
    return good


def _light(prompt: Prompt, texts: dict[str, str]) -> Prompt:
    """The prompt without what would be held for nothing: encoded pictures go to files, and a long text that many rows
    have is one object. texts: those so far; changed here."""
    for message in prompt.messages:
        for part in message["content"]:
            if len(part.get("text", "")) > SHARED:
                part["text"] = texts.setdefault(part["text"], part["text"])
    media = tuple(replace(m, source=_kept(m.source)) for m in prompt.media)
    return prompt if media == prompt.media else replace(prompt, media=media)


def _kept(source: Any) -> Any:
    if isinstance(source, tuple):
        return tuple(_kept(frame) for frame in source)
    return kept_picture(source) if isinstance(source, bytes) else source


class _BadRows:
    """The rows that cannot be used: the first one raises, or all are collected (`data.on_bad_row`)."""

    def __init__(self, source: str, on_bad_row: Literal["error", "skip"]) -> None:
        self.source, self.on_bad_row = source, on_bad_row
        self.messages: dict[int, str] = {}  # by number of the row

    def add(self, number: int, error: InputError) -> None:
        message = f"{self.source}: row {number}: {error}"
        if self.on_bad_row == "error":
            raise InputError(f"{message} (data.on_bad_row=skip leaves such rows out)") from error
        self.messages[number] = message

    def first(self) -> str:
        return self.messages[min(self.messages)]

    def report(self, count: int) -> None:
        """Say how many of `count` rows are left out."""
        if self.messages:
            skipped = len(self.messages)
            log.warning("%d of %d rows skipped; the first: %s", skipped, count, self.first())


def _with_our_names(row: Any, data: Data) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{type(row).__name__}; a row is an object with columns; write {{...}}")
    return renamed(row, data.columns)


def _check_media(
    prompts: Sequence[Prompt], data: Data
) -> tuple[dict[str, Size], dict[str, InputError]]:
    """Sizes of all media by key, and what is wrong with those that are bad; each once, `data.workers` at a time."""
    distinct = {m.key: m for prompt in prompts for m in prompt.media}
    sizes: dict[str, Size] = {}
    faults: dict[str, InputError] = {}

    def check(keyed: tuple[str, Media]) -> None:
        key, medium = keyed
        try:
            if data.check == "decode":
                sizes[key] = media.check(medium)
            else:
                media.exists(medium)
        except InputError as error:
            faults[key] = error

    with ThreadPoolExecutor(data.workers, thread_name_prefix="check") as pool:
        checked = pool.map(check, distinct.items(), chunksize=64)
        for _ in activity.counted("checking media", checked, len(distinct)):
            pass
    return sizes, faults
