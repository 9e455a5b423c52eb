"""Media -> pixels: pictures through PIL, clips through video.py, arrays as they are."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from zipr1.core.errors import InputError
from zipr1.core.types import Media
from zipr1.data import video

# All that PIL may open of data: it knows forty more, of which EPS starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION = 0x0112  # EXIF: how the camera was held


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
    if isinstance(media.source, np.ndarray):
        _check_array(media.kind, media.source)
        if media.kind == "image":
            return media.source, None, None
        clip_fps = media.fps or 0.0
        asked = len(media.source), clip_fps, max_frames, fps, rule
        chosen = video.choose(*asked)
        frame_fps = clip_fps * len(chosen) / len(media.source) or None
        return media.source[chosen], frame_fps, video.times(*asked)
    if media.kind == "video":
        return video.read_timed(as_path(media.source), max_frames, fps, rule)
    return read_image(_encoded(media.source)), None, None


def check(media: Media) -> tuple[int, int, int, float]:
    """`Media.size` of a picture or clip: it is opened and decoded. Raises InputError if that fails."""
    if isinstance(media.source, np.ndarray):
        frames = media.source[None] if media.kind == "image" else media.source
        return (*frames.shape[:3], media.fps or 0.0)
    if media.kind == "video":
        return video.check(as_path(media.source))
    return (1, *check_image(_encoded(media.source)), 0.0)


def exists(media: Media) -> None:
    """Raise InputError if the file of a picture or clip is missing or empty. It is not decoded."""
    if isinstance(media.source, str | Path):
        if media.kind == "video":
            video.exists(media.source)
        else:
            _open(media.source, str(media.source)).close()


def as_path(source: Any) -> Path:
    """The file of a clip. Raises InputError for one stored in a row: decoders need files."""
    if isinstance(source, str | Path):
        return Path(source)
    raise InputError("a video inside the row; give the path of a file")


def _encoded(source: Any) -> Path | io.BytesIO:
    """Where PIL reads from: a path, or bytes, read from the dataset they are stored in."""
    if isinstance(source, str | Path):
        return Path(source)
    return io.BytesIO(source if isinstance(source, bytes) else source.read())


def _name(source: str | Path | io.BytesIO) -> str:
    return "image in the row" if isinstance(source, io.BytesIO) else str(source)


def read_image(source: str | Path | io.BytesIO, name: str | None = None) -> np.ndarray:
    """uint8 `(H, W, 3)`, upright by its EXIF orientation. name: for error messages; the path if it is a file."""
    name = name or _name(source)
    with _open(source, name) as picture:
        try:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(name, error) from error


def check_image(source: str | Path | io.BytesIO) -> tuple[int, int]:
    """Height and width. Raises InputError if the file is missing, empty, not a picture or cut off."""
    name = _name(source)
    with _open(source, name) as picture:
        try:
            sideways = picture.getexif().get(_ORIENTATION, 1) >= 5  # by a quarter turn
            width, height = picture.size
            # PIL's verify() does not decode the pixels of most formats: loading them finds files that are cut off.
            # draft() lets JPEG decode at an eighth of its size.
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(name, error) from error
    return (width, height) if sideways else (height, width)


def _open(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    if not isinstance(source, io.BytesIO):
        source = Path(source)
        if not source.is_file():
            raise InputError(f"{name}: no such image file; check the path or data.media_root")
        if source.stat().st_size == 0:
            raise InputError(f"{name}: the image file is empty (0 bytes); copy it again")
    try:
        with warnings.catch_warnings():
            # A picture too large to be safe is an error here, not a warning that nobody sees.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image; allowed: {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: too many pixels ({error}); scale it down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(name, error) from error


@contextlib.contextmanager
def only_known_formats() -> Iterator[None]:
    """Inside, PIL opens no format but those of `FORMATS`, whoever asks: around libraries that open the data's pictures
    themselves. For the whole process."""
    stock = Image.open

    def known(fp: Any, mode: str = "r", formats: Any = None) -> Image.Image:
        return stock(fp, mode, [f for f in FORMATS if formats is None or f in formats])  # type: ignore[arg-type]

    Image.open = known  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = stock


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: the image is damaged ({error}); copy it again")


def _check_array(kind: str, pixels: np.ndarray) -> None:
    dims = 3 if kind == "image" else 4
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        shape = "(H, W, 3)" if kind == "image" else "(F, H, W, 3)"
        raise InputError(
            f"{kind} in memory: {pixels.dtype} {pixels.shape}; allowed: uint8 {shape}, not empty; convert it"
        )
