"""What PIL may open of data: six formats. Of the others, EPS starts a program, and few people use the decoders."""

from __future__ import annotations

import io
import json
import subprocess

import pytest
from PIL import Image

from zipr1.core.errors import InputError
from zipr1.core.recipe import Data
from zipr1.data import rows
from zipr1.data.pictures import FORMATS, only_known_formats, read_image

Image.init()


def encoded(name: str) -> bytes | None:
    """A red picture in one of PIL's formats; None for one that PIL does not both write and read."""
    for mode in ("RGB", "P", "1"):
        file = io.BytesIO()
        try:
            Image.new("RGB", (16, 8), (255, 0, 0)).convert(mode).save(file, name)
            Image.open(io.BytesIO(file.getvalue())).close()
        except (OSError, ValueError, KeyError):
            continue
        return file.getvalue()
    return None


MADE = {name: data for name in sorted(Image.SAVE) if (data := encoded(name)) is not None}
MADE.pop("MPO")  # is JPEG, of several pictures


@pytest.fixture(autouse=True)
def no_program(monkeypatch):
    """Whoever starts a program, such as Ghostscript, fails the test."""

    def started(*args, **more):
        raise AssertionError(f"started {args}")

    for name in ("Popen", "run", "check_call", "check_output", "call"):
        monkeypatch.setattr(subprocess, name, started)


def test_there_are_formats_of_both_kinds():
    assert set(FORMATS) <= set(MADE)
    assert {"EPS", "PPM", "TGA", "JPEG2000"} <= set(MADE) - set(FORMATS)


@pytest.mark.parametrize("name", MADE)
def test_rows_hold_pictures_of_six_formats(tmp_path, name):
    """Whatever the file is called; the same inside of a row."""
    (tmp_path / "a.png").write_bytes(MADE[name])
    row = {"question": "what?", "image": "a.png", "answer": "red"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    if name in FORMATS:
        (prompt,) = rows.load(tmp_path / "rows.jsonl", Data())
        assert prompt.media[0].size == (1, 8, 16, 0.0)
        red = read_image(io.BytesIO(MADE[name]))[4, 8]
        assert red[0] > 240 and red[1] < 15
        return
    with pytest.raises(InputError, match=r"row 1: .*a\.png: not an image; allowed: PNG, JPEG, "):
        rows.load(tmp_path / "rows.jsonl", Data())
    with pytest.raises(InputError, match=r"image in the row: not an image; allowed: PNG, JPEG, "):
        read_image(io.BytesIO(MADE[name]))


@pytest.mark.parametrize("name", MADE)
def test_libraries_that_open_pictures_get_the_same_ones(name):
    datasets = pytest.importorskip("datasets")
    cell, stock = {"bytes": MADE[name], "path": None}, Image.open
    with only_known_formats():
        if name in FORMATS:
            assert datasets.Image().decode_example(cell).size == (16, 8)
            assert Image.open(io.BytesIO(MADE[name]), formats=[name]).size == (16, 8)
        else:
            with pytest.raises(OSError, match="cannot identify"):
                datasets.Image().decode_example(cell)
            with pytest.raises(OSError, match="cannot identify"):
                Image.open(io.BytesIO(MADE[name]), formats=[name])
    assert Image.open is stock
