"""Prompts and pixels -> token ids, patches and grids, for models that read Qwen2-VL's input layout.

Not transformers' processor classes: those need torchvision for video. Pictures and clips share one path here,
PIL for resizing and numpy for the rest, and give the same patches as transformers' PIL image processor (tested).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.jsontext import loads

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Frames a second of a clip that does not tell its rate, as transformers assumes.
UNKNOWN_FPS = 24.0


@dataclass(frozen=True)
class PixelSettings:
    """How pictures become patches. min_pixels, max_pixels: bounds of height x width after resizing; min_frame_pixels,
    max_frame_pixels: of a clip's frame, None where they are a picture's.

    tile: pixels on a side of the one square that a picture is made, 0 for any size; besides: its tokens that show no
    part of it. clips: whether videos are handled."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    tile: int = 0
    besides: int = 0
    clips: bool = True
    max_frame_pixels: int | None = None
    min_frame_pixels: int | None = None

    def of(self, kind: str, frame_pixels: int | None = None) -> PixelSettings:
        """Those of an `image` or a `video`. frame_pixels: a lower upper bound of a clip's frame, if it is one."""
        if kind == "image":
            return self
        high = self.max_frame_pixels or self.max_pixels
        if frame_pixels is not None:
            high = min(high, frame_pixels)
        low = min(self.min_frame_pixels or self.min_pixels, high)
        return replace(self, min_pixels=low, max_pixels=high)

    @property
    def factor(self) -> int:
        """Pixels on a side of one token of the language model."""
        return self.patch * self.merge

    @classmethod
    def read(
        cls,
        folder: str | Path,
        sizes: tuple[int, int, int],
        asked: Mapping[str, int | None],
        given: Mapping[str, Any] | None = None,
        revision: str | None = None,
        **fixed: Any,
    ) -> PixelSettings:
        """Settings saved beside the weights in `folder` (a hub id: what was downloaded of `revision`), else `given`.

        sizes: patch, merge and temporal. asked: min_pixels, max_pixels and max_frame_pixels; those that are set win.
        fixed: the family's other fields.
        """
        picture = _saved(folder, "image_processor", "preprocessor_config.json", revision)
        picture = dict(given or {}) if picture is None else picture
        clip = _saved(folder, "video_processor", "video_preprocessor_config.json", revision) or {}
        default = cls()
        low, high = _bounds(picture)
        low, high = low or default.min_pixels, high or default.max_pixels
        least, most = _bounds(clip)
        # None where it follows from the picture's, so that whoever asks for other pictures gets clips like them.
        least = None if least == min(low, most or high) else least
        most = None if most == high else most
        return cls(
            patch=sizes[0],
            merge=sizes[1],
            temporal=sizes[2],
            min_pixels=asked.get("min_pixels") or low,
            max_pixels=asked.get("max_pixels") or high,
            mean=tuple(picture.get("image_mean") or CLIP_MEAN),
            std=tuple(picture.get("image_std") or CLIP_STD),
            max_frame_pixels=asked.get("max_frame_pixels") or most,
            min_frame_pixels=least,
            **fixed,
        )


def has_pixel_settings(folder: str | Path) -> bool:
    """Whether a folder holds pixel settings of its own."""
    return _saved(folder, "image_processor", "preprocessor_config.json", None) is not None


def _saved(folder: str | Path, part: str, file: str, revision: str | None) -> dict[str, Any] | None:
    """What transformers 5 writes as a part of processor_config.json, and version 4 as a file of its own."""
    whole = _json(folder, "processor_config.json", revision) or {}
    found = whole.get(part)
    return dict(found) if isinstance(found, dict) else _json(folder, file, revision)


def _bounds(saved: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Least and most pixels, as either version of transformers writes them."""
    size = saved.get("size") or {}
    return (
        size.get("shortest_edge") or saved.get("min_pixels"),
        size.get("longest_edge") or saved.get("max_pixels"),
    )


def _json(folder: str | Path, name: str, revision: str | None) -> dict[str, Any] | None:
    """A file of a model folder, or of what was downloaded of a hub id; None where there is none."""
    if not folder:
        return None
    found: Any = Path(folder) / name
    if not Path(folder).is_dir():
        found = try_to_load_from_cache(str(folder), name, revision=revision)
        found = Path(found) if isinstance(found, str) else None
    if found is None or not found.is_file():
        return None
    try:
        return dict(loads(found.read_bytes()))
    except (ValueError, TypeError):
        raise InputError(f"{found}: not a JSON object; copy the model folder again") from None


def fit_size(height: int, width: int, settings: PixelSettings) -> tuple[int, int]:
    """Nearest size with sides divisible by `factor` and area within the bounds (Qwen2-VL's "smart resize").

    Raises InputError for an aspect ratio over 200, which the model has never seen.
    """
    factor, low, high = settings.factor, settings.min_pixels, settings.max_pixels
    if max(height, width) > 200 * min(height, width):
        raise InputError(
            f"a picture of {width} x {height} pixels: the longer side may be at most 200 times the other"
        )
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > high:
        shrink = math.sqrt(height * width / high)
        h, w = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif h * w < low:
        grow = math.sqrt(low / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def patchify(
    frames: np.ndarray, settings: PixelSettings
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """uint8 `(F, H, W, 3)` -> float32 patches `(t * h * w, 3 * temporal * patch * patch)` and the grid `(t, h, w)`.

    A missing last frame of a temporal patch repeats the one before it, so an image is a clip of one frame.
    Patches are ordered so that the merge x merge patches of one token are neighbours.
    """
    height, width = fit_size(frames.shape[1], frames.shape[2], settings)
    if (height, width) != frames.shape[1:3]:
        resized = [
            Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC) for f in frames
        ]
        frames = np.stack([np.asarray(f) for f in resized])
    if short := -len(frames) % settings.temporal:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    p, m, tp = settings.patch, settings.merge, settings.temporal
    t, h, w = len(frames) // tp, height // p, width // p
    scale = 1 / (255 * np.array(settings.std, np.float32))
    shift = np.array(settings.mean, np.float32) / np.array(settings.std, np.float32)
    pixels = frames.astype(np.float32) * scale - shift
    pixels = pixels.reshape(t, tp, h // m, m, p, w // m, m, p, 3)
    pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    flat = np.ascontiguousarray(pixels.reshape(t * h * w, 3 * tp * p * p))
    return torch.from_numpy(flat), (t, h, w)


def square(
    pixels: np.ndarray, settings: PixelSettings
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """uint8 `(H, W, 3)` -> the one tile `(1, 3, S, S)` float32 and its grid of patches `(1, h, w)`."""
    side = settings.tile
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    scaled = np.asarray(picture).astype(np.float32) / 255
    scaled = (scaled - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    cells = side // settings.patch
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])), (
        1,
        cells,
        cells,
    )


@dataclass(frozen=True)
class Visual:
    """One picture or clip as the vision tower takes it. seconds: time one temporal patch spans (0 for images); times:
    the second at which each temporal patch of a clip is shown, the mean of its first and last frame's."""

    kind: str
    patches: torch.Tensor
    grid: tuple[int, int, int]
    seconds: float
    tokens: int
    times: tuple[float, ...] = ()


def patch_times(times: Sequence[float] | np.ndarray, temporal: int) -> tuple[float, ...]:
    """Seconds of frames -> of temporal patches, the mean of the first and the last; the last frame may repeat."""
    seconds = [float(t) for t in times]
    seconds += seconds[-1:] * (-len(seconds) % temporal)
    firsts, lasts = seconds[::temporal], seconds[temporal - 1 :: temporal]
    return tuple((a + b) / 2 for a, b in zip(firsts, lasts, strict=True))


@dataclass(frozen=True)
class Encoded:
    """One prompt, ready for the model. ids `(l,)` int64; positions `(3, l)` int64 of M-RoPE (text: all equal);
    next_position: of the first answer token; picture: key under which vision features may be shared."""

    ids: torch.Tensor
    positions: torch.Tensor
    next_position: int
    visuals: tuple[Visual, ...]
    picture: str

    def __len__(self) -> int:
        return self.ids.shape[0]


class Processor:
    """Chat messages and decoded media -> ids with one placeholder per visual token, and patches."""

    def __init__(
        self,
        tokenizer: Any,
        settings: PixelSettings,
        image_token: int,
        video_token: int | None,
        spell: Callable[[Visual], list[str | int]] = lambda visual: [visual.tokens],
    ) -> None:
        """spell: how a picture or clip is written, as in spelling.py."""
        self.tokenizer = tokenizer
        self.settings = settings
        self.placeholder = {"image": image_token}
        if video_token is not None:
            self.placeholder["video"] = video_token
        self.spell = spell
        self.marks = {k: tokenizer.convert_ids_to_tokens(i) for k, i in self.placeholder.items()}
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        self.end_ids = sorted(i for i in ends if i is not None and i != tokenizer.unk_token_id)
        self.end_id: int = tokenizer.convert_tokens_to_ids("<|im_end|>")
        if self.end_id is None or self.end_id == tokenizer.unk_token_id:
            self.end_id = tokenizer.eos_token_id

    def stop_at(self, tokens: Sequence[int]) -> None:
        """More end tokens, from the model's generation config."""
        self.end_ids = sorted({*self.end_ids, *tokens})

    def visual(
        self,
        kind: str,
        pixels: np.ndarray,
        fps: float | None,
        frame_pixels: int | None = None,
        times: Sequence[float] | np.ndarray | None = None,
    ) -> Visual:
        """pixels: uint8 `(H, W, 3)` or `(F, H, W, 3)`; fps of the frames given. frame_pixels: as in
        `PixelSettings.of`. times: the second at which each frame is shown; None: one after the other at `fps`.

        Raises InputError for a clip where the family's are not handled."""
        self._handled(kind)
        if self.settings.tile:
            patches, grid = square(pixels, self.settings)
            tokens = math.prod(grid) // self.settings.merge**2 + self.settings.besides
            return Visual(kind, patches, grid, 0.0, tokens)
        frames = pixels[None] if pixels.ndim == 3 else pixels
        patches, grid = patchify(frames, self.settings.of(kind, frame_pixels))
        return self._visual(kind, patches, grid, fps, len(frames), times)

    def planned(
        self,
        kind: str,
        frames: int,
        height: int,
        width: int,
        fps: float | None,
        times: Sequence[float] | np.ndarray | None = None,
    ) -> Visual:
        """What `visual` gives for frames of this size, without patches."""
        self._handled(kind)
        settings = self.settings.of(kind)
        if settings.tile:
            side = settings.tile // settings.patch
            tokens = side**2 // settings.merge**2 + settings.besides
            return Visual(kind, torch.empty(0), (1, side, side), 0.0, tokens)
        h, w = (side // settings.patch for side in fit_size(height, width, settings))
        grid = (-(-frames // settings.temporal), h, w)
        return self._visual(kind, torch.empty(0), grid, fps, frames, times)

    def _handled(self, kind: str) -> None:
        if kind == "video" and not self.settings.clips:
            raise InputError(
                "clips are handled for the models of Qwen alone; give this model pictures"
            )

    def _visual(
        self,
        kind: str,
        patches: torch.Tensor,
        grid: tuple[int, int, int],
        fps: float | None,
        frames: int,
        times: Sequence[float] | np.ndarray | None,
    ) -> Visual:
        tokens = math.prod(grid) // self.settings.merge**2
        if kind == "image":
            return Visual(kind, patches, grid, 0.0, tokens)
        # One second where the frames' rate is unknown, as transformers assumes.
        seconds = self.settings.temporal / fps if fps else 1.0
        if times is None:
            times = np.arange(frames) / (fps or UNKNOWN_FPS)
        return Visual(
            kind, patches, grid, seconds, tokens, patch_times(times, self.settings.temporal)
        )

    def text(self, messages: Sequence[Mapping[str, Any]], generation: bool = True) -> str:
        """The chat as the model's template writes it, placeholders not yet expanded."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation
            )
        )

    def ids(self, text: str, visuals: Sequence[Visual]) -> torch.Tensor:
        """Token ids `(l,)` of a rendered chat, each placeholder repeated for its visual's tokens.

        Raises InputError if the placeholders in the text are not those of the media.
        """
        raw, runs = self._raw(text, visuals)
        special, waiting = set(self.placeholder.values()), iter(runs)
        out: list[int] = []
        for token in raw:
            out.extend([token] * next(waiting) if token in special else [token])
        return torch.tensor(out, dtype=torch.long)

    def length(self, text: str, visuals: Sequence[Visual]) -> int:
        """How many ids `ids` gives. Raises what it raises."""
        raw, runs = self._raw(text, visuals)
        return len(raw) - len(runs) + sum(runs)

    def _raw(self, text: str, visuals: Sequence[Visual]) -> tuple[list[int], list[int]]:
        """Ids with one placeholder for each run of them, and the lengths of the runs; or an InputError."""
        found = [str(m.lastgroup) for m in self._pattern().finditer(text)]
        wanted = [v.kind for v in visuals]
        if found != wanted:
            raise InputError(
                f"the text has placeholders {found} and the media are "
                f"{wanted}: give one placeholder per image or video, in the same order"
            )
        runs: list[int] = []
        waiting = iter(visuals)

        def spelled(match: re.Match[str]) -> str:
            parts = self.spell(next(waiting))
            runs.extend(part for part in parts if isinstance(part, int))
            return "".join(part if isinstance(part, str) else match[0] for part in parts)

        written = self._pattern().sub(spelled, text)
        raw: list[int] = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        return raw, runs

    def _pattern(self) -> re.Pattern[str]:
        """Finds placeholders in a text; the name of the group that matched is the kind of medium."""
        return re.compile("|".join(f"(?P<{k}>{re.escape(mark)})" for k, mark in self.marks.items()))

    def answer_ids(self, answer: str) -> torch.Tensor:
        """`(T,)` ids of an answer with its end token."""
        raw = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return torch.tensor([*raw, self.end_id], dtype=torch.long)

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """The text of answer tokens up to the first end token."""
        values = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        for place, token in enumerate(values):
            if token in self.end_ids:
                values = values[:place]
                break
        return str(self.tokenizer.decode(values, skip_special_tokens=True)).strip()

    def answer_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool `(l,)`: tokens an assistant says (its end token included) in a ChatML conversation."""
        header = self.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        values, inside = ids.tolist(), False
        mask = torch.zeros(len(values), dtype=torch.bool)
        for i, token in enumerate(values):
            if inside:
                mask[i] = True
                inside = token != self.end_id
            elif values[max(0, i + 1 - len(header)) : i + 1] == header:
                inside = True
        return mask
