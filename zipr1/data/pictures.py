"""Pictures -> uint8 `(H, W, 3)`: the one reader of them, for rows, chats, benchmarks, profiles and exports.

Upright by their EXIF orientation, transparent parts over white as in transformers' and Qwen's own utilities, and levels
of more than eight bits scaled to eight, where PIL alone would cut them off at 255.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from zipr1.core.errors import InputError

log = logging.getLogger("zipr1")

# All that PIL may open of data: it knows forty more, of which EPS starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION = 0x0112  # EXIF: how the camera was held
_BITS_PER_SAMPLE = 258  # TIFF
_DEEP = ("I", "F")  # PIL's modes of levels that are no bytes begin so
# Modes that every PIL turns into RGB; of the others a check has to try.
_CERTAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def rgb(picture: Image.Image, name: str = "a picture in memory") -> np.ndarray:
    """uint8 `(H, W, 3)` of PIL's picture. Raises InputError for one that is damaged or has no such levels."""
    try:
        bits = _bits(picture)  # a copy that is turned no longer knows it
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(_DEEP):
            return _of_levels(picture, bits, name)
        picture.load()
        return _over_white(picture, name)
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(name, error) from error


def _over_white(picture: Image.Image, name: str) -> np.ndarray:
    try:
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(paper, picture)
        return np.asarray(picture.convert("RGB"))
    except ValueError:
        raise InputError(
            f"{name}: its colours are {picture.mode}, which PIL does not turn into RGB; save it as RGB"
        ) from None


def _of_levels(picture: Image.Image, bits: int | None, name: str) -> np.ndarray:
    """A grey picture of 10 to 32 bits or of floats, black to white. bits: of a level, where that is certain."""
    levels = np.asarray(picture)
    low, high = (float(levels.min()), float(levels.max())) if levels.size else (0.0, 0.0)
    if bits is not None:
        top = 2.0**bits - 1
    elif low >= 0 and high <= 1 and picture.mode == "F":
        # The same pixels as of a file of 16 bits.
        levels, top = np.floor(levels.astype(np.float64) * 65535), 65535.0
    elif low >= 0 and high <= 255 and np.array_equal(levels, np.round(levels)):
        top = 255.0
    elif low >= 0 and high <= 65535 and picture.mode == "I":
        top = 65535.0
    else:
        allowed = "0 to 1, or whole ones of 0 to 255" if picture.mode == "F" else "0 to 65,535"
        raise InputError(
            f"{name}: has levels of {low:g} to {high:g}; allowed: {allowed}; scale them"
        )
    if bits == 16 and 255 < high < 4096:
        _tell_of_dark(name, int(high))
    grey = np.round(levels * (255 / top)).clip(0, 255).astype(np.uint8)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(levels == clear, np.uint8(255), grey)
    return np.repeat(grey[..., None], 3, axis=-1)


@lru_cache(maxsize=1)
def _tell_of_dark(name: str, high: int) -> None:
    """Once: 10 and 12 bits are often stored in 16 without saying so, and nothing in the file tells them apart."""
    log.warning(
        "%s: a picture of 16 bits whose levels end at %d of 65535 becomes nearly black; if it has fewer bits in truth, "
        "scale its levels (and those of others like it)",
        name,
        high,
    )


def _bits(picture: Image.Image) -> int | None:
    """Of a grey level up to 16 bits, as the file says; None for others."""
    if not picture.mode.startswith("I;16") and (picture.mode, picture.format) != ("I", "PNG"):
        return None
    said = getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    return int(said[0] if isinstance(said, tuple) else said)


def read_image(source: str | Path | io.BytesIO, name: str | None = None) -> np.ndarray:
    """What `rgb` gives of a file. name: for error messages; the path if it is a file."""
    name = name or _name(source)
    with open_image(source, name) as picture:
        return rgb(picture, name)


def check_image(source: str | Path | io.BytesIO) -> tuple[int, int]:
    """Height and width. Raises InputError if the file is missing, empty, not a picture or cut off, or where `rgb`
    would."""
    name = _name(source)
    with open_image(source, name) as picture:
        try:
            # By a quarter turn; PIL tells the size of a TIFF as it is seen.
            sideways = picture.format != "TIFF" and picture.getexif().get(_ORIENTATION, 1) >= 5
            width, height = picture.size
            if picture.mode not in _CERTAIN:
                rgb(picture, name)
            # PIL's verify() does not decode the pixels of most formats: loading them finds files that are cut off.
            # draft() lets JPEG decode at an eighth of its size.
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(name, error) from error
    return (width, height) if sideways else (height, width)


def open_image(source: str | Path | io.BytesIO, name: str) -> Image.Image:
    """PIL's picture, not yet decoded. Raises InputError for a file that is missing, empty or no picture."""
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


def _name(source: str | Path | io.BytesIO) -> str:
    return "image in the row" if isinstance(source, io.BytesIO) else str(source)


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: the image is damaged ({error}); copy it again")
