"""Media -> pixels: pictures through PIL, clips through video.py, arrays as they are."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from zipr1.data import video
from zipr1.episode import Media
from zipr1.errors import InputError


def load_media(
    media: Media, max_frames: int, fps: float | None = None
) -> tuple[np.ndarray, float | None]:
    """Pixels uint8 `(H, W, 3)` and None, or `(F, H, W, 3)` with F <= `max_frames` and their frames per second.

    fps: wanted from clips; None takes all of a clip's frames up to `max_frames`.
    """
    if isinstance(media.source, np.ndarray):
        _check_array(media.kind, media.source)
        if media.kind == "image":
            return media.source, None
        own_fps = media.fps or 0.0
        rows = video.choose(len(media.source), own_fps, max_frames, fps)
        return media.source[rows], own_fps * len(rows) / len(media.source) or None
    if media.kind == "video":
        return video.read(media.source, max_frames, fps)
    return read_image(media.source), None


def read_image(source: str | Path | io.BytesIO, name: str | None = None) -> np.ndarray:
    """uint8 `(H, W, 3)`, turned as its EXIF says. name: what errors call it; the path if it is a file."""
    name = name or str(source)
    with _open(source, name) as picture:
        try:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(name, error) from error


def check_image(path: str | Path) -> None:
    """Raise InputError if the file is missing, empty, not a picture or cut off; pixels are not kept."""
    with _open(path, str(path)) as picture:
        try:
            # PIL's verify() does not look at the pixels of most formats: loading them finds files that are cut off.
            # draft() lets JPEG decode at an eighth of its size.
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(str(path), error) from error


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
            return Image.open(source)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not an image that PIL can read; use PNG, JPEG or WebP"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: too many pixels ({error}); scale it down") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: the image is damaged ({error}); copy it again")


def _check_array(kind: str, pixels: np.ndarray) -> None:
    dims = 3 if kind == "image" else 4
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] != 3 or not pixels.size:
        shape = "(H, W, 3)" if kind == "image" else "(F, H, W, 3)"
        raise InputError(
            f"{kind} in memory: {pixels.dtype} {pixels.shape}; allowed: uint8 {shape}, not empty; convert it"
        )
