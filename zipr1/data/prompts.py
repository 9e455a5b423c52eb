"""One row in the common form of formats.py -> one Prompt: its messages, media, answers and reward.

Nothing is opened here: whether pictures and clips can be read is checked in rows.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.types import Media, Prompt
from zipr1.data.chat import Entry, medium, parse
from zipr1.data.formats import ANSWERS, MEDIA, QUESTIONS
from zipr1.rewards.registry import find

ROLES = ("system", "user", "assistant")
_PLACEHOLDER = re.compile(r"<(image|video)>")


class Conversation(NamedTuple):
    """messages: chat messages that end with the question. media: of their image and video entries, in order, with
    sources. closing_answer: the text of an assistant turn after the question, else None."""

    messages: list[dict[str, Any]]
    media: list[Entry]
    closing_answer: str | None


def to_prompt(row: dict[str, Any], default_id: str, root: Path, instruction: str | None) -> Prompt:
    """The Prompt of one row. Raises InputError for a row that cannot be understood.

    default_id: of a row without `id`. root: where relative paths of media start. instruction: text that is added to
    the end of the question.
    """
    row = without_nulls(row)
    listed = {kind: _listed_media(row, kind) for kind in MEDIA}
    messages, entries, closing_answer = _conversation(row, listed)
    media = tuple(medium(*entry, root) for entry in entries)
    answer, *accepted = _answers(row, closing_answer)
    if instruction:
        messages[-1]["content"].append({"type": "text", "text": f"\n{instruction}"})
    prompt_id = _said(row.get("id", default_id))
    media_key = "|".join(_identity(m) for m in media) or prompt_id
    return Prompt(
        id=prompt_id,
        messages=messages,
        media=media,
        answer=answer,
        task=str(row.get("task", "default")),
        kind=str(row.get("kind", "default")),
        picture=str(row.get("picture", media_key)),
        reward=_reward(row),
        accepted=tuple(accepted),
    )


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that hold something: tables have every column in every row, most of them null."""
    return {name: value for name, value in row.items() if value is not None}


def _reward(row: dict[str, Any]) -> str | None:
    if "reward" not in row:
        return None
    name = str(row["reward"])
    find(name, where="reward", files=False)
    return name


def _answers(row: dict[str, Any], closing_answer: str | None) -> list[str]:
    """The right answer, then others that are right too; without an answer column, what the conversation ends with."""
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
            return list(dict.fromkeys(_said(value) for value in values))
    if closing_answer is not None:
        return [closing_answer]
    raise InputError(
        f"no answer; columns: {', '.join(row) or 'none'}; add `answer` or `solution`, or name the column: "
        "data.columns={answer: ITS NAME}"
    )


def _said(value: Any) -> str:
    """As it would be said: 3.0, which tables make of 3 where a cell of the column is empty, is "3"."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return str(value).strip()


def _listed_media(row: dict[str, Any], kind: str) -> list[Any]:
    """The media of one kind in a row, from the list column (`images`) or the single one (`image`)."""
    columns = [name for name in MEDIA[kind] if name in row]
    if len(columns) > 1:
        raise InputError(f"both `{columns[0]}` and `{columns[1]}`; keep one of them")
    if not columns:
        return []
    value = row[columns[0]]
    return list(value) if isinstance(value, list) else [value]  # one may stand without a list


def _conversation(row: dict[str, Any], listed: dict[str, list[Any]]) -> Conversation:
    """The messages of a row and the source of each medium in them. listed: the row's media columns, by kind."""
    columns = [name for name in ("messages", *QUESTIONS) if name in row]
    if not columns:
        raise InputError(
            f"no question; columns: {', '.join(row) or 'none'}; add `messages` or `{QUESTIONS[0]}`"
        )
    value = row[columns[0]]
    if isinstance(value, str) and columns[0] != "messages":
        if not value.strip():
            raise InputError(f"`{columns[0]}` is empty; write a question")
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(
            f"`{columns[0]}` is {value!r:.60}; allowed: a list of messages that is not empty"
        )
    made = [_turn(message, any(listed.values())) for message in value]
    turns = [turn for turn in made if turn is not None]
    closing_answer = None
    if len(turns) > 1 and turns[-1][0]["role"] == "assistant":
        said, shown = turns.pop()
        if shown:
            raise InputError(f"the closing answer holds an {shown[0].kind}; answers are text")
        closing_answer = " ".join(part["text"] for part in said["content"]).strip() or None
    if not turns or turns[-1][0]["role"] != "user":
        role = turns[-1][0]["role"] if turns else "system"
        raise InputError(f"the last message is of role {role!r}; it must be the user's question")
    messages, entries = [message for message, _ in turns], [e for _, own in turns for e in own]
    if not entries:
        # Without any placeholder the media come first, images before videos, as in TRL and ms-swift.
        question = next(message for message in messages if message["role"] == "user")
        entries = [Entry(kind, None, {}) for kind, sources in listed.items() for _ in sources]
        question["content"][:0] = [{"type": entry.kind} for entry in entries]
    return Conversation(messages, _with_sources(entries, listed), closing_answer)


def _turn(message: Any, listed: bool) -> tuple[dict[str, Any], list[Entry]] | None:
    """One message with its content as a list of entries, and its media; None for a system message that says nothing,
    as tables have where there is none. listed: whether the row has media beside its messages, whose places are marked
    in its texts."""
    empty = isinstance(message, Mapping) and message.get("content") in ("", None, [])
    if empty and message.get("role") == "system":
        return None
    message, entries = parse(message)
    if message["role"] not in ROLES:
        raise InputError(f"role {message['role']!r}; allowed: {', '.join(ROLES)}")
    content = message.get("content")
    written = isinstance(content, str)
    if not isinstance(content, list):
        content = [{"type": "text", "text": content}] if written and content else []
    waiting, parts, marked = iter(entries), [], []
    for part in content:
        if part["type"] != "text":
            parts.append(part)
            marked.append(next(waiting))
            continue
        splits = written or (listed and _PLACEHOLDER.search(part["text"]))
        for piece in _split_at_placeholders(part["text"]) if splits else [part]:
            parts.append(piece)
            if piece["type"] != "text":
                marked.append(Entry(piece["type"], None, {}))
    if not parts:
        raise InputError(
            f"content {message.get('content')!r:.60}; allowed: text or a list that is not empty"
        )
    return {**message, "content": parts}, marked


def _split_at_placeholders(text: str) -> list[dict[str, Any]]:
    """Text with <image> and <video> -> content entries."""
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(_PLACEHOLDER.split(text)):
        if index % 2:
            content.append({"type": piece})
        elif piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def _with_sources(entries: list[Entry], listed: dict[str, list[Any]]) -> list[Entry]:
    """Each entry with its own source (`{"type": "image", "image": path}`) or the next listed one. Raises InputError
    unless every listed medium has exactly one placeholder."""
    found = []
    remaining = {kind: list(values) for kind, values in listed.items()}
    placeholders = dict.fromkeys(MEDIA, 0)
    for entry in entries:
        if entry.source is None:
            placeholders[entry.kind] += 1
            if remaining[entry.kind]:
                entry = entry._replace(source=remaining[entry.kind].pop(0))
        found.append(entry)
    for kind, number in placeholders.items():
        if number != len(listed[kind]):
            raise InputError(
                f"{number} {kind} placeholders but {len(listed[kind])} {kind}s; the numbers must be equal; "
                f"write one <{kind}> for each"
            )
    return found


def _identity(media: Media) -> str:
    """Equal for the same picture or clip; a file's is its path."""
    if isinstance(media.source, np.ndarray):
        return hashlib.sha256(media.source.tobytes()).hexdigest()[:16]
    return str(media.source) if isinstance(media.source, str | Path) else media.key
