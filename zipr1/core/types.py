"""The nouns that every other file passes on: Media, Prompt, Rollout, Group.

Shapes in names: P prompts, N rollouts of one prompt (budgets), D decoder layers, T answer tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


class Stored(Protocol):
    """An encoded picture that stays in its dataset until it is needed."""

    @property
    def key(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class Media:
    """One picture or clip, not yet decoded.

    source: a path; an encoded picture, as bytes or where it is stored; or pixels already in memory: uint8, `(H, W, 3)`
        for an image, `(F, H, W, 3)` for a video.
    fps: frames per second of `source` frames that are in memory; None for images and for files (read there).
    size: frames, height and width of what the file holds and its frames per second (1 and 0.0 for an image), if it was
        looked at.
    """

    kind: Literal["image", "video"]
    source: str | Path | bytes | Stored | np.ndarray
    fps: float | None = None
    size: tuple[int, int, int, float] | None = field(default=None, compare=False)

    @cached_property
    def key(self) -> str:
        """The same for the same media, so that they are decoded and seen once."""
        if isinstance(self.source, (str, Path)):
            return f"{self.kind}:{self.source}"
        if isinstance(self.source, bytes):
            return f"{self.kind}:{hashlib.sha1(self.source).hexdigest()}"
        if hasattr(self.source, "key"):
            return f"{self.kind}:{self.source.key}"
        return f"{self.kind}:{self.fps}:{hashlib.sha1(self.source.tobytes()).hexdigest()}"


@dataclass(frozen=True)
class Prompt:
    """A question about some media, and what would be a right answer.

    messages: chat turns `{"role", "content": [{"type": "image" | "video"} | {"type": "text", "text"}]}`, ending
        with a user turn; each image or video entry takes the next element of `media`.
    task: the benchmark it counts for (`digits`, ...); kind: the kind of question within it.
    picture: questions with the same value depend on each other: intervals are clustered by it.
    accepted: other right answers than `answer`. row: where it was written, `train.jsonl: row 3`.
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
        """The same for the same media in the same order: vision features may be shared under it."""
        return "|".join(m.key for m in self.media)

    @property
    def task_kind(self) -> str:
        """The kind of question among all tasks."""
        return f"{self.task}/{self.kind}"


@dataclass
class Rollout:
    """One sampled answer of one prompt under one budget.

    thresholds: `(D,)` float32, the p of each layer. tokens: `(T,)` int64 sampled ids, the end token included.
    logprobs: `(T,)` float32 of the sampler. kept: per layer, ascending int32 positions in the unpadded prompt.
    token_ratio: mean over layers of kept / prompt length, from the physical cache lengths.
    """

    thresholds: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor
    kept: list[torch.Tensor]
    prompt_length: int
    token_ratio: float
    text: str
    rewards: dict[str, float] = field(default_factory=dict)

    @property
    def layer_ratios(self) -> list[float]:
        """Kept fraction of the prompt in each layer, in (0, 1]."""
        return [k.shape[0] / self.prompt_length for k in self.kept]


@dataclass
class Group:
    """All rollouts of one prompt: the unit of the baseline and of the gate."""

    prompt: Prompt
    rollouts: list[Rollout]
