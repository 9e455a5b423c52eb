"""Rows of questions -> Prompts, one question a row, whatever their format (formats.py) and source (readers.py).

Everything is checked when the rows are loaded, so that a run does not stop at a bad one hours later: columns,
placeholders and answers in the order of the rows, then every picture and clip once, several at a time.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data
from zipr1.core.types import Media, Prompt
from zipr1.data.formats import ANSWERS, MEDIA, QUESTIONS, Format, detect, renamed
from zipr1.data.media import exists, look
from zipr1.data.readers import read
from zipr1.rewards.registry import find

log = logging.getLogger("zipr1")

ROLES = ("system", "user", "assistant")
_PLACEHOLDER = re.compile(r"<(image|video)>")
_INLINE = re.compile(r"data:image/[\w.+-]+;base64,")
LONGEST = 1024  # characters of a path
Size = tuple[int, int, int, float]


def load(source: str | Path, data: Data) -> list[Prompt]:
    """All rows of a source, in its order. A bad row stops with its number, or is counted (`data.on_bad_row`)."""
    name, folder, rows = read(str(source), data)
    root = Path(data.media_root).expanduser() if data.media_root else folder
    stem = Path(name).stem
    made: list[Prompt] = []
    bad: list[tuple[int, str]] = []
    formats: set[Format] = set()
    count = 0

    def refuse(number: int, error: InputError) -> None:
        message = f"{name}: row {number}: {error}"
        if data.on_bad_row == "error":
            raise InputError(f"{message} (data.on_bad_row=skip leaves such rows out)") from error
        bad.append((number, message))

    for number, get in rows:
        count += 1
        try:
            row = get()
            if not isinstance(row, dict):
                raise InputError(
                    f"{type(row).__name__}; a row is an object with columns; write {{...}}"
                )
            row = renamed(row, data.columns)
            chosen = detect(row)
            if chosen not in formats:
                log.info("%s: read as %s (columns: %s)", name, chosen.name, ", ".join(row))
                formats.add(chosen)
            prompt = _prompt(chosen.plain(_given(row)), f"{stem}/{number}", root, data.instruction)
            made.append(replace(prompt, row=f"{name}: row {number}"))
        except InputError as error:
            refuse(number, error)
    sizes, faults = _looked(made, data)
    good: list[Prompt] = []
    for prompt in made:
        fault = next((faults[m.key] for m in prompt.media if m.key in faults), None)
        if fault is not None:
            refuse(int(prompt.row.rpartition(" ")[2]), fault)
            continue
        media = tuple(replace(m, size=sizes.get(m.key)) for m in prompt.media)
        good.append(replace(prompt, media=media))
    bad.sort()
    if bad:
        log.warning("%d of %d rows skipped; the first: %s", len(bad), count, bad[0][1])
    if not good:
        reason = f"all {len(bad)} rows are bad; the first: {bad[0][1]}" if bad else "no rows"
        raise InputError(f"{name}: {reason}; give at least one question with an answer")
    return good


def _given(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _looked(prompts: Sequence[Prompt], data: Data) -> tuple[dict[str, Size], dict[str, InputError]]:
    """Sizes of all media by key, and what is wrong with those that are bad; each once, `data.workers` at a time."""
    media = {m.key: m for prompt in prompts for m in prompt.media}
    sizes: dict[str, Size] = {}
    faults: dict[str, InputError] = {}

    def one(item: tuple[str, Media]) -> None:
        key, found = item
        try:
            if data.check == "decode":
                sizes[key] = look(found)
            else:
                exists(found)
        except InputError as error:
            faults[key] = error

    with ThreadPoolExecutor(data.workers, thread_name_prefix="check") as pool:
        for _ in pool.map(one, media.items(), chunksize=64):
            pass
    return sizes, faults


def _prompt(row: dict[str, Any], default_id: str, root: Path, instruction: str | None) -> Prompt:
    row = _given(row)
    queues = {kind: _listed(row, kind) for kind in MEDIA}
    messages, entries, said = _messages(row, queues)
    media = tuple(_media(kind, value, root) for kind, value in entries)
    answer, *accepted = _answers(row, said)
    if instruction:
        messages[-1]["content"].append({"type": "text", "text": f"\n{instruction}"})
    name = str(row.get("id", default_id))
    shared = "|".join(_key(m) for m in media) or name
    return Prompt(
        id=name,
        messages=messages,
        media=media,
        answer=answer,
        task=str(row.get("task", "default")),
        kind=str(row.get("kind", "default")),
        picture=str(row.get("picture", shared)),
        reward=_reward(row),
        accepted=tuple(accepted),
    )


def _reward(row: dict[str, Any]) -> str | None:
    if "reward" not in row:
        return None
    name = str(row["reward"])
    find(name, where="reward", files=False)
    return name


def _answers(row: dict[str, Any], said: str | None) -> list[str]:
    """The right answer, and others that are right too. said: what the conversation ends with, if it is an answer."""
    for name in ANSWERS:
        if name in row:
            values = row[name] if isinstance(row[name], list) and row[name] else [row[name]]
            for value in values:
                if not isinstance(value, str | int | float):
                    raise InputError(
                        f"{name} is {type(value).__name__}; allowed: text, a number or a list of them"
                    )
                if not str(value).strip() or value != value:  # NaN: an empty cell of a table
                    raise InputError(f"{name} is empty; write the right answer")
            return list(dict.fromkeys(str(value).strip() for value in values))
    if said is not None:
        return [said]
    raise InputError(
        f"no answer; columns: {', '.join(row) or 'none'}; add `answer` or `solution`, or name the column: "
        "data.columns={answer: ITS NAME}"
    )


def _listed(row: dict[str, Any], kind: str) -> list[Any]:
    """The media of one kind in a row, from the list column or the single one."""
    given = [name for name in MEDIA[kind] if name in row]
    if len(given) > 1:
        raise InputError(f"both `{given[0]}` and `{given[1]}`; keep one of them")
    if not given:
        return []
    value = row[given[0]]
    return list(value) if isinstance(value, list) else [value]  # one may stand without a list


def _messages(
    row: dict[str, Any], queues: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], list[tuple[str, Any]], str | None]:
    """Chat messages in our form, (kind, source) of each image or video entry in their order, and the answer that the
    conversation ends with (None where it ends with the question)."""
    given = [name for name in ("messages", *QUESTIONS) if name in row]
    if not given:
        raise InputError(
            f"no question; columns: {', '.join(row) or 'none'}; add `messages` or `{QUESTIONS[0]}`"
        )
    value = row[given[0]]
    if isinstance(value, str) and given[0] != "messages":
        if not value.strip():
            raise InputError(f"`{given[0]}` is empty; write a question")
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(
            f"`{given[0]}` is {value!r:.60}; allowed: a list of messages that is not empty"
        )
    messages = [_message(message) for message in value]
    said = None
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        content = messages.pop()["content"]
        said = " ".join(part["text"] for part in content if part["type"] == "text").strip() or None
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the last message is of role {messages[-1]['role']!r}; it must be the user's question"
        )
    parts = [part for message in messages for part in message["content"]]
    first = next(message for message in messages if message["role"] == "user")
    if all(part["type"] == "text" for part in parts):
        # Without any placeholder the media come first, images before videos, as in TRL and ms-swift.
        first["content"][:0] = [{"type": kind} for kind, queue in queues.items() for _ in queue]
    return messages, _entries(messages, queues), said


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise InputError(f"message {message!r:.60}; a message has `role` and `content`")
    if message["role"] not in ROLES:
        raise InputError(f"role {message['role']!r}; allowed: {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        content = _split(content)
    if not isinstance(content, list) or not content:
        raise InputError(f"content {content!r:.60}; allowed: text or a list that is not empty")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", *MEDIA) or (
            kind == "text" and not isinstance(part.get("text"), str)
        ):
            raise InputError(
                f"content entry {part!r:.60}; allowed: "
                '{"type": "text", "text": ...}, {"type": "image"}, {"type": "video"}'
            )
    return {"role": message["role"], "content": list(content)}


def _split(text: str) -> list[dict[str, Any]]:
    """Text with <image> and <video> -> content entries."""
    pieces = _PLACEHOLDER.split(text)
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            content.append({"type": piece})
        elif piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def _entries(messages: list[dict[str, Any]], queues: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """Each image or video entry with its source: its own (`{"type": "image", "image": path}`) or the next listed."""
    entries = []
    left = {kind: list(queue) for kind, queue in queues.items()}
    places = dict.fromkeys(MEDIA, 0)
    for message in messages:
        for index, part in enumerate(message["content"]):
            kind = part["type"]
            if kind == "text":
                message["content"][index] = {"type": "text", "text": part["text"]}
                continue
            message["content"][index] = {"type": kind}
            if part.get(kind) is not None:
                entries.append((kind, part[kind]))
                continue
            places[kind] += 1
            if left[kind]:
                entries.append((kind, left[kind].pop(0)))
    for kind, number in places.items():
        if number != len(queues[kind]):
            raise InputError(
                f"{number} {kind} placeholders but {len(queues[kind])} {kind}s; the numbers must be equal; "
                f"write one <{kind}> for each"
            )
    return entries


def _media(kind: str, value: Any, root: Path) -> Media:
    if isinstance(value, dict) and value.get("bytes"):
        value = value["bytes"]  # how Hugging Face datasets store pictures in parquet
    elif isinstance(value, dict):
        value = value.get("path") or value.get(kind)  # the latter in verl
    if kind == "image" and isinstance(value, str) and (match := _INLINE.match(value)):
        try:
            return Media("image", base64.b64decode(value[match.end() :], validate=True))
        except ValueError as error:
            raise InputError(f"{kind} {value:.40}...: not base64 ({error}); give a path") from error
    if kind == "image" and (isinstance(value, bytes) or hasattr(value, "read")):
        return Media("image", value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{kind} {value!r:.60}; allowed: the path of a file")
    if re.match(r"(https?|s3|gs)://", value):
        raise InputError(f"{kind} {value:.80}: a URL; only local files are read; download it first")
    if len(value) > LONGEST:
        raise InputError(
            f"{kind} {value:.40}...: {len(value):,} characters; give the path of a file"
        )
    return Media("image" if kind == "image" else "video", root / value.removeprefix("file://"))


def _key(media: Media) -> str:
    """Equal for the same picture or clip."""
    if isinstance(media.source, np.ndarray):
        return hashlib.sha256(media.source.tobytes()).hexdigest()[:16]
    return str(media.source) if isinstance(media.source, str | Path) else media.key
