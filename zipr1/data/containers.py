"""What a clip's file says of itself, whatever decodes it: whether all of it is there, and how its frames are turned."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zipr1.core.errors import InputError

# What FFmpeg calls the formats that are read: each is one file. Others, such as playlists (HLS, DASH, concat), SDP and
# patterns of names, make it open more files, and addresses. Pictures are refused by name, by who asked for a clip.
FORMATS = (
    "mov", "matroska", "avi", "flv", "asf", "mpeg", "mpegts", "mpegvideo", "ogg", "mxf", "nut", "ivf", "gif", "apng",
    "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe",
)  # fmt: skip
# For its `avformat_open_input`: no format but these, and nothing but files on this machine.
ONE_FILE = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}

# Boxes of an mp4 or mov file that hold its index and its frames.
_BOXES = (b"moov", b"moof", b"mdat")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
# Some writers forget the last byte or two of padding.
_SLACK = 16

# The linear part of a display matrix, a, b, c and d in its order: x' = a x + c y and y' = b x + d y, y downwards.
Turn = tuple[int, int, int, int]
UPRIGHT: Turn = (1, 0, 0, 1)


def check_whole(path: Path) -> bool:
    """Whether the file begins as an mp4, mov, mkv, webm or avi file does. Raises InputError for one that is shorter
    than it says itself: decoders take what is there for a shorter clip."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            said = 8 + int.from_bytes(head[4:8], "little")
            end = 0 if said > 2**32 - 16 else said  # written to a pipe: not known
        elif head[:4] == _EBML:
            end = _matroska_end(head)
        elif head[4:8] in (b"ftyp", *_BOXES):
            end = _last_box_end(file)
        else:
            return False
        size = file.seek(0, 2)
    if end > size + _SLACK:
        raise InputError(
            f"{path}: cannot be read as a video (it is cut off: it says that it has {end:,} bytes and has {size:,}); "
            "copy or download it again"
        )
    return True


def _matroska_end(head: bytes) -> int:
    """Where the one segment ends; 0 where that is not said."""
    length, start = _varying(head, 4)
    at = start + (length or 0)
    if length is None or head[at : at + 4] != _SEGMENT:
        return 0
    length, start = _varying(head, at + 4)
    return 0 if length is None else start + length


def _varying(data: bytes, at: int) -> tuple[int | None, int]:
    """A number of as many bytes as its first one says, None for the reserved `not known`; and where it ends."""
    if at >= len(data) or not data[at]:
        return None, at
    size = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + size]) & (2 ** (7 * size) - 1)
    return (None if value == 2 ** (7 * size) - 1 else value), at + size


def _last_box_end(file: BinaryIO) -> int:
    """The end of the last of an mp4 file's boxes that hold something."""
    at = end = 0
    size = file.seek(0, 2)
    while at < size:
        file.seek(at)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        if length == 1:
            length = int.from_bytes(head[8:16])
        if length < 8:  # 0: up to the end of the file
            break
        at += length
        if head[4:8] in _BOXES:
            end = at
    return end


def turn_of(frame: Any) -> Turn:
    """How a frame of PyAV is to be turned to be seen upright. Angles that are no quarter turns are left alone, as
    decord leaves them."""
    from av.sidedata.sidedata import Type

    # By its kind: PyAV 18 goes through the entries themselves, 19 through their kinds.
    said = frame.side_data.get(Type.DISPLAYMATRIX)
    if said is not None:
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(said))
        scale = max(map(abs, (a, b, c, d))) or 1
        turn = tuple(round(value / scale, 2) for value in (a, b, c, d))
        if sorted(map(abs, turn)) == [0, 0, 1, 1] and abs(turn[0]) == abs(turn[3]):
            return tuple(map(int, turn))  # type: ignore[return-value]
    return UPRIGHT


def turned(pixels: np.ndarray, turn: Turn) -> np.ndarray:
    """`(H, W, 3)` as it is to be seen, `(W, H, 3)` after a quarter turn."""
    a, b, c, d = turn
    if b:
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    return np.ascontiguousarray(pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])


def is_mirrored(turn: Turn) -> bool:
    a, b, c, d = turn
    return a * d - b * c < 0
