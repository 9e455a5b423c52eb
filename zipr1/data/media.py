"""Media -> pixels: pictures through pictures.py, clips through video.py, arrays as they are.

What a chat asks of one medium (`Media.asked`) is honoured here as far as frames are chosen; sizes are the processor's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.types import Media
from zipr1.data import video
from zipr1.data.pictures import check_image, open_image, read_image

_NO_FRAMES = "a clip of no frames; give at least one picture"


def load_media(
    media: Media,
    max_frames: int | None,
    fps: float | None = None,
    rule: video.FrameRule = video.QWEN2_FRAMES,
) -> tuple[np.ndarray, float | None]:
    """Pixels uint8 `(H, W, 3)` and None, or `(F, H, W, 3)` with F <= `max_frames` and their frames per second.

    fps, rule: which frames of a clip, as in `video.choose`.
    """
    pixels, frame_fps, _ = load_timed(media, max_frames, fps, rule)
    return pixels, frame_fps


def load_timed(
    media: Media,
    max_frames: int | None,
    fps: float | None = None,
    rule: video.FrameRule = video.QWEN2_FRAMES,
) -> tuple[np.ndarray, float | None, np.ndarray | None]:
    """What `load_media` gives, and the second `(F,)` float64 at which each frame of a clip is shown; None for pictures
    and where the rate is unknown."""
    source = media.source
    if media.kind == "image":
        if isinstance(source, np.ndarray):
            _check_array(media.kind, source)
            return source, None, None
        return read_image(_encoded(source)), None, None
    most, fps, rule = limits(media, max_frames, fps, rule)
    if not isinstance(source, np.ndarray | tuple):
        return video.read_timed(as_path(source), most, fps, rule)
    if isinstance(source, np.ndarray):
        _check_array(media.kind, source)
    total, clip_fps = len(source), media.fps or 0.0
    if not total:
        raise InputError(_NO_FRAMES)
    chosen = video.choose(total, clip_fps, most, fps, rule)
    frames = source[chosen] if isinstance(source, np.ndarray) else _stacked(source, chosen)
    times = chosen / clip_fps if clip_fps > 0 else None
    return frames, clip_fps * len(chosen) / total or None, times


def limits(
    media: Media, max_frames: int | None, fps: float | None, rule: video.FrameRule
) -> tuple[int | None, float | None, video.FrameRule]:
    """The most frames that are read of a clip, at which rate and by which rule: what is asked of it, else the given."""
    asked = media.asked
    if asked.frames is not None:
        return None, None, replace(rule, number=asked.frames)
    if asked.min_frames is not None:
        rule = replace(rule, least=asked.min_frames)
    most = max_frames if asked.max_frames is None else asked.max_frames
    return most, fps if asked.fps is None else asked.fps, rule


def check(media: Media) -> tuple[int, int, int, float]:
    """`Media.size` of a picture or clip: it is opened and decoded. Raises InputError if that fails."""
    source = media.source
    if media.kind == "image":
        if isinstance(source, np.ndarray):
            return (1, *source.shape[:2], 0.0)
        return (1, *check_image(_encoded(source)), 0.0)
    if isinstance(source, np.ndarray):
        size = (*source.shape[:3], media.fps or 0.0)
    elif isinstance(source, tuple):
        height, width = _one_size([check(Media("image", frame))[1:3] for frame in source])
        size = (len(source), height, width, media.fps or 0.0)
    else:
        size = video.check(as_path(source))
    # More frames than there are may not be asked for.
    video.choose(size[0], size[3], *limits(media, None, None, video.QWEN2_FRAMES))
    return size


def exists(media: Media) -> None:
    """Raise InputError if the file of a picture or clip is missing or empty. It is not decoded."""
    for source in media.source if isinstance(media.source, tuple) else (media.source,):
        if isinstance(source, str | Path):
            if media.kind == "video" and not isinstance(media.source, tuple):
                video.exists(source)
            else:
                open_image(source, str(source)).close()


def as_path(source: Any) -> Path:
    """The file of a clip. Raises InputError for one stored in a row: decoders need files."""
    if isinstance(source, str | Path):
        return Path(source)
    raise InputError("a video inside the row; give the path of a file")


def _stacked(frames: Sequence[Any], chosen: np.ndarray) -> np.ndarray:
    """The chosen ones of pictures, `(F, H, W, 3)`."""
    read = [load_timed(Media("image", frames[i]), 1)[0] for i in chosen]
    _one_size([frame.shape[:2] for frame in read])
    return np.stack(read)


def _one_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of all frames. Raises InputError where they differ, or there is none."""
    if not sizes:
        raise InputError(_NO_FRAMES)
    for number, (height, width) in enumerate(sizes, 1):
        if (height, width) != sizes[0]:
            raise InputError(
                f"a clip of pictures of different sizes: the first is {sizes[0][1]} x {sizes[0][0]} and number "
                f"{number} is {width} x {height}; scale them to one size"
            )
    return sizes[0]


def _encoded(source: Any) -> Path | io.BytesIO:
    """Where PIL reads from: a path, or bytes, read from the dataset they are stored in."""
    if isinstance(source, str | Path):
        return Path(source)
    return io.BytesIO(source if isinstance(source, bytes) else source.read())


def _check_array(kind: str, pixels: np.ndarray) -> None:
    dims = 3 if kind == "image" else 4
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        shape = "(H, W, 3)" if kind == "image" else "(F, H, W, 3)"
        raise InputError(
            f"{kind} in memory: {pixels.dtype} {pixels.shape}; allowed: uint8 {shape} in the order red, green, blue, "
            "not empty; convert it, or give pictures of PIL"
        )
