"""Files of rows -> Prompts: .jsonl, .json (a list) and .parquet (needs pyarrow), one question a row.

A row holds either `messages` or a question (`question`, `prompt` or `problem`), then `images` / `videos` (or `image` /
`video`) and `answer` (or `solution`); optional are `id`, `task`, `kind`, `picture`, `reward`. Files are checked when
the rows are loaded, so that a run does not stop at a bad picture hours later; clips are not decoded here.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.data.media import check_image, read_image
from zipr1.episode import Media, Prompt
from zipr1.errors import InputError
from zipr1.recipe import Data
from zipr1.rewards import find

log = logging.getLogger("zipr1")

QUESTIONS = ("question", "prompt", "problem")
ANSWERS = ("answer", "solution")
MEDIA = {"image": ("images", "image"), "video": ("videos", "video")}
ROLES = ("system", "user", "assistant")
_PLACEHOLDER = re.compile(r"<(image|video)>")


def load(source: str | Path, data: Data) -> list[Prompt]:
    """All rows of a file, in its order. A bad row stops with its number, or is counted (`data.on_bad_row`)."""
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{path}: no such data file; check data.source and data.heldout")
    root = Path(data.media_root) if data.media_root else path.parent
    prompts, bad = [], []
    checked: set[Path] = set()
    for number, read in READERS[path.suffix.lower()](path):
        try:
            prompts.append(_prompt(read(), f"{path.stem}/{number}", root, checked))
        except InputError as error:
            message = f"{path}: row {number}: {error}"
            if data.on_bad_row == "error":
                raise InputError(
                    f"{message} (data.on_bad_row=skip leaves such rows out)"
                ) from error
            bad.append(message)
    if bad:
        log.warning(
            "%d of %d rows skipped; the first: %s", len(bad), len(bad) + len(prompts), bad[0]
        )
    if not prompts:
        reason = f"all {len(bad)} rows are bad; the first: {bad[0]}" if bad else "no rows"
        raise InputError(f"{path}: {reason}; give at least one question with an answer")
    return prompts


def _prompt(row: Any, default_id: str, root: Path, checked: set[Path]) -> Prompt:
    if not isinstance(row, dict):
        raise InputError(f"{type(row).__name__}; a row is an object with columns; write {{...}}")
    row = {name: value for name, value in row.items() if value is not None}
    queues = {kind: _listed(row, kind) for kind in MEDIA}
    messages, entries = _messages(row, queues)
    media = tuple(_media(kind, value, root, checked) for kind, value in entries)
    name = str(row.get("id", default_id))
    shared = "|".join(_key(m) for m in media) or name
    return Prompt(
        id=name,
        messages=messages,
        media=media,
        answer=_answer(row),
        task=str(row.get("task", "default")),
        kind=str(row.get("kind", "default")),
        picture=str(row.get("picture", shared)),
        reward=_reward(row),
    )


def _reward(row: dict[str, Any]) -> str | None:
    if "reward" not in row:
        return None
    name = str(row["reward"])
    find(name, where="reward")
    return name


def _answer(row: dict[str, Any]) -> str:
    for name in ANSWERS:
        if name in row:
            value = row[name]
            if not isinstance(value, str | int | float):
                raise InputError(f"{name} is {type(value).__name__}; allowed: text or a number")
            if not str(value).strip():
                raise InputError(f"{name} is empty; write the right answer")
            return str(value).strip()
    raise InputError(f"no answer; columns: {', '.join(row) or 'none'}; add `answer` or `solution`")


def _listed(row: dict[str, Any], kind: str) -> list[Any]:
    """The media of one kind in a row, from the list column or the single one."""
    given = [name for name in MEDIA[kind] if name in row]
    if len(given) > 1:
        raise InputError(f"both `{given[0]}` and `{given[1]}`; keep one of them")
    if not given:
        return []
    value = row[given[0]]
    if given[0] == kind and not isinstance(value, list):
        return [value]
    if not isinstance(value, list):
        raise InputError(f"`{given[0]}` is {type(value).__name__}; allowed: a list of paths")
    return list(value)


def _messages(
    row: dict[str, Any], queues: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], list[tuple[str, Any]]]:
    """Chat messages in our form, and (kind, path or bytes) of each image or video entry in their order."""
    given = [name for name in ("messages", *QUESTIONS) if name in row]
    if not given:
        raise InputError(
            f"no question; columns: {', '.join(row) or 'none'}; add `messages` or `{QUESTIONS[0]}`"
        )
    value = row[given[0]]
    if isinstance(value, str) and given[0] != "messages":
        if not value.strip():
            raise InputError(f"`{given[0]}` is empty; write a question")
        if not _PLACEHOLDER.search(value):
            # A plain question about some media: they come first, images before videos.
            value = "".join(f"<{kind}>" * len(queue) for kind, queue in queues.items()) + value
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(
            f"`{given[0]}` is {value!r:.60}; allowed: a list of messages that is not empty"
        )
    messages = [_message(message) for message in value]
    if messages[-1]["role"] != "user":
        raise InputError(
            f"the last message is of role {messages[-1]['role']!r}; it must be the user's question; "
            "move a closing assistant turn to `answer`"
        )
    return messages, _entries(messages, queues)


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


def _media(kind: str, value: Any, root: Path, checked: set[Path]) -> Media:
    if isinstance(value, dict) and kind == "image" and value.get("bytes"):
        # How Hugging Face datasets store pictures in parquet.
        return Media("image", read_image(io.BytesIO(value["bytes"]), "image in the row"))
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise InputError(f"{kind} {value!r:.60}; allowed: the path of a file")
    if re.match(r"(https?|s3|gs)://", value):
        raise InputError(f"{kind} {value:.80}: a URL; only local files are read; download it first")
    path = root / value.removeprefix("file://")
    if path not in checked:
        if kind == "image":
            check_image(path)
        elif not path.is_file():
            raise InputError(f"{path}: no such video file; check the path or data.media_root")
        elif path.stat().st_size == 0:
            raise InputError(f"{path}: the video file is empty (0 bytes); copy it again")
        checked.add(path)
    return Media("image" if kind == "image" else "video", path)


def _key(media: Media) -> str:
    """Equal for the same picture or clip."""
    if isinstance(media.source, np.ndarray):
        return hashlib.sha256(media.source.tobytes()).hexdigest()[:16]
    return str(media.source)


# A reader yields (row number from 1, a function that gives the row): a row that cannot be parsed is a bad row.
Rows = Iterator[tuple[int, Callable[[], Any]]]


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, lambda line=line: _parse(line)  # type: ignore[misc]


def _json(path: Path) -> Rows:
    try:
        rows = _parse(path.read_bytes()) if path.stat().st_size else []
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: {type(rows).__name__}; allowed: a list of rows; or name it .jsonl"
        )
    for number, row in enumerate(rows, 1):
        yield number, lambda row=row: row  # type: ignore[misc]


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{path}: parquet needs pyarrow ({error}); pip install 'zipr1[data]', or convert it to .jsonl"
        ) from error
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, lambda row=row: row  # type: ignore[misc]
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file that can be read ({error})") from error


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"not JSON ({error}); check quotes, commas and UTF-8") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
