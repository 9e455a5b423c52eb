"""What families of embedded tasks share: the chat messages about a drawn scene, and its picture or clip as Media.

Clips of prompts are real mp4 files in a cache, read through video.py as a user's own are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from zipr1.core.types import Media
from zipr1.data import video
from zipr1.data.cache import kept_clip


class Scene(Protocol):
    """pixels: uint8 `(H, W, 3)` for an image, `(F, H, W, 3)` at `fps` for a video."""

    @property
    def kind(self) -> Literal["image", "video"]: ...

    @property
    def pixels(self) -> np.ndarray: ...

    @property
    def fps(self) -> float | None: ...


class Question(Protocol):
    @property
    def text(self) -> str: ...

    @property
    def answer(self) -> str: ...


def media(scene: Scene) -> Media:
    """A picture in memory, or a clip in an mp4 file, which is written unless it is there."""
    if scene.kind == "image":
        return Media("image", scene.pixels)
    # Named by content: a clip drawn differently by another version gets another file.
    name = hashlib.sha256(video.ENCODER.encode() + scene.pixels.tobytes()).hexdigest()[:24]

    def write(path: Path) -> None:
        video.write(path, scene.pixels, scene.fps or 1.0)

    return Media("video", kept_clip(f"{name}.mp4", write))


def messages(kind: str, turns: Sequence[Question]) -> list[dict[str, Any]]:
    """Chat messages that end with the last question: the media goes before the first one, answers stand between."""
    made: list[dict[str, Any]] = []
    for question in turns:
        made.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
        made.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    made[0]["content"].insert(0, {"type": kind})
    return made[:-1]
