"""Files of rows that are hostile, damaged or large: bad rows by number, and little in memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from zipr1.core.errors import InputError, RunError
from zipr1.core.recipe import Data
from zipr1.data import rows
from zipr1.data.cache import KeptPicture, kept_picture
from zipr1.data.media import load_media
from zipr1.data.parquet import MAX_ROW
from zipr1.data.readers import _elements, read

GOOD = {"question": "what?", "answer": "x"}
# What a row may hold, and why it is bad.
BAD = {
    "half of a character": ('{"question": "\\ud800", "answer": "x"}', "half of a character"),
    "deep": ('{"question": "q", "answer": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "100 deep"),
    "somewhat deep": ('{"question": "q", "answer": "x", "more": ' + "[" * 101 + "]" * 101 + "}", "100 deep"),
    "digits": ('{"question": "q", "answer": ' + "9" * 5000 + "}", "an integer of thousands of digits"),
    "bytes": (b'{"question": "\xff", "answer": "x"}', "not JSON"),
    "comma": ('{"question": "q" "answer": "x"}', "not JSON"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZIPR1_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("case", BAD)
def test_hostile_rows_are_bad_rows_by_number(tmp_path, caplog, case, ending):
    bad, words = BAD[case]
    good = json.dumps(GOOD).encode()
    parts = [good, bad.encode() if isinstance(bad, str) else bad, good]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b"\n".join(parts) if ending == "jsonl" else b"[" + b",\n".join(parts) + b"]")
    with pytest.raises(
        InputError, match=rf"rows\.{ending}: row 2: not JSON \(.*{words}|row 2: {words}"
    ) as error:
        rows.load(path, Data())
    assert "\n" not in str(error.value)
    assert [p.id for p in rows.load(path, Data(on_bad_row="skip"))] == ["rows/1", "rows/3"]
    assert "1 of 3 rows skipped" in caplog.text


def test_texts_may_hold_any_character(tmp_path):
    """Ends of lines of Unicode are no ends of lines of a file."""
    made = [{**GOOD, "question": f"a{mark}b"} for mark in "\u2028\u2029\u0085\x0b\x0c\x1c"]
    for name, text in (
        ("rows.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)),
        ("rows.json", json.dumps(made, ensure_ascii=False)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = [p.messages[0]["content"][0]["text"] for p in rows.load(tmp_path / name, Data())]
        assert found == [row["question"] for row in made]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[]", []),
        ("[1]", ["1"]),
        (' [ {"a": [1, 2]} , "],[" ] ', [' {"a": [1, 2]} ', ' "],[" ']),
        ('["\\"]", 2]', ['"\\"]"', " 2"]),
        ("[1, [2", None),
        ("{}", None),
        ("[1] 2", None),
        ("x [1]", None),
        ("", None),
    ],
)
def test_elements_of_a_list_by_hand(text, wanted):
    if wanted is None:
        with pytest.raises(ValueError):  # noqa: PT011  one of three, and none is told as it is
            list(_elements(text.encode()))
    else:
        assert [piece.decode() for piece in _elements(text.encode())] == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'[{"question": "q", "answer": "x"}, {"question": ', "not JSON"),
        (b'{"question": "q"}', "dict; allowed: a list of rows; or name it .jsonl"),
        (b'{"question": "q"}\n{"question": "r"}', "not JSON (Extra data"),
        (b'[{"question": "q", "answer": "x"}] 7', "not JSON (Extra data"),
        (b"7", "int; allowed: a list of rows"),
        (b"   ", "not JSON"),
    ],
)
def test_a_json_file_that_is_no_list_is_one_line_and_no_row(tmp_path, text, words):
    path = tmp_path / "rows.json"
    path.write_bytes(text)
    for settings in (Data(), Data(on_bad_row="skip")):
        with pytest.raises(InputError, match=r"rows\.json") as told:
            rows.load(path, settings)
        assert words in str(told.value) and "\n" not in str(told.value)
    path.write_bytes(b'\xef\xbb\xbf [{"question": "q", "answer": "x"}]\n')
    assert len(rows.load(path, Data())) == 1


def table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def repeated(text, rows):
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [text])


@pytest.mark.parametrize("cell", [b"\xff\xfe", None])
def test_a_cell_that_cannot_be_read_is_a_bad_row(tmp_path, cell):
    texts = pyarrow.array([b"a", cell, b"c"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    path = table(tmp_path / "rows.parquet", question=column, answer=["x"] * 3)
    with pytest.raises(
        InputError, match=r"rows\.parquet: row 2: (a cell cannot be read|no question)"
    ):
        rows.load(path, Data())
    found = rows.load(path, Data(on_bad_row="skip"))
    assert [p.id for p in found] == ["rows/1", "rows/3"]


def test_a_part_of_the_rows_reads_no_more(tmp_path):
    path = table(
        tmp_path / "rows.parquet", question=[f"q{i}" for i in range(20)], answer=["x"] * 20
    )
    lines = "".join(json.dumps({"question": f"q{i}", "answer": "x"}) + "\n" for i in range(20))
    (tmp_path / "rows.jsonl").write_text(lines)
    for source in (path, tmp_path / "rows.jsonl"):
        for part in ("[:5]", "[-5:]", "[3:-3]", "[:]", "[30:]", "[-30:2]", "[5:2]", "[:-20]"):
            found = [number for number, _ in read(f"{source}:{part}", Data())[2]]
            start, stop, _ = slice(*[int(x) if x else None for x in part[1:-1].split(":")]).indices(
                20
            )
            assert found == list(range(start + 1, max(start, stop) + 1)), part


def test_text_that_expands_stays_small(tmp_path):
    """A file of a kilobyte that says 500 times the same megabyte, in two forms."""
    peaks = {}
    once = "q" * 1_000_000
    plain = repeated(once, 500)
    turns = pyarrow.StructArray.from_arrays(
        [plain, pyarrow.array(["human"] * 500)], ["value", "from"]
    )
    lists = pyarrow.ListArray.from_arrays(pyarrow.array(range(501), pyarrow.int32()), turns)
    for name, column in (("question", plain), ("conversations", lists)):
        path = tmp_path / f"{name}.parquet"
        made = pyarrow.table({name: column, "answer": ["x"] * 500})
        parquet.write_table(made, path, compression="zstd", store_schema=False)
        assert path.stat().st_size < 2000
        peaks[name], _ = growth(path, 500)
    assert max(peaks.values()) < 150, peaks  # MiB; written out they are 500


def test_a_row_that_expands_is_a_bad_row(tmp_path):
    """One row with 2000 turns of a megabyte each."""
    turns = pyarrow.StructArray.from_arrays(
        [repeated("q" * 1_000_000, 2001), pyarrow.array(["human"] * 2001)], ["value", "from"]
    )
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 2000, 2001], pyarrow.int32()), turns)
    path = table(tmp_path / "rows.parquet", conversations=lists, answer=["x", "y"])
    with pytest.raises(InputError, match=r"row 1: 1\.9 GiB in one row; at most 256 MiB"):
        rows.load(path, Data())
    assert MAX_ROW == 256 * 2**20
    assert [p.answer for p in rows.load(path, Data(on_bad_row="skip"))] == ["y"]


def growth(path, count, **settings):
    """MiB by which the memory of a process of its own grows while it loads a file of rows: at most, and for good."""
    code = """
import json, re, sys
import numpy, pyarrow.compute, pyarrow.parquet
from zipr1.core.recipe import Data
from zipr1.data import rows
def held(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = held("VmRSS")
prompts = rows.load(sys.argv[1], Data(workers=2, **json.loads(sys.argv[3])))
assert len(prompts) == int(sys.argv[2])
pyarrow.default_memory_pool().release_unused()
print(json.dumps([held("VmHWM") - before, held("VmRSS") - before]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(count), json.dumps(settings)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json"])
def test_pictures_of_rows_are_not_held(tmp_path, cache, ending):
    """60 MiB of pictures, in row groups of 10, or as base64 in lines. Most of such a file is noise behind its end."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(picture, "PNG")
    noise = np.random.default_rng(0)
    blobs = [picture.getvalue() + noise.bytes(2**19) for _ in range(120)]
    if ending == "parquet":
        images = [[{"bytes": blob, "path": None}] for blob in blobs]
        made = pyarrow.table({"question": ["q"] * 120, "images": images, "answer": ["x"] * 120})
        path = tmp_path / "rows.parquet"
        parquet.write_table(made, path, row_group_size=10)
        del made, images
    else:
        import base64

        path = tmp_path / f"rows.{ending}"
        before, after = ("", "\n") if ending == "jsonl" else ("[", ",")
        with path.open("w") as file:
            for blob in blobs:
                uri = "data:image/png;base64," + base64.b64encode(blob).decode()
                row = json.dumps({"question": "q", "image": uri, "answer": "x"})
                file.write(before + row + after)
                before = ""
            if ending == "json":
                file.seek(file.tell() - 1)
                file.write("]")
    most, for_good = growth(path, 120)
    assert for_good < 40, (most, for_good)  # MiB, of which 20 do not depend on the pictures
    assert most < 100, (most, for_good)  # while a row group is decoded
    first, *_ = rows.load(path, Data())
    assert isinstance(first.media[0].source, KeptPicture)
    assert load_media(first.media[0], 1)[0][0, 0].tolist() == [255, 0, 0]
    # Loaded again, and by others at the same time, they are the same files.
    assert len([p for p in cache.rglob("*") if p.is_file()]) == 120


def test_kept_pictures_are_whole_or_written_again(cache, monkeypatch):
    kept = kept_picture(b"abc")
    assert kept.read() == b"abc" and kept.path.is_relative_to(cache)
    kept.path.write_bytes(b"a")
    assert kept_picture(b"abc").read() == b"abc"
    kept.path.unlink()
    with pytest.raises(RunError, match="a picture of the data is gone"):
        kept.read()
    (cache / "file").write_text("")
    monkeypatch.setenv("ZIPR1_CACHE", str(cache / "file"))
    with pytest.raises(RunError, match="set ZIPR1_CACHE to a folder"):
        kept_picture(b"abc")


def test_a_folder_that_the_library_cannot_read_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "other.json").write_text('{"a": [1, {"b": ')
    for source, name in (
        (tmp_path / "some", "some"),
        ("/", "/"),
    ):  # of the last it raises IndexError
        with pytest.raises(InputError, match=rf"{name} \(train\): does not load") as error:
            rows.load(source, Data())
        assert "\n" not in str(error.value)
