"""Pictures of many sizes and modes, as transformers' own processor sees them."""

from __future__ import annotations

import numpy as np
import pytest
from alike import compare_pictures
from PIL import Image, ImageOps

pytest.importorskip("torchvision", reason="run `make test`")

BOUNDS = {"shortest_edge": 32 * 32, "longest_edge": 640 * 480}
SIDES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
QWEN = {**SIDES, "size": BOUNDS, "image_processor_type": "Qwen2VLImageProcessor"}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")  # the others' rows have the same classes

# Width and height: single pixels, sides just under and over a multiple of 16, halves that round to even, thin, long,
# under the least and over the most number of pixels.
SIZES = [
    (1, 1), (1, 2), (2, 1), (3, 3), (7, 9), (8, 8), (15, 15), (16, 16), (17, 17), (23, 25),
    (24, 24), (24, 40), (31, 33), (32, 32), (33, 31), (40, 24), (48, 48), (56, 56), (63, 65), (64, 64),
    (72, 88), (100, 37), (37, 100), (104, 120), (128, 128), (199, 1), (1, 200), (200, 1), (400, 2), (3, 599),
    (640, 480), (480, 640), (641, 480), (640, 488), (648, 472), (720, 576), (799, 601), (1000, 8), (9, 1700),
    (1024, 768), (1279, 721), (1600, 100), (2000, 1500), (4000, 3000), (3000, 15),
]  # fmt: skip
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10007 + height)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
    if mode in ("RGBA", "LA"):
        rgb.putalpha(alpha)
    return rgb.convert("P").convert("PA") if mode == "PA" else rgb.convert(mode)


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, opened):
    return opened(request.param, {"preprocessor_config.json": QWEN})


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sizes(pair, size):
    compare_pictures(pair, picture(*size))


@pytest.mark.parametrize("mode", MODES)
def test_modes(pair, mode):
    compare_pictures(pair, picture(70, 50, mode))


def test_sixteen_bits_are_scaled_to_eight(pair, tmp_path):
    """transformers would cut them off; given them scaled, it sees what is seen here."""
    levels = np.random.default_rng(0).integers(0, 65536, (50, 70), dtype=np.uint16)
    scaled = Image.fromarray(np.round(levels / 257).astype(np.uint8))
    for form in ("PNG", "TIFF"):
        Image.fromarray(levels).save(tmp_path / "deep", form)
        compare_pictures(pair, str(tmp_path / "deep"), theirs=scaled)


def test_several_pictures_and_none(pair):
    compare_pictures(pair, picture(40, 70), picture(90, 30, "L"), picture(64, 64))
    compare_pictures(pair)


FILES = {
    "png": ("RGB", "PNG", {}),
    "grey png": ("L", "PNG", {}),
    "palette": ("P", "PNG", {}),
    "clear colour of a palette": ("P", "PNG", {"transparency": 3}),
    "clear grey": ("L", "PNG", {"transparency": 128}),
    "clear colour": ("RGB", "PNG", {"transparency": (10, 20, 30)}),
    "jpeg": ("RGB", "JPEG", {"quality": 40}),
    "grey jpeg": ("L", "JPEG", {}),
    "cmyk jpeg": ("CMYK", "JPEG", {}),
    "turned jpeg": ("RGB", "JPEG", {"exif": turned_by(6)}),
    "mirrored jpeg": ("RGB", "JPEG", {"exif": turned_by(5)}),
    "webp": ("RGB", "WEBP", {"lossless": True}),
    "clear webp": ("RGBA", "WEBP", {"lossless": True}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "tiff": ("RGB", "TIFF", {}),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(pair, kind, tmp_path):
    """transformers is given the opened picture, upright: of a path it would forget what is transparent."""
    mode, form, options = FILES[kind]
    picture(70, 50, mode).save(tmp_path / "file", form, **options)
    with Image.open(tmp_path / "file") as opened:
        compare_pictures(pair, str(tmp_path / "file"), theirs=ImageOps.exif_transpose(opened))
