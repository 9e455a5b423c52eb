"""Messages as people write them, and the pictures and clips in them: one parser for rows and for `zipr1.load`.

The forms are those of Qwen's utilities (qwen-vl-utils), of transformers and of OpenAI's servers. What is not handled is
refused by name: a picture that is dropped without a word still gets an answer.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.types import Asked, Media
from zipr1.data.pictures import rgb

KINDS = ("image", "video")
# What a part may be called, and under which names its picture or clip lies in it.
TYPES = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
SOURCES = {
    "image": ("image", "image_url", "path", "url", "base64"),
    "video": ("video", "video_url", "path", "url"),
}
# What a part may ask for, and the field of `Asked` that it is.
PIXELS = {
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "resized_height": "height",
    "resized_width": "width",
}
OPTIONS = {
    "image": PIXELS,
    "video": {
        "fps": "fps",
        "sample_fps": "fps",
        "nframes": "frames",
        "num_frames": "frames",
        "min_frames": "min_frames",
        "max_frames": "max_frames",
        **PIXELS,
    },
}
MAX_PATH_CHARACTERS = 1024
_DATA = re.compile(r"data:(?P<kind>\w*)[^,]{0,100}?;base64,", re.IGNORECASE)
# How pictures of pictures.FORMATS begin, in base64.
_BARE = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0AK")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Entry(NamedTuple):
    """A picture or clip of a message: its source as it was written, None where the entry only marks its place, and
    what it asks for, by the names in OPTIONS."""

    kind: str
    source: Any
    options: dict[str, Any]


def parse(message: Any) -> tuple[dict[str, Any], list[Entry]]:
    """A message as chat templates take it, and the media of its content in order.

    A content of text stays text; entries of a list become `{"type": "text", "text"}`, `{"type": "image"}` or
    `{"type": "video"}`; other keys stay, as with transformers. Raises InputError for what is not handled.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {message!r:.60}; a message has `role` and `content`")
    content = message.get("content")
    kept = {k: v for k, v in message.items() if v is not None}  # as transformers does
    if isinstance(content, str) or (content is None and kept.get("tool_calls")):
        return kept, []
    if not isinstance(content, Sequence | np.ndarray) or not len(content):
        raise InputError(f"content {content!r:.60}; allowed: text or a list that is not empty")
    parts, entries = [], []
    for part in content:
        kind, *found = _part(part)
        if kind == "text":
            parts.append({"type": kind, "text": found[0]})
        else:
            parts.append({"type": kind})
            entries.append(Entry(kind, *found))
    return {**kept, "content": parts}, entries


def _part(part: Any) -> tuple[Any, ...]:
    """("text", the text), or the fields of an Entry."""
    fields = {}
    if isinstance(part, Mapping):
        fields = {
            k: v for k, v in part.items() if v is not None
        }  # tables have every key in every part
    kind = fields.pop("type", None)
    if kind is None:
        kinds = [k for k in ("text", *TYPES) if k in fields]
        kind = kinds[0] if len(kinds) == 1 else None
    if kind == "text" and isinstance(fields.get("text"), str):
        _refuse_others(kind, fields, ("text",))
        return kind, fields["text"]
    if kind not in TYPES:
        raise InputError(
            f"content entry {part!r:.60}; allowed: "
            '{"type": "text", "text": ...}, {"type": "image"}, {"type": "video"}'
        )
    kind = TYPES[kind]
    if fields.get("text") == "":
        del fields["text"]
    given = [name for name in SOURCES[kind] if name in fields]
    if len(given) > 1:
        raise InputError(f"content entry with both `{given[0]}` and `{given[1]}`; keep one of them")
    source = fields.pop(given[0]) if given else None
    if given == ["base64"]:
        source = _decoded(str(source), kind)
    elif given and given[0].endswith("_url") and isinstance(source, Mapping):
        url = {k: v for k, v in source.items() if v is not None and (k, v) != ("detail", "auto")}
        source = url.pop("url", None)
        _refuse_others(given[0], url, ("url",))
    _refuse_others(kind, fields, OPTIONS[kind])
    return kind, source, fields


def _refuse_others(
    kind: str, fields: Mapping[str, Any], allowed: Sequence[str] | Mapping[str, str]
) -> None:
    for name in fields:
        if name not in allowed:
            raise InputError(
                f"content entry of type {kind}: `{name}` is not handled; allowed: {', '.join(allowed)}; take it out"
            )


def medium(
    kind: str, value: Any, options: Mapping[str, Any] | None = None, root: Path | None = None
) -> Media:
    """A picture or clip of what was written for it. Nothing is opened, but a picture of PIL becomes pixels.

    value: a path (also as file://), data:image/png;base64, or base64 text of a picture, encoded bytes or where they are
    stored, {"bytes"} or {"path"} as Hugging Face's data sets have them, {"image", ...} as a part of a chat, a picture
    of PIL, uint8 pixels, or of a clip the list of its pictures. options: by the names in OPTIONS; `fps` of a clip that
    is no file is the rate of its frames. root: where relative paths start.
    """
    if isinstance(value, Media):
        return value
    asked = asked_of(kind, options or {})
    if isinstance(value, Mapping):
        if {k for k, v in value.items() if v is not None} <= {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        else:
            _, value, more = _part({"type": kind, **value})
            asked = asked_of(kind, {**(options or {}), **more})
    if isinstance(value, list | tuple) and kind == "video":
        frames: Any = tuple(medium("image", frame, None, root).source for frame in value)
        return _with_rate(Media("video", frames), asked)
    if isinstance(value, Image.Image):
        value = rgb(value)
    elif isinstance(value, str):
        value = _text(value, kind, root)
    elif hasattr(value, "__array__"):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        return _with_rate(Media(kind, value), asked)  # type: ignore[arg-type]
    if isinstance(value, bytes) or hasattr(value, "read"):
        if kind == "video":
            raise InputError("a video inside the row; give the path of a file")
        return Media("image", value, asked=asked)
    if not isinstance(value, Path):
        raise InputError(f"{kind} {value!r:.60}; allowed: the path of a file")
    path = value if root is None else root / value
    return Media("image" if kind == "image" else "video", path, asked=asked)


def _with_rate(media: Media, asked: Asked) -> Media:
    """Frames that are no file have the rate that stands beside them; it is not one to read them at."""
    if media.kind == "image":
        return replace(media, asked=asked)
    return replace(media, fps=asked.fps, asked=replace(asked, fps=None))


def asked_of(kind: str, options: Mapping[str, Any]) -> Asked:
    """What is asked of a picture or clip, from options by the names in OPTIONS (None: not asked). Raises InputError."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        field = OPTIONS[kind][name]
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9
        if not number or (field != "fps" and value != int(value)):
            wanted = "a number" if field == "fps" else "a whole number"
            raise InputError(f"{name} of one {kind} is {value!r:.40}; allowed: {wanted} above 0")
        if field in found:
            raise InputError(
                f"{name} of one {kind}: it is there under another name too; keep one of them"
            )
        found[field] = float(value) if field == "fps" else int(value)
    if "fps" in found and "frames" in found:
        raise InputError("a video with both fps and num_frames (or nframes); keep one of them")
    if ("height" in found) != ("width" in found):
        raise InputError(f"one {kind} with one of resized_height and resized_width; give both")
    if found.get("min_pixels", 0) > found.get("max_pixels", found.get("min_pixels", 0)):
        raise InputError(
            f"one {kind} with min_pixels {found['min_pixels']} above max_pixels {found['max_pixels']}"
        )
    return Asked(**found)


def _text(value: str, kind: str, root: Path | None) -> Path | bytes:
    """What a text stands for: a path, or an encoded picture."""
    if match := _DATA.match(value):
        if match["kind"].lower() not in (kind, ""):
            raise InputError(f"{kind} {value:.40}...: holds {match['kind']} data; give it as such")
        return _decoded(value, kind, match.end())
    if value[:5].lower() == "data:":
        raise InputError(
            f"{kind} {value:.40}...: a data URI without ;base64, is not read; give a path"
        )
    if value.startswith("file://"):
        local = Path(value.removeprefix("file://").removeprefix("localhost"))
        exact = local if root is None else root / local
        return Path(unquote(str(local))) if "%" in value and not exact.exists() else local
    if _URL.match(value):
        raise InputError(
            f"{kind} {value:.80}: a URL; only local files are read; download the {kind} and give its path"
        )
    if len(value) > MAX_PATH_CHARACTERS:
        if kind == "image" and value.startswith(_BARE):
            return _decoded(value, kind)  # transformers takes base64 that nothing names, too
        raise InputError(
            f"{kind} {value:.40}...: {len(value):,} characters; give the path of a file"
        )
    if not value:
        raise InputError(f"{kind} {value!r:.60}; allowed: the path of a file")
    return Path(value)


def _decoded(text: str, kind: str, start: int = 0) -> bytes:
    try:
        return base64.b64decode("".join(text[start:].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{kind} {text:.40}...: not base64 ({error}); give a path") from error
