"""One row in the common form of formats.py -> one Prompt: its messages, media, answers and reward.

Nothing is opened here: whether pictures and clips can be read is checked in rows.py.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.types import Media, Prompt
from zipr1.data.formats import ANSWERS, MEDIA, QUESTIONS
from zipr1.rewards.registry import find

ROLES = ("system", "user", "assistant")
MAX_PATH_CHARACTERS = 1024
_PLACEHOLDER = re.compile(r"<(image|video)>")
_BASE64_IMAGE = re.compile(r"data:image/[\w.+-]+;base64,")


class Conversation(NamedTuple):
    """messages: chat messages that end with the question. sources: (kind, source) of each image or video entry, in
    the order of the entries. closing_answer: the text of an assistant turn after the question, else None."""

    messages: list[dict[str, Any]]
    sources: list[tuple[str, Any]]
    closing_answer: str | None


def to_prompt(row: dict[str, Any], default_id: str, root: Path, instruction: str | None) -> Prompt:
    """The Prompt of one row. Raises InputError for a row that cannot be understood.

    default_id: of a row without `id`. root: where relative paths of media start. instruction: text that is added to
    the end of the question.
    """
    row = without_nulls(row)
    listed = {kind: _listed_media(row, kind) for kind in MEDIA}
    messages, sources, closing_answer = _conversation(row, listed)
    media = tuple(_media(kind, source, root) for kind, source in sources)
    answer, *accepted = _answers(row, closing_answer)
    if instruction:
        messages[-1]["content"].append({"type": "text", "text": f"\n{instruction}"})
    prompt_id = str(row.get("id", default_id))
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
    find(name, where="reward")
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
            return list(dict.fromkeys(str(value).strip() for value in values))
    if closing_answer is not None:
        return [closing_answer]
    raise InputError(
        f"no answer; columns: {', '.join(row) or 'none'}; add `answer` or `solution`, or name the column: "
        "data.columns={answer: ITS NAME}"
    )


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
    messages = [_message(message) for message in value]
    closing_answer = None
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        content = messages.pop()["content"]
        texts = [part["text"] for part in content if part["type"] == "text"]
        closing_answer = " ".join(texts).strip() or None
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the last message is of role {messages[-1]['role']!r}; it must be the user's question"
        )
    parts = [part for message in messages for part in message["content"]]
    if all(part["type"] == "text" for part in parts):
        # Without any placeholder the media come first, images before videos, as in TRL and ms-swift.
        question = next(message for message in messages if message["role"] == "user")
        question["content"][:0] = [
            {"type": kind} for kind, sources in listed.items() for _ in sources
        ]
    return Conversation(messages, _assign_sources(messages, listed), closing_answer)


def _message(message: Any) -> dict[str, Any]:
    """One message with its content as a list of entries; placeholders in its text become entries."""
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise InputError(f"message {message!r:.60}; a message has `role` and `content`")
    if message["role"] not in ROLES:
        raise InputError(f"role {message['role']!r}; allowed: {', '.join(ROLES)}")
    content = message["content"]
    if isinstance(content, str):
        content = _split_at_placeholders(content)
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


def _split_at_placeholders(text: str) -> list[dict[str, Any]]:
    """Text with <image> and <video> -> content entries."""
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(_PLACEHOLDER.split(text)):
        if index % 2:
            content.append({"type": piece})
        elif piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def _assign_sources(
    messages: list[dict[str, Any]], listed: dict[str, list[Any]]
) -> list[tuple[str, Any]]:
    """(kind, source) of each image or video entry: its own (`{"type": "image", "image": path}`) or the next listed one.

    The entries are reduced in place to their type and text. Raises InputError unless every listed medium has exactly
    one placeholder.
    """
    sources = []
    remaining = {kind: list(values) for kind, values in listed.items()}
    placeholders = dict.fromkeys(MEDIA, 0)
    for message in messages:
        for index, part in enumerate(message["content"]):
            kind = part["type"]
            if kind == "text":
                message["content"][index] = {"type": "text", "text": part["text"]}
                continue
            message["content"][index] = {"type": kind}
            if part.get(kind) is not None:
                sources.append((kind, part[kind]))
                continue
            placeholders[kind] += 1
            if remaining[kind]:
                sources.append((kind, remaining[kind].pop(0)))
    for kind, number in placeholders.items():
        if number != len(listed[kind]):
            raise InputError(
                f"{number} {kind} placeholders but {len(listed[kind])} {kind}s; the numbers must be equal; "
                f"write one <{kind}> for each"
            )
    return sources


def _media(kind: str, value: Any, root: Path) -> Media:
    """A picture or clip from what a row gives for it: a path, encoded bytes, base64 text, or where bytes are stored."""
    if isinstance(value, dict) and value.get("bytes"):
        value = value["bytes"]  # how Hugging Face datasets store pictures in parquet
    elif isinstance(value, dict):
        value = value.get("path") or value.get(kind)  # the latter in verl
    if kind == "image" and isinstance(value, str) and (match := _BASE64_IMAGE.match(value)):
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
    if len(value) > MAX_PATH_CHARACTERS:
        raise InputError(
            f"{kind} {value:.40}...: {len(value):,} characters; give the path of a file"
        )
    return Media("image" if kind == "image" else "video", root / value.removeprefix("file://"))


def _identity(media: Media) -> str:
    """Equal for the same picture or clip; a file's is its path."""
    if isinstance(media.source, np.ndarray):
        return hashlib.sha256(media.source.tobytes()).hexdigest()[:16]
    return str(media.source) if isinstance(media.source, str | Path) else media.key
