"""Clips: the only place that knows decord (reading) and PyAV (writing, and reading where decord is missing)."""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from zipr1.core.errors import InputError
from zipr1.data.containers import ONE_FILE, check_whole, is_mirrored, turn_of, turned

log = logging.getLogger("zipr1")

ENCODER = "libx264 yuv444p crf 14 ultrafast"  # full chroma: small coloured digits keep their colour
_HELP = "check it with ffprobe, or encode it again (H.264 mp4 is read everywhere)"


@dataclass(frozen=True)
class FrameRule:
    """How a family of models picks the frames of a clip; transformers' processors pick the same ones.

    even: an even number of them, each at the beginning of its part of the clip (Qwen2-VL, Qwen2.5-VL); else any number,
    evenly from the first frame to the last (Qwen3-VL). least, most: frames that are read at a rate, where the clip has
    them. fps: the rate where nobody asks for one; None: all frames. number: exactly so many, where nobody asks for a
    rate.
    """

    even: bool = True
    least: int = 4
    most: int = 768
    fps: float | None = None
    number: int | None = None


QWEN2_FRAMES = FrameRule()


@lru_cache(maxsize=1)
def reader() -> tuple[str, str]:
    """(`decord` or `pyav`, why): decord where it can be imported, else PyAV; logged once."""
    try:
        importlib.import_module("decord")
    except (ImportError, OSError) as error:
        reason = f"decord cannot be imported ({_first_line(error)}); clips are read by PyAV, slower"
        _warn_once(reason, reason)
        return "pyav", reason
    return "decord", "decord is installed"


def read(
    path: str | Path,
    max_frames: int | None = None,
    fps: float | None = None,
    rule: FrameRule = QWEN2_FRAMES,
) -> tuple[np.ndarray, float]:
    """Frames uint8 `(F, H, W, 3)` spread evenly over the whole clip, and how many of them make a second.

    max_frames, fps, rule: as in `choose`.
    """
    frames, frame_fps, _ = read_timed(path, max_frames, fps, rule)
    return frames, frame_fps


def read_timed(
    path: str | Path,
    max_frames: int | None = None,
    fps: float | None = None,
    rule: FrameRule = QWEN2_FRAMES,
) -> tuple[np.ndarray, float, np.ndarray | None]:
    """What `read` gives, and the second `(F,)` float64 of the clip at which each frame is shown; None where the file
    does not tell its rate."""
    frames, chosen, clip_fps, total = read_chosen(path, max_frames, fps, rule)
    times = chosen / clip_fps if clip_fps > 0 else None
    return frames, clip_fps * len(frames) / total, times


def read_chosen(
    path: str | Path,
    max_frames: int | None = None,
    fps: float | None = None,
    rule: FrameRule = QWEN2_FRAMES,
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Frames uint8 `(F, H, W, 3)`, which of the clip's they are `(F,)` int64, the clip's own frames per second (0 where
    the file does not tell), and how many frames it has. max_frames, fps, rule: as in `choose`."""
    frames, clip_fps, total = _decode(
        path, lambda total, clip_fps: choose(total, clip_fps, max_frames, fps, rule)
    )
    return frames, choose(total, clip_fps, max_frames, fps, rule), clip_fps, total


def check(path: str | Path) -> tuple[int, int, int, float]:
    """A clip's frames, height, width and frames per second. Its first and last frames are decoded, so that a file that
    is cut off or damaged in between raises InputError here."""
    frames, clip_fps, total = _decode(path, lambda total, _: np.unique([0, total - 1]))
    return total, frames.shape[1], frames.shape[2], clip_fps


def exists(path: str | Path) -> Path:
    """The path. Raises InputError if there is no file, or an empty one."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such video file; check the path or data.media_root")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the video file is empty (0 bytes); copy or download it again")
    return path


def _pyav() -> Any:
    """The module. Raises InputError where it cannot be imported."""
    try:
        import av
    except (ImportError, OSError) as error:
        raise InputError(
            f"clips are read by PyAV, which cannot be imported ({_first_line(error)}): pip install av"
        ) from None
    return av


def write(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode uint8 `(F, H, W, 3)` to H.264 mp4 in one thread (5 ms for 12 frames of 96 px)."""
    av = _pyav()
    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": "14", "preset": "ultrafast", "threads": "1"},
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def choose(
    total: int,
    clip_fps: float,
    max_frames: int | None = None,
    fps: float | None = None,
    rule: FrameRule = QWEN2_FRAMES,
) -> np.ndarray:
    """Ascending indices, int64, of the frames to read, by the model family's rule.

    total, clip_fps: the clip's frames and its rate, 0 where that is not known and nothing is read at a rate.
    max_frames: the most that come back. fps: to read at, at most the clip's own; None: the rule's. Raises InputError
    for a `rule.number` of frames that the clip does not have.
    """
    rate = (fps or rule.fps) if clip_fps > 0 else None
    number = total
    if rule.number is not None and fps is None:
        number = 2 * round(rule.number / 2) if rule.even else rule.number
        if number > total:
            raise InputError(
                f"num_frames asks for {number} frames and the clip has {total}; ask for fewer"
            )
    elif rate is not None:
        number = min(max(int(total / clip_fps * rate), rule.least), rule.most, total)
    if max_frames is not None:
        number = min(number, max_frames)
    if rule.even and (number < total or rate is not None):
        number -= number % 2
    number = max(1, number)
    if rule.even:
        return np.arange(number, dtype=np.int64) * total // number
    return np.linspace(0, total - 1, number).round().astype(np.int64)


def times(
    total: int,
    clip_fps: float,
    max_frames: int | None = None,
    fps: float | None = None,
    rule: FrameRule = QWEN2_FRAMES,
) -> np.ndarray | None:
    """Seconds `(F,)` float64 of the frames that `choose` gives; None for an unknown rate."""
    if clip_fps <= 0:
        return None
    return choose(total, clip_fps, max_frames, fps, rule) / clip_fps


# (number of a clip's frames, its frames per second) -> ascending indices of the frames to decode.
ChooseFrames = Callable[[int, float], np.ndarray]


def _decode(path: str | Path, choose_frames: ChooseFrames) -> tuple[np.ndarray, float, int]:
    """Chosen frames uint8 `(F, H, W, 3)`, the clip's own frames per second, and how many frames it has."""
    # Whole, for FFmpeg would take `a:b` for the protocol `a`.
    path = exists(path).absolute()
    known = check_whole(path)
    # decord asks no list of formats: it gets files alone that can be nothing else, and that PyAV opens.
    if reader()[0] != "decord" or not known or not _is_for_decord(path):
        return _read_pyav(path, choose_frames)
    from decord.base import DECORDError

    # decord 0.6 brings an old FFmpeg (no AV1), and fails on frames 16 or 48 px wide.
    try:
        return _read_decord(path, choose_frames)
    except (DECORDError, RuntimeError, IndexError, OSError) as error:
        reason = _first_line(error)
    decoded = _read_pyav(path, choose_frames)
    _warn_of_fallback(path, reason)
    return decoded


def _warn_of_fallback(path: Path, reason: str) -> None:
    """Say that PyAV reads what decord cannot: once for each reason of decord's, since a whole data set can be so."""
    # decord puts the time before its message and names the file in it.
    reason = re.sub(r"^\[\d+:\d+:\d+\] ", "", reason).replace(str(path), "FILE")
    _warn_once(
        reason,
        f"{path}: decord cannot read it ({reason}); PyAV reads it and others like it, which can be slower",
    )


_reasons_told: set[str] = set()
_lock = threading.Lock()  # several threads read clips


def _warn_once(reason: str, message: str) -> None:
    with _lock:
        if reason in _reasons_told:
            return
        _reasons_told.add(reason)
    log.warning("%s", message)


def _read_decord(path: Path, choose_frames: ChooseFrames) -> tuple[np.ndarray, float, int]:
    import decord

    clip = decord.VideoReader(str(path), num_threads=1)
    total = len(clip)
    if total == 0:
        raise InputError(f"{path}: the video has no frames; {_HELP}")
    first, last = clip.get_frame_timestamp([0, total - 1])[:, 0].tolist()
    clip_fps = _rate(float(clip.get_avg_fps()), total, first, last)
    return clip.get_batch(choose_frames(total, clip_fps).tolist()).asnumpy(), clip_fps, total


def _read_pyav(path: Path, choose_frames: ChooseFrames) -> tuple[np.ndarray, float, int]:
    av = _pyav()
    try:
        with _opened(path) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{path}: the file has no video stream; {_HELP}")
            if container.format.name.endswith("_pipe"):
                raise InputError(f"{path}: a picture and no clip; give a clip's frames as a list")
            # Containers often do not say how many frames they hold: count them, then keep only the chosen ones.
            times = [frame.time for frame in container.decode(stream)]
            total = len(times)
            if total == 0:
                raise InputError(f"{path}: the video has no frames; {_HELP}")
            clip_fps = _rate(float(stream.average_rate or 0), total, times[0], times[-1])
        chosen = set(choose_frames(total, clip_fps).tolist())
        with _opened(path) as container:
            frames = [
                turned(frame.to_ndarray(format="rgb24"), turn_of(frame))
                for index, frame in enumerate(container.decode(container.streams.best("video")))
                if index in chosen
            ]
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as a video ({_first_line(error)}); {_HELP}"
        ) from error
    return np.stack(frames), clip_fps, total


def _opened(path: Path) -> Any:
    """A file as PyAV sees it, which opens that one file alone. Raises InputError for a format that is not read."""
    av = _pyav()

    try:
        return av.open(str(path), container_options=ONE_FILE)
    except av.ArgumentError as error:
        raise InputError(
            f"{path}: no kind of file that is read as a clip; mp4, mov, mkv, webm, avi, flv, wmv, mpg, ts, ogv and gif "
            "are, playlists are not; encode it again (H.264 mp4 is read everywhere)"
        ) from error


def _rate(said: float, total: int, first: float | None, last: float | None) -> float:
    """Frames a second of a clip: what its file says, unless the times of its first and last frame (seconds) say another
    rate by more than a tenth, as where frames were dropped and the rate of the camera is still written there."""
    if total < 2 or first is None or last is None or last <= first:
        return said
    measured = (total - 1) / (last - first)
    return said if abs(said - measured) <= measured / 10 else measured


def _is_for_decord(path: Path) -> bool:
    """Whether PyAV opens the clip, and its frames are not to be mirrored: decord knows quarter turns alone."""
    av = _pyav()
    try:
        container = _opened(path)
    except (av.FFmpegError, OSError):
        return False
    try:
        with container:
            stream = container.streams.best("video")
            return stream is None or not is_mirrored(turn_of(next(container.decode(stream))))
    except (av.FFmpegError, OSError, StopIteration):
        return True  # told by whoever decodes it


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:160] if lines else type(error).__name__
