"""Pixel settings: how large pictures and frames become and how they are normalised, read as transformers reads them.

They lie beside the weights: a part of processor_config.json where transformers 5 wrote the folder, else
preprocessor_config.json and video_preprocessor_config.json. Settings that are not there are not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from zipr1.core import hub
from zipr1.core.errors import InputError
from zipr1.core.types import NOTHING, Asked
from zipr1.data.video import QWEN2_FRAMES, FrameRule
from zipr1.models.beside import read_json
from zipr1.models.tiles import UNCUT, Cuts

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

PICTURES, CLIPS, WHOLE = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# Steps that are always taken here; a folder that leaves one out wants other pixels.
STEPS = ("do_resize", "do_rescale", "do_normalize")
# Sizes of patches, by the names they have beside the weights; the vision tower's own decide.
SIZES = ("patch_size", "merge_size", "temporal_patch_size")
# What a settings file leaves unsaid, of Qwen2-VL's classes.
PICTURE_DEFAULTS: dict[str, Any] = {
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "resample": 3,
}


@dataclass(frozen=True)
class ClipClass:
    """What transformers' class of a family's clips does besides its files: they need torchvision even to be looked at.

    defaults: what a file leaves unsaid. whole: the bounds of `size` are of all frames together, and min_pixels and
    max_pixels are not looked at; else of each frame. Where a file has `cap_pixels_per_frame`, its max_video_tokens
    bounds the tokens of a frame with `whole`, else of a clip. even: as in FrameRule.
    """

    defaults: Mapping[str, Any]
    whole: bool
    even: bool


QWEN2_CLIPS = ClipClass(
    {
        **PICTURE_DEFAULTS,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768},
        "max_video_tokens": 128000,
        "do_sample_frames": False,
        "fps": None,
        "min_frames": 4,
        "max_frames": 768,
    },
    whole=False,
    even=True,
)
QWEN3_CLIPS = ClipClass(
    {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "resample": 3,
        "max_video_tokens": 768,
        "do_sample_frames": True,
        "fps": 2,
        "min_frames": 4,
        "max_frames": 768,
    },
    whole=True,
    even=False,
)


@dataclass(frozen=True)
class PixelSettings:
    """How pictures become patches. min_pixels, max_pixels: bounds of height x width after resizing; min_frame_pixels,
    max_frame_pixels: of a clip's frame, None where they are a picture's; frame_mean, frame_std: likewise. resample:
    PIL's number of the filter that resizes. clip_tokens: of a clip at most, before nine tenths of it are shared out
    among its frames; None where frames are bounded one by one alone. frame_rule: which frames a clip is seen by.

    clip_pixels: bounds of frames x height x width, where a clip is bounded as a whole (Qwen3-VL); its frames are
    bounded besides only by max_frame_pixels. shared: in what `of` gives, the frames that share such bounds; 0: none.

    tile: pixels on a side of the squares that a picture is made, 0 for any size; cuts: how many; besides: tokens of a
    picture that show no part of it. clips: whether videos are handled. size: height and width that are asked of one
    picture or clip, in place of its own."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    tile: int = 0
    besides: int = 0
    cuts: Cuts = UNCUT
    clips: bool = True
    max_frame_pixels: int | None = None
    min_frame_pixels: int | None = None
    frame_mean: tuple[float, ...] | None = None
    frame_std: tuple[float, ...] | None = None
    resample: int = 3
    clip_tokens: int | None = None
    frame_rule: FrameRule = QWEN2_FRAMES
    clip_pixels: tuple[int, int] | None = None
    shared: int = 0
    size: tuple[int, int] | None = None

    def of(
        self,
        kind: str,
        frame_pixels: int | None = None,
        frames: int | None = None,
        asked: Asked = NOTHING,
    ) -> PixelSettings:
        """Those of an `image` or a `video`. frame_pixels: a lower upper bound of a clip's frame, if it is one. frames:
        how many the clip has, where that bounds each of them. asked: of this one; bounds of a picture take the place of
        the model's, those of a clip's frames lower them, as in Qwen's utilities. Raises InputError where tiles forbid
        it.
        """
        sizes = (asked.min_pixels, asked.max_pixels, asked.height)
        if self.tile and any(size is not None for size in sizes):
            raise InputError(
                f"a size is asked of one {kind} (max_pixels, resized_height or the like), and this model sees "
                f"pictures as squares of {self.tile} x {self.tile}; leave it out"
            )
        if kind == "image":
            return self._with_asked(asked, asked.max_pixels or self.max_pixels)
        low, high = self._clip_bounds(frame_pixels, frames)
        own = replace(
            self,
            min_pixels=low,
            max_pixels=high,
            shared=frames or 0 if self.clip_pixels is not None else 0,
            mean=self.frame_mean or self.mean,
            std=self.frame_std or self.std,
        )
        most = (asked.max_pixels or high) * (own.shared or 1)
        return own._with_asked(asked, min(high, most))

    def _with_asked(self, asked: Asked, high: int) -> PixelSettings:
        if asked == NOTHING:
            return self
        least = asked.min_pixels * (self.shared or 1) if asked.min_pixels else self.min_pixels
        size = None if asked.height is None or asked.width is None else (asked.height, asked.width)
        return replace(self, min_pixels=min(least, high), max_pixels=high, size=size)

    def _clip_bounds(self, frame_pixels: int | None, frames: int | None) -> tuple[int, int]:
        if self.clip_pixels is not None:
            low, high = self.clip_pixels
            caps = [p for p in (self.max_frame_pixels, frame_pixels) if p is not None]
            if frames and caps:
                high = max(min(*caps, high // frames), int(low * 1.05)) * frames
            return low, high
        high = self.max_frame_pixels or self.max_pixels
        if frame_pixels is not None:
            high = min(high, frame_pixels)
        low = min(self.min_frame_pixels or self.min_pixels, high)
        if self.clip_tokens is not None and frames:
            total = int(self.clip_tokens * self.factor**2 * 0.9)
            high = max(min(high, total * self.temporal // frames), int(low * 1.05))
        return low, high

    @property
    def factor(self) -> int:
        """Pixels on a side of one token of the language model."""
        return self.patch * self.merge

    def __str__(self) -> str:
        if self.tile:
            return f"each picture becomes {self.cuts} of {self.tile} x {self.tile} pixels"
        parts = [f"pictures of {self.min_pixels:,} to {self.max_pixels:,} pixels"]
        if self.clips:
            clip, what = self.of("video"), "clips" if self.clip_pixels else "frames of clips"
            parts.append(f"{what} of {clip.min_pixels:,} to {clip.max_pixels:,}")
            if self.clip_pixels and self.max_frame_pixels:
                parts.append(f"their frames of at most {self.max_frame_pixels:,}")
        return ", ".join(parts)

    @classmethod
    def read(
        cls,
        folder: str | Path,
        sizes: tuple[int, int, int],
        asked: Mapping[str, int | None],
        given: Mapping[str, Any] | None = None,
        revision: str | None = None,
        defaults: Mapping[str, Any] = PICTURE_DEFAULTS,
        clips: ClipClass | None = QWEN2_CLIPS,
        **fixed: Any,
    ) -> PixelSettings:
        """Settings saved beside the weights in `folder`, a folder or a hub id at `revision` (fetched where they were
        not); with no folder, `given`, and clips are like pictures.

        sizes: patch, merge and temporal. asked: min_pixels, max_pixels and max_frame_pixels; those that are set win.
        defaults: of the family's class, for what the files leave unsaid; clips: likewise, None where they are not
        handled. fixed: the family's other fields. Raises InputError where the files are missing, or say what is not
        done here.
        """
        if folder:
            picture, clip = saved(folder, "image", revision), saved(folder, "video", revision)
        else:
            picture, clip = dict(given or {}), None
        if picture is None:
            raise InputError(_missing(folder))
        try:
            for found in (picture, clip or {}):
                _check(found, sizes, folder)
            low, high = _bounds(picture, defaults)
            values: dict[str, Any] = {
                "patch": sizes[0],
                "merge": sizes[1],
                "temporal": sizes[2],
                "mean": _colours(picture, defaults, "image_mean"),
                "std": _colours(picture, defaults, "image_std"),
                "resample": int(Image.Resampling(_value(picture, defaults, "resample"))),
                "min_pixels": asked.get("min_pixels") or low,
                "max_pixels": asked.get("max_pixels") or high,
                "max_frame_pixels": asked.get("max_frame_pixels"),
                "clips": clips is not None,
            }
            if clip is not None and clips is not None:
                like = cls(**{**values, "min_pixels": low, "max_pixels": high})
                values |= _of_clips(clip, clips, like)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{folder}: its pixel settings cannot be read ({error}); copy {PICTURES} from the model again"
            ) from None
        return cls(**{**values, **fixed})


def _of_clips(clip: Mapping[str, Any], kind: ClipClass, picture: PixelSettings) -> dict[str, Any]:
    """The fields of clips: None where they are as `picture` has them, so that whoever asks for other pictures gets
    clips like them."""
    usual = kind.defaults
    mean, std = _colours(clip, usual, "image_mean"), _colours(clip, usual, "image_std")
    values: dict[str, Any] = {
        "frame_mean": None if mean == picture.mean else mean,
        "frame_std": None if std == picture.std else std,
        "frame_rule": _rule(clip, kind),
    }
    capped = bool(clip.get("cap_pixels_per_frame"))
    tokens = int(_value(clip, usual, "max_video_tokens")) if capped else None
    if kind.whole:
        side = picture.factor**2
        caps = [tokens] if tokens else []
        if picture.max_frame_pixels is not None:
            caps.append(max(1, picture.max_frame_pixels // side))
        return {
            **values,
            "clip_pixels": _bounds({"size": clip.get("size")}, usual),
            "max_frame_pixels": min(caps) * side if caps else None,
        }
    least, most = _bounds(clip, usual)
    return {
        **values,
        "clip_tokens": tokens,
        "max_frame_pixels": picture.max_frame_pixels
        or (None if most == picture.max_pixels else most),
        "min_frame_pixels": None if least == min(picture.min_pixels, most) else least,
    }


def clip_rule(folder: str, kind: ClipClass) -> FrameRule:
    """Which frames of a clip the settings beside a folder's weights choose."""
    return _rule(saved(folder, "video", None) or {}, kind)


def _rule(clip: Mapping[str, Any], kind: ClipClass) -> FrameRule:
    usual = kind.defaults
    rate, number = None, None
    if _value(clip, usual, "do_sample_frames"):
        number = clip.get("num_frames")
        rate = _value(clip, usual, "fps") if number is None else None
    return FrameRule(
        even=kind.even,
        least=int(_value(clip, usual, "min_frames")),
        most=int(_value(clip, usual, "max_frames")),
        fps=None if rate is None else float(rate),
        number=None if number is None else int(number),
    )


def has_pixel_settings(folder: str | Path) -> bool:
    """Whether a folder holds pixel settings of its own."""
    return saved(folder, "image", None) is not None


def saved(folder: str | Path, kind: str, revision: str | None) -> dict[str, Any] | None:
    """The settings of pictures or of clips: what transformers 5 writes as a part of processor_config.json, else the
    file of that kind, else, for clips, the pictures'."""
    whole = read_json(folder, WHOLE, revision) or {}
    found = whole.get(f"{kind}_processor")
    if isinstance(found, dict):
        return dict(found)
    for name in (CLIPS, PICTURES) if kind == "video" else (PICTURES,):
        values = read_json(folder, name, revision)
        if values is not None:
            return values
    return None


def _value(found: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> Any:
    return defaults[name] if found.get(name) is None else found[name]


def _colours(found: Mapping[str, Any], defaults: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A mean or a standard deviation of each of three colours."""
    value = _value(found, defaults, name)
    if isinstance(value, int | float):
        value = [value] * 3
    red, green, blue = (float(one) for one in value)
    return red, green, blue


def _bounds(found: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[int, int]:
    """Least and most pixels. min_pixels and max_pixels win over `size`, as in transformers: who lowers them writes them
    beside what was there."""
    size = found.get("size") or {}
    size = size if isinstance(size, Mapping) else {}
    both = []
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        choices = (found.get(name), size.get(edge), size.get(name))
        usual = (defaults["size"] or {}).get(edge) or PICTURE_DEFAULTS["size"][edge]
        both.append(int(next((value for value in choices if value), usual)))
    return both[0], both[1]


def _check(found: Mapping[str, Any], sizes: tuple[int, int, int], folder: str | Path) -> None:
    """Raise InputError for settings that ask for what is not done here."""
    for step in STEPS:
        if found.get(step) is False:
            raise InputError(
                f"{folder}: its pixel settings have {step}: false; here pictures are always resized, rescaled and "
                "normalised; set it to true if the model was trained so"
            )
    scale = found.get("rescale_factor")
    if scale is not None and abs(scale * 255 - 1) > 1e-6:
        raise InputError(
            f"{folder}: its pixel settings have rescale_factor {scale}; handled: 1/255"
        )
    for name, own in zip(SIZES, sizes, strict=True):
        said = found.get(name)
        if isinstance(said, int) and said != own:
            raise InputError(
                f"{folder}: its pixel settings have {name} {said} and its config.json has {own}; they must be equal; "
                "one of the files belongs to another model"
            )


def _missing(folder: str | Path) -> str:
    hint = "copy it from the model that this one was made from"
    if not Path(folder).is_dir():
        unset = " or unset HF_HUB_OFFLINE" if hub.asked_offline() else ""
        hint = f"download it (hf download {folder} {PICTURES}){unset}"
    return (
        f"model.path: {folder} has no pixel settings ({PICTURES}, or {WHOLE} with image_processor), and without them "
        f"pictures would be resized and normalised by guess; {hint}"
    )
