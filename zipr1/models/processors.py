"""Prompts and pixels -> token ids, patches and grids, for models that read Qwen2-VL's input layout.

Not transformers' processor classes: those need torchvision for video. Pictures and clips share one path here,
PIL for resizing and numpy for the rest, and give the same patches as transformers' PIL image processor (tested).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.text import reason
from zipr1.core.types import NOTHING, Asked
from zipr1.models.pixels import PixelSettings
from zipr1.models.tiles import cut, laid_out
from zipr1.models.visual import UNKNOWN_FPS, Visual, patch_times


def fit_size(height: int, width: int, settings: PixelSettings) -> tuple[int, int]:
    """Nearest size with sides divisible by `factor` and area within the bounds (the "smart resize" of Qwen2-VL, and of
    Qwen3-VL where frames share the bounds).

    Raises InputError for an aspect ratio over 200, which the model has never seen.
    """
    factor, low, high = settings.factor, settings.min_pixels, settings.max_pixels
    height, width = settings.size or (height, width)
    frames, counted = 1, 1
    if settings.shared:
        # A single frame is a clip of two alike.
        frames = max(settings.shared, settings.temporal)
        counted = round(frames / settings.temporal) * settings.temporal
        if min(height, width) < factor:
            grow = max(factor / height, factor / width)
            height, width = int(height * grow), int(width * grow)
    if max(height, width) > 200 * min(height, width):
        raise InputError(
            f"a picture of {width} x {height} pixels: the longer side may be at most 200 times the other"
        )
    h, w = (round(side / factor) * factor for side in (height, width))
    if counted * h * w > high:
        shrink = math.sqrt(frames * height * width / high)
        h, w = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif counted * h * w < low:
        grow = math.sqrt(low / (frames * height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def resized(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """uint8 `(H, W, 3)` -> `(height, width, 3)`, by PIL's filter of that number.

    First across, then down, in two calls. Both round to 8 bits, so the order shows: torchvision and Pillow up to 12
    take this one, Pillow 13 whichever is cheaper, and strong edges then differ by up to 20 levels.
    """
    kind = Image.Resampling(resample)
    across = Image.fromarray(pixels).resize((width, pixels.shape[0]), kind)
    return np.asarray(across.resize((width, height), kind))


def patchify(
    frames: np.ndarray, settings: PixelSettings
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """uint8 `(F, H, W, 3)` -> float32 patches `(t * h * w, 3 * temporal * patch * patch)` and the grid `(t, h, w)`.

    A missing last frame of a temporal patch repeats the one before it, so an image is a clip of one frame.
    Patches are ordered so that the merge x merge patches of one token are neighbours.
    """
    height, width = fit_size(frames.shape[1], frames.shape[2], settings)
    if (height, width) != frames.shape[1:3]:
        frames = np.stack([resized(f, height, width, settings.resample) for f in frames])
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


def squares(pixels: np.ndarray, settings: PixelSettings, alone: bool) -> torch.Tensor:
    """uint8 `(H, W, 3)` -> tiles `(n, 3, S, S)` float32. alone: as in `Processor.visual`."""
    side, resample = settings.tile, settings.resample
    tiles, _ = cut(pixels, settings.cuts, side, resample, resized, settings.mean, alone)
    scaled = np.stack(tiles).astype(np.float32) / 255
    scaled = (scaled - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))


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
        times: Sequence[float] | np.ndarray | None = None,
        *,
        frame_pixels: int | None = None,
        asked: Asked = NOTHING,
        alone: bool = True,
    ) -> Visual:
        """pixels: uint8 `(H, W, 3)` or `(F, H, W, 3)`; fps of the frames given. times: the second at which each frame
        is shown; None: one after the other at `fps`. frame_pixels, asked: as in `PixelSettings.of`. alone: the only
        picture of its prompt, which matters where such ones are cut up alone.

        Raises InputError for a clip where the family's are not handled."""
        self._handled(kind)
        frames = pixels[None] if pixels.ndim == 3 else pixels
        settings = self.settings.of(kind, frame_pixels, len(frames), asked)
        if settings.tile:
            tiles = squares(pixels, self.settings, alone)
            return self._tiled(kind, tiles, pixels.shape[0], pixels.shape[1], alone)
        patches, grid = patchify(frames, settings)
        return self._visual(kind, patches, grid, fps, len(frames), times)

    def planned(
        self,
        kind: str,
        frames: int,
        height: int,
        width: int,
        fps: float | None,
        times: Sequence[float] | np.ndarray | None = None,
        asked: Asked = NOTHING,
        alone: bool = True,
    ) -> Visual:
        """What `visual` gives for frames of this size, without patches."""
        self._handled(kind)
        settings = self.settings.of(kind, frames=frames, asked=asked)
        if settings.tile:
            return self._tiled(kind, torch.empty(0), height, width, alone)
        h, w = (side // settings.patch for side in fit_size(height, width, settings))
        grid = (-(-frames // settings.temporal), h, w)
        return self._visual(kind, torch.empty(0), grid, fps, frames, times)

    def _tiled(
        self, kind: str, patches: torch.Tensor, height: int, width: int, alone: bool
    ) -> Visual:
        settings, side = self.settings, self.settings.tile
        grid = (1, side // settings.patch, side // settings.patch)
        tiles = settings.cuts.grid(height, width, side)
        tokens = (math.prod(tiles) + 1) * math.prod(grid) // settings.merge**2
        if settings.cuts.canvases and alone:
            tokens += laid_out(height, width, settings.cuts, side, grid[1])
        else:
            tokens += settings.besides
        return Visual(kind, patches, grid, 0.0, tokens, tiles=tiles, size=(height, width))

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
        # One second where the frames' rate is unknown: two frames a second, as in Qwen's own code.
        seconds = self.settings.temporal / fps if fps else 1.0
        if times is None:
            times = np.arange(frames) / (fps or UNKNOWN_FPS)
        return Visual(
            kind, patches, grid, seconds, tokens, patch_times(times, self.settings.temporal)
        )

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        generation: bool = True,
        **options: Any,
    ) -> str:
        """The chat as the model's template writes it, placeholders not yet expanded. options: of transformers'
        `apply_chat_template`, and variables of the template.

        Raises InputError where the model has no template, or its template refuses the chat.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                "the model has no chat template (chat_template.jinja, chat_template.json, or a key of "
                "tokenizer_config.json); copy one of these files from a model that answers chats"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation, **options
                )
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the chat template refuses the chat ({reason(error)})") from None

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
