"""What families of embedded tasks share: numbered prompts about drawn scenes, their chat messages and their media.

Clips of prompts are real mp4 files in a cache, read through video.py as a user's own are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from zipr1.core import activity
from zipr1.core.errors import InputError
from zipr1.core.types import Media, Prompt
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


# A scene about which all the kinds can be asked, and for each kind a question with its turns.
Drawn = tuple[Scene, Sequence[Sequence[Question]]]


def prompts(
    split: str,
    splits: Sequence[str],
    task: str,
    kinds: Mapping[str, Sequence[str]],
    pictures: int,
    questions_per_picture: int,
    stream: Sequence[int],
    draw: Callable[[np.random.Generator, list[str]], Drawn],
) -> list[Prompt]:
    """`pictures` x `questions_per_picture` prompts; the kinds of the task take turns.

    Picture i is the same however many pictures are asked for. Ids are `task/split/picture/question`. splits, kinds: all
    that there are, and the kinds of each task. stream: numbers that keep the random stream apart from all others. draw:
    a generator of its own for each picture, and the kinds to ask about it. Raises InputError for an unknown split or
    task.
    """
    if task not in kinds:
        raise InputError(f"task {task!r}: unknown; allowed: {', '.join(kinds)}; name one of them")
    if split not in splits:
        raise InputError(f"split {split!r}: unknown; allowed: {', '.join(splits)}")
    made = []
    for picture in activity.counted(f"drawing {task}", range(pictures)):
        key = [*stream, list(splits).index(split), list(kinds).index(task), picture]
        turn = picture * questions_per_picture
        some = [kinds[task][(turn + j) % len(kinds[task])] for j in range(questions_per_picture)]
        scene, asked = draw(np.random.default_rng(key), some)
        shown = media(scene)
        name = f"{task}/{split}/{picture}"
        for index, (kind, turns) in enumerate(zip(some, asked, strict=True)):
            said = messages(scene.kind, turns)
            answer = turns[-1].answer
            made.append(Prompt(f"{name}/{index}", said, (shown,), answer, task, kind, picture=name))
    return made


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
