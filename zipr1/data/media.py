"""Media -> pixels: pictures through pictures.py, clips through video.py, arrays as they are.

What a chat asks of one medium (`Media.asked`) is honoured here as far as frames are chosen; sizes are the processor's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.core.types import Media
from zipr1.data import video
from zipr1.data.pictures import check_image, open_image, read_image


def load_media(
    media: Media, max_frames: int, fps: float | None = None
) -> tuple[np.ndarray, float | None]:
    """Pixels uint8 `(H, W, 3)` and None, or `(F, H, W, 3)` with F <= `max_frames` and their frames per second.

    fps: at which clips are read, at most their own; None takes all of a clip's frames up to `max_frames`.
    """
    pixels, frame_fps, _ = load_timed(media, max_frames, fps)
    return pixels, frame_fps


def load_timed(
    media: Media, max_frames: int, fps: float | None = None
) -> tuple[np.ndarray, float | None, np.ndarray | None]:
    """What `load_media` gives, and the second `(F,)` float64 at which each frame of a clip is shown; None for pictures
    and where the rate is unknown."""
    source = media.source
    if media.kind == "image":
        if isinstance(source, np.ndarray):
            _check_array(media.kind, source)
            return source, None, None
        return read_image(_encoded(source)), None, None
    most, fps = limits(media, max_frames, fps)
    if not isinstance(source, np.ndarray | tuple):
        frames, clip_fps, times = video.read_timed(as_path(source), most, fps)
        _check_number(media, len(frames))
        return frames, clip_fps, times
    if isinstance(source, np.ndarray):
        _check_array(media.kind, source)
    total, clip_fps = len(source), media.fps or 0.0
    chosen = video.choose(total, clip_fps, most, fps) if total else np.arange(0)
    _check_number(media, len(chosen))
    frames = source[chosen] if isinstance(source, np.ndarray) else _stacked(source, chosen)
    return frames, clip_fps * len(chosen) / total or None, video.times(total, clip_fps, most, fps)


def limits(media: Media, max_frames: int, fps: float | None) -> tuple[int, float | None]:
    """The most frames that are read of a clip, and at which rate: what is asked of it, else what is given."""
    asked = media.asked
    if asked.frames is not None:
        return asked.frames, None
    most = max_frames if asked.max_frames is None else asked.max_frames
    return most, fps if asked.fps is None else asked.fps


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
    _check_number(media, min(size[0], media.asked.frames or size[0]))
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
        raise InputError("a clip of no frames; give at least one picture")
    for number, (height, width) in enumerate(sizes, 1):
        if (height, width) != sizes[0]:
            raise InputError(
                f"a clip of pictures of different sizes: the first is {sizes[0][1]} x {sizes[0][0]} and number "
                f"{number} is {width} x {height}; scale them to one size"
            )
    return sizes[0]


def _check_number(media: Media, frames: int) -> None:
    """Raise InputError for a clip with fewer frames than are asked of it, or none."""
    if not frames:
        raise InputError("a clip of no frames; give at least one picture")
    if media.asked.frames is not None and frames != media.asked.frames:
        raise InputError(
            f"num_frames is {media.asked.frames} and the clip has {frames} frames; ask for at most those"
        )


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
