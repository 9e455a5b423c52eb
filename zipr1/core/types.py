"""The data that the rooms hand to each other: Media, Prompt, Rollout, Group. No behaviour, and no model.

Letters in shapes: P prompts, N rollouts of one prompt, D decoder layers, T answer tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch

    # A picture: a path, encoded, where that is stored, or pixels.
    Picture: TypeAlias = str | Path | bytes | "Stored" | np.ndarray


class Stored(Protocol):
    """An encoded picture that stays in its dataset until it is needed."""

    @property
    def key(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class Asked:
    """What a chat asks of one picture or clip; it wins over what holds for all. None: nothing is asked.

    fps, min_frames, max_frames: of the frames that are read of a clip; frames: how many exactly. min_pixels,
    max_pixels: bounds of height x width, of a clip's frame too. height, width: both or none, the size to become, before
    it is rounded to whole tokens.
    """

    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    height: int | None = None
    width: int | None = None


NOTHING = Asked()


@dataclass(frozen=True)
class Media:
    """One picture or clip, not yet decoded.

    source: a path; an encoded picture, as bytes or where it is stored; pixels already in memory: uint8, `(H, W, 3)`
        for an image, `(F, H, W, 3)` for a video; or of a video its frames, each a picture as of an image.
    fps: frames per second of `source` frames that are no file; None for images and for files (read there).
    size: (frames, height, width, frames per second) of the file, 1 frame and 0.0 for an image; None if it has not been
        opened.
    asked: what was written beside it in a chat.
    """

    kind: Literal["image", "video"]
    source: str | Path | bytes | Stored | np.ndarray | tuple[Picture, ...]
    fps: float | None = None
    size: tuple[int, int, int, float] | None = field(default=None, compare=False)
    asked: Asked = NOTHING

    @cached_property
    def key(self) -> str:
        """Equal for equal media, so that they are decoded and encoded once."""
        own = "" if self.asked == NOTHING else f"{self.asked}:"
        if isinstance(self.source, (str, Path)):
            return f"{self.kind}:{own}{self.source}"
        if isinstance(self.source, bytes):
            return f"{self.kind}:{own}{hashlib.sha1(self.source).hexdigest()}"
        if isinstance(self.source, tuple):
            frames = "\n".join(Media("image", frame).key for frame in self.source)
            return f"{self.kind}:{own}{self.fps}:{hashlib.sha1(frames.encode()).hexdigest()}"
        if hasattr(self.source, "key"):
            return f"{self.kind}:{own}{self.source.key}"
        pixels = hashlib.sha1(self.source.tobytes()).hexdigest()
        return f"{self.kind}:{own}{self.fps}:{self.source.shape}:{pixels}"


@dataclass(frozen=True)
class Prompt:
    """A question about pictures or clips, and its right answer.

    messages: chat turns `{"role", "content": [{"type": "image" | "video"} | {"type": "text", "text"}]}`, ending
        with a user turn; each image or video entry takes the next element of `media`.
    task: the benchmark it counts for (`digits`, ...); kind: the kind of question within it.
    picture: names what the question is about; confidence intervals treat questions with the same value as one cluster.
    reward: name of its check, where the recipe's is not meant. accepted: further right answers beside `answer`.
    row: where the question was read, such as `train.jsonl: row 3`, for messages.
    """

    id: str
    messages: Sequence[dict[str, Any]]
    media: tuple[Media, ...]
    answer: str
    task: str = "default"
    kind: str = "default"
    picture: str = ""
    reward: str | None = None
    accepted: tuple[str, ...] = ()
    row: str = ""

    @property
    def media_key(self) -> str:
        """Equal for the same media in the same order: prompts with equal keys can share vision features."""
        return "|".join(m.key for m in self.media)

    @property
    def task_kind(self) -> str:
        """The kind of question among all tasks."""
        return f"{self.task}/{self.kind}"


@dataclass
class Rollout:
    """One sampled answer to one prompt, at one threshold for each layer.

    thresholds: `(D,)` float32, the p of each layer. tokens: `(T,)` int64 sampled ids, the end token included.
    logprobs: `(T,)` float32, of the sampled tokens under the sampling policy. kept: for each layer the positions in the
        unpadded prompt that stayed in its KV cache, int32, ascending.
    token_ratio: kept / prompt length, mean over layers, in (0, 1]; from the lengths of the KV cache.
    rewards: parts of the reward by name. truncated: whether it had not ended after the most tokens that are allowed.
    """

    thresholds: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    kept: list[torch.Tensor]
    prompt_length: int
    token_ratio: float
    text: str
    rewards: dict[str, float] = field(default_factory=dict)
    truncated: bool = False

    @property
    def layer_ratios(self) -> list[float]:
        """Kept fraction of the prompt in each layer, in (0, 1]."""
        return [k.shape[0] / self.prompt_length for k in self.kept]


@dataclass
class Group:
    """All rollouts of one prompt. The baseline of the advantage is taken over them."""

    prompt: Prompt
    rollouts: list[Rollout]
