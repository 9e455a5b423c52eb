"""One reader of pictures: whatever the mode of a file and whichever door it comes through, the pixels are the same."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data
from zipr1.data import rows
from zipr1.data.chat import medium, parse
from zipr1.data.media import check, load_media
from zipr1.data.pictures import _tell_of_dark, read_image, rgb
from zipr1.profiling.subject import given_prompt

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)  # black to white
INK, PAPER = (12, 200, 90), (255, 255, 255)
ALPHA = np.linspace(0, 255, 64 * 64).reshape(64, 64).round().astype(np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(samples: np.ndarray, colour: int, **chunks: bytes) -> bytes:
    """A PNG of 16 bits, which PIL does not write in all colours. samples: uint16 `(H, W)` or `(H, W, C)`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = samples.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    between = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + between
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def tiff12(levels: np.ndarray) -> bytes:
    """A grey TIFF of 12 bits: two levels in three bytes."""
    height, width = levels.shape
    one, two = levels[:, ::2].astype(int), levels[:, 1::2].astype(int)
    packed = (
        np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], -1).astype(np.uint8).tobytes()
    )
    tags = [
        (256, width),
        (257, height),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
    ]
    tags.append((279, len(packed)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    at = 8 + len(packed) + len(packed) % 2
    body = packed + b"\0" * (len(packed) % 2)
    return (
        b"II*\0" + struct.pack("<I", at) + body + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(values * 255).astype(np.uint8)[..., None], 3, -1)


def over_white(colour: tuple[int, int, int], alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(np.array(colour) * share + 255 * (1 - share)).astype(np.uint8)


def with_alpha(mode: str) -> Image.Image:
    channels = [np.full((64, 64), value, np.uint8) for value in INK[: len(mode) - 1]]
    return Image.fromarray(np.stack([*channels, ALPHA], -1), mode)


def palette(clear: int | bytes) -> bytes:
    """Left half of colour 0, right half of colour 1."""
    image = Image.new("P", (64, 64), 0)
    image.putpalette([0, 0, 0, *INK])
    image.paste(1, (32, 0, 64, 64))
    return saved(image, transparency=clear)


def halves(left: tuple[int, int, int], right: tuple[int, int, int]) -> np.ndarray:
    out = np.zeros((64, 64, 3), np.uint8)
    out[:, :32], out[:, 32:] = left, right
    return out


def mixed(colour: tuple[int, int, int], alpha: int) -> tuple[int, int, int]:
    return tuple(int(v) for v in over_white(colour, np.array([alpha]))[0])


U16 = np.round(RAMP * 65535).astype(np.uint16)
HALF = Image.fromarray(halves((0, 0, 0), INK))
ONE_BIT = Image.fromarray((RAMP > 0.5).astype(np.uint8) * 255).convert("1")
GIF = Image.new("P", (64, 64), 0)
GIF.putpalette([9, 9, 9, *INK])
GIF.paste(1, (32, 0, 64, 64))
# name: (the file, its pixels, the largest difference in levels)
FILES = {
    "RGBA": (saved(with_alpha("RGBA")), over_white(INK, ALPHA), 1),
    "LA": (saved(with_alpha("LA")), over_white((INK[0],) * 3, ALPHA), 1),
    "RGBA webp": (
        saved(with_alpha("RGBA"), "WEBP", lossless=True, exact=True),
        over_white(INK, ALPHA),
        1,
    ),
    "RGBA tiff": (saved(with_alpha("RGBA"), "TIFF"), over_white(INK, ALPHA), 1),
    "palette, one clear": (palette(0), halves(PAPER, INK), 0),
    "palette, alphas": (
        palette(bytes([64, 128])),
        halves(mixed((0, 0, 0), 64), mixed(INK, 128)),
        1,
    ),
    "gif": (saved(GIF, "GIF", transparency=0), halves(PAPER, INK), 0),
    "RGB, a clear colour": (saved(HALF, transparency=(0, 0, 0)), halves(PAPER, INK), 0),
    "grey, a clear level": (
        saved(HALF.convert("L"), transparency=0),
        halves(PAPER, (135, 135, 135)),
        6,
    ),
    "opaque palette": (saved(HALF.quantize(4)), halves((0, 0, 0), INK), 0),
    "1 bit": (saved(ONE_BIT), grey((RAMP > 0.5).astype(float)), 0),
    "1 bit tiff": (
        saved(ONE_BIT, "TIFF", compression="group4"),
        grey((RAMP > 0.5).astype(float)),
        0,
    ),
    "16 bit png": (saved(Image.fromarray(U16)), grey(RAMP), 1),
    "16 bit png, a clear level": (
        png(U16, 0, tRNS=b"\0\0"),
        np.where(U16[..., None] == 0, 255, grey(RAMP)),
        1,
    ),
    "16 bit png, 10 said to count": (png(U16, 0, sBIT=b"\x0a"), grey(RAMP), 1),
    "16 bit tiff": (saved(Image.fromarray(U16), "TIFF"), grey(RAMP), 1),
    "16 bit RGB png": (png(np.repeat(U16[..., None], 3, -1), 2), grey(RAMP), 1),
    "16 bit RGBA png": (
        png(np.stack([U16 * 0, U16 * 0, U16 * 0, U16], -1), 6),
        grey(1 - RAMP),
        2,
    ),
    "16 bit LA png": (png(np.stack([U16 * 0, U16], -1), 4), grey(1 - RAMP), 2),
    "12 bit tiff": (tiff12(np.round(RAMP * 4095)), grey(RAMP), 1),
    "32 bit tiff": (saved(Image.fromarray(U16.astype(np.int32)), "TIFF"), grey(RAMP), 1),
    "32 bit tiff of bytes": (
        saved(Image.fromarray(np.round(RAMP * 255).astype(np.int32)), "TIFF"),
        grey(RAMP),
        0,
    ),
    "float tiff": (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), grey(RAMP), 1),
    "float tiff of bytes": (
        saved(Image.fromarray(np.round(RAMP * 255).astype(np.float32)), "TIFF"),
        grey(RAMP),
        0,
    ),
    "cmyk jpeg": (
        saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG", quality=100),
        halves((255, 0, 0), (255, 0, 0)),
        4,
    ),
    "cmyk tiff": (
        saved(Image.new("CMYK", (64, 64), (255, 0, 255, 0)), "TIFF"),
        halves((0, 255, 0), (0, 255, 0)),
        0,
    ),
    "grey jpeg": (saved(Image.new("L", (64, 64), 77), "JPEG"), halves((77,) * 3, (77,) * 3), 1),
    "bmp": (saved(HALF, "BMP"), halves((0, 0, 0), INK), 0),
}


def near(got: np.ndarray, wanted: np.ndarray, most: int) -> bool:
    assert got.dtype == np.uint8 and got.shape == wanted.shape
    return int(np.abs(got.astype(int) - wanted).max()) <= most


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_mode_becomes_what_is_seen(name):
    content, wanted, most = FILES[name]
    assert near(read_image(io.BytesIO(content)), wanted, most)


def doors(content: bytes, folder) -> dict[str, np.ndarray]:
    """The pixels of one file by each way into the product."""
    path = folder / "a.png"
    path.write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    table = [{"question": "q", "image": image, "answer": "x"} for image in ("a.png", uri)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    found = {f"row {p.id}": p.media[0] for p in rows.load(folder / "rows.jsonl", Data())}
    opened = Image.open(io.BytesIO(content))
    for door, source in (("path", str(path)), ("bytes", content), ("uri", uri), ("PIL", opened)):
        _, (entry,) = parse({"role": "user", "content": [{"type": "image", "image": source}]})
        found[f"chat {door}"] = medium(*entry)
    found["stored"] = medium("image", {"bytes": content, "path": None})
    found["frame of a clip"] = medium("video", [str(path)])
    found["profile"] = given_prompt(path, None).media[0]
    pixels = {door: load_media(media, 8)[0] for door, media in found.items()}
    pixels["frame of a clip"] = pixels["frame of a clip"][0]
    sizes = {door: check(media)[1:3] for door, media in found.items()}
    assert set(sizes.values()) == {pixels["profile"].shape[:2]}
    return pixels


@pytest.mark.parametrize("name", FILES)
def test_every_door_gives_the_same_pixels(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ZIPR1_CACHE", str(tmp_path / "cache"))
    wanted = read_image(io.BytesIO(FILES[name][0]))
    for door, pixels in doors(FILES[name][0], tmp_path).items():
        assert np.array_equal(pixels, wanted), door


@pytest.mark.parametrize(
    "name", ["RGBA", "palette, one clear", "16 bit png", "float tiff", "cmyk jpeg"]
)
def test_a_benchmark_s_pictures_too(name):
    pytest.importorskip("lmms_eval")
    from zipr1.evaluate.adapter import prompt_of

    opened = Image.open(io.BytesIO(FILES[name][0]))
    content = [{"type": "image", "url": opened}, {"type": "text", "text": "q"}]
    (media,) = prompt_of("t", [{"role": "user", "content": content}]).media
    assert np.array_equal(load_media(media, 8)[0], read_image(io.BytesIO(FILES[name][0])))


@pytest.mark.parametrize(
    "name", ["RGBA", "LA", "palette, one clear", "palette, alphas", "RGB, a clear colour"]
)
def test_what_is_clear_is_mixed_as_transformers_mixes_it(name):
    from transformers.image_transforms import convert_to_rgb

    opened = Image.open(io.BytesIO(FILES[name][0]))
    assert np.array_equal(rgb(opened), convert_to_rgb(opened, return_numpy=True))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright(orientation, kind):
    """Seen upright the first quarter is red and the second green, however the camera was held."""
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :32, 0], upright[:16, 32:, 1], upright[16:, :, 2] = 255, 255, 255
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    held = Image.fromarray(upright)
    held = held.transpose(undo[orientation]) if orientation in undo else held
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options = {"lossless": True} if kind == "WEBP" else options
    content = saved(held, kind, exif=exif, **options)
    assert near(read_image(io.BytesIO(content)), upright, 8)
    assert near(rgb(Image.open(io.BytesIO(content))), upright, 8)
    assert check(medium("image", content))[1:3] == (32, 64)


BAD_LEVELS = {
    "negative": (np.full((4, 4), -3, np.int32), "levels of -3 to -3; allowed: 0 to 65,535"),
    "too many bits": (np.full((4, 4), 70000, np.int32), "levels of 70000 to 70000"),
    "floats over 1": (
        np.full((4, 4), 1.5, np.float32),
        "levels of 1.5 to 1.5; allowed: 0 to 1, or whole",
    ),
    "depth in millimetres": (
        np.full((4, 4), 3000, np.float32),
        "levels of 3000 to 3000; allowed: 0 to 1, or whole ones of 0 to 255",
    ),
    "not a number": (np.full((4, 4), np.nan, np.float32), "levels of nan to nan"),
}


@pytest.mark.parametrize("name", BAD_LEVELS)
def test_levels_that_mean_nothing_certain_are_refused(name, tmp_path):
    levels, words = BAD_LEVELS[name]
    Image.fromarray(levels).save(tmp_path / "a.tiff")
    for look in (check, lambda m: load_media(m, 8)):
        with pytest.raises(InputError, match=rf"a\.tiff: has {words}"):
            look(medium("image", str(tmp_path / "a.tiff")))
    with pytest.raises(InputError, match=f"a picture in memory: has {words}"):
        medium("image", Image.fromarray(levels))


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "RGBX", "CMYK", "RGB"])
def test_other_colours_are_those_of_pil(mode):
    image = HALF.convert(mode)
    assert np.array_equal(rgb(image), np.asarray(image.convert("RGB")))


def test_colours_without_a_way_to_rgb_are_refused():
    with pytest.raises(InputError, match="its colours are La, which PIL does not turn into RGB"):
        rgb(Image.new("La", (8, 8)))


def test_twelve_bits_in_sixteen_are_told_of_once(caplog):
    _tell_of_dark.cache_clear()
    dark = Image.fromarray(np.round(RAMP * 4095).astype(np.uint16))
    assert rgb(dark, "xray.png").max() == 16  # 4095 / 257
    rgb(dark, "xray.png")
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("xray.png: a picture of 16 bits whose levels end at 4095 of 65535")


ARRAYS = {
    "grey": np.zeros((8, 8), np.uint8),
    "one channel": np.zeros((8, 8, 1), np.uint8),
    "with alpha": np.zeros((8, 8, 4), np.uint8),
    "channels first": np.zeros((3, 8, 8), np.uint8),
    "16 bit": np.zeros((8, 8, 3), np.uint16),
    "floats": np.zeros((8, 8, 3), np.float32),
    "empty": np.zeros((0, 8, 3), np.uint8),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_another_form_are_refused(name):
    import torch

    for array in (ARRAYS[name], torch.from_numpy(ARRAYS[name].astype(ARRAYS[name].dtype))):
        with pytest.raises(
            InputError, match=r"image in memory: .*allowed: uint8 \(H, W, 3\) in the order red"
        ):
            load_media(medium("image", array), 8)
    with pytest.raises(InputError, match=r"video in memory: .*allowed: uint8 \(F, H, W, 3\)"):
        load_media(medium("video", ARRAYS[name][None]), 8)


def test_pictures_of_one_content_and_two_shapes_are_two():
    """Their features are remembered by this key."""
    wide, high = np.zeros((32, 64, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)
    assert medium("image", wide).key != medium("image", high).key
    assert medium("image", wide).key == medium("image", wide.copy()).key


def test_bytes_kept_as_floats_come_back():
    """k / 255 in float32 is a little off for most k."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    kept = Image.fromarray((levels / 255).astype(np.float32))
    assert np.array_equal(rgb(kept)[..., 0], levels)
